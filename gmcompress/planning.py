"""Which structure each layer gets: sites and rules in, a Plan out; no weight is touched."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import gcd, isfinite, prod
from typing import Any

from .errors import GMError, nearest_names, shown
from .factors import views_of
from .files import parse_json
from .groups import Group, largest_quotient
from .groups import group as parse_group
from .rules import Rule, Rules, listed, matching, told
from .structure import Structure
from .surgery import TIED_HEAD, Site
from .tables import percent, table_text

MAX_COUNT = 1 << 40  # of numbers in a weight or a model

Override = str | Group | Structure | None


@dataclass(frozen=True)
class Plan:
    """What would happen to a model: a structure string for every layer to be compressed, a reason for every other.

    Pure data: print it, edit it, save it as JSON. `sites` are the facts it was made from and `model_parameters` counts
    all parameters of the model, tied ones once. Under a budget `optimum` holds the `budget`, the predicted `loss`, the
    proven lower `bound` of it over all choices, the relative `gap` of the two, and what the loss is a `measure` of.
    """

    group: str
    layers: Mapping[str, str]
    skipped: Mapping[str, str]
    sites: tuple[Site, ...]
    model_parameters: int
    optimum: Mapping[str, float | str] | None = None  # of a plan under a budget: what was asked, the loss, its bound

    def site(self, name: str) -> Site:
        """The facts about one layer."""
        return self._named[name]

    @cached_property
    def _named(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    def stored(self, name: str) -> int:
        """Numbers stored for the weight of a compressed layer."""
        return Structure.parse(self.layers[name]).parameters(self.site(name).shape)

    @property
    def parameters(self) -> int:
        """Parameters of the model when the plan has been carried out."""
        return self.model_parameters + sum(self.stored(name) - prod(self.site(name).shape) for name in self.layers)

    def edit(self, changes: Mapping[str, Override]) -> Plan:
        """A new plan in which some layers have another structure, or None to be left dense.

        Raises:
            GMError: a name is not in the plan, or a structure does not fit its layer.
        """
        layers, skipped = dict(self.layers), dict(self.skipped)
        for name, structure in changes.items():
            if name not in layers and name not in skipped:
                known = [*layers, *skipped]
                raise GMError(f"the plan has no layer {name!r}; the nearest are {nearest_names(name, known)}")
            layers.pop(name, None)
            skipped.pop(name, None)
            if structure is None:
                skipped[name] = "left dense by an edit of the plan"
            else:
                layers[name] = str(_literal(self.site(name), Structure.parse(structure)))
        ordered = {site.name: layers[site.name] for site in self.sites if site.name in layers}
        return Plan(self.group, ordered, skipped, self.sites, self.model_parameters)

    def rows(self) -> list[dict[str, Any]]:
        """One row per site, in the order of the model: name, shape, structure or "", dense, stored, reason."""
        return [
            {
                "name": site.name,
                "shape": site.shape,
                "structure": self.layers.get(site.name, ""),
                "dense": prod(site.shape),
                "stored": self.stored(site.name) if site.name in self.layers else prod(site.shape),
                "reason": self.skipped.get(site.name, ""),
            }
            for site in self.sites
        ]

    def __str__(self) -> str:
        columns = ["layer", "shape", "structure", "dense#", "stored#", "kept#", "left dense because"]
        rows = [
            (
                row["name"] or "(root)",
                "×".join(map(str, row["shape"])),
                row["structure"],
                f"{row['dense']:,}",
                f"{row['stored']:,}",
                percent(row["stored"], row["dense"]),
                row["reason"],
            )
            for row in self.rows()
        ]
        kept = percent(self.parameters, self.model_parameters)
        summary = (
            f"{len(self.layers)} of {len(self.sites)} layers compressed: "
            f"{self.model_parameters:,} → {self.parameters:,} parameters ({kept})"
        )
        if self.optimum is not None:
            summary += "\n" + _optimum_line(self.optimum)
        return table_text(f"Plan for {self.group}", columns, rows) + "\n" + summary

    def kinds(self) -> dict[str, int]:
        """How many layers get which kind of structure: "adapted bases", "separable", or the group of its matrices."""
        found = [Structure.parse(text) for text in self.layers.values()]
        return dict(Counter(map(_kind, found)).most_common())

    def to_json(self) -> str:
        """The plan as JSON; `Plan.from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """The plan as the object that its JSON holds; `Plan.from_dict` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from its JSON, each structure checked against the shape of its layer.

        Raises:
            GMError: not JSON, a field is missing or of the wrong type, or a structure does not fit its layer.
        """
        return cls.from_dict(parse_json(text, "a plan"))

    @classmethod
    def from_dict(cls, found: object) -> Plan:
        """A plan from the object that its JSON holds."""
        wanted = {field.name: field for field in fields(cls)}
        if not isinstance(found, dict) or set(found) | {"optimum"} != set(wanted):
            raise GMError(f"a plan is an object with the fields {', '.join(wanted)}")
        sites = tuple(_site_from(each) for each in _expect(found["sites"], list, "sites"))
        shapes = {site.name: site for site in sites}
        if len(shapes) < len(sites):
            raise GMError("in a plan, every site has a name of its own")
        layers = _strings(found["layers"], "layers")
        for name, text in layers.items():
            if name not in shapes:
                raise GMError(f"the plan gives a structure to {name[:80]!r}, which is not among its sites")
            layers[name] = str(_literal(shapes[name], Structure.parse(text)))
        skipped = _strings(found["skipped"], "skipped")
        total = _count(found["model_parameters"], "model_parameters")
        optimum = _optimum_from(found.get("optimum"))
        return cls(_expect(found["group"], str, "group"), layers, skipped, sites, total, optimum)


def _kind(structure: Structure) -> str:
    if structure.separable is not None:
        return structure.separable.kind
    if structure.group is not None:
        return str(structure.group)
    return "low rank" if structure.grid is None else "adapted bases"


def _optimum_line(optimum: Mapping[str, float | str]) -> str:
    found = f"budget: {optimum['budget']}; predicted {optimum['measure']} {optimum['loss']:.3g}"
    return found + (f", at least {optimum['bound']:.3g} in any plan" if optimum["gap"] else ", the least of any plan")


def _expect(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GMError(f"in a plan, {what} must be of type {kind.__name__}, not {type(value).__name__}")
    return value


def _count(value: Any, what: str) -> int:
    if not 0 <= _expect(value, int, what) <= MAX_COUNT:
        raise GMError(f"in a plan, {what} must be from 0 to {MAX_COUNT}, not {shown(value)}")
    return value


def _optimum_from(value: Any) -> dict[str, float | str] | None:
    if value is None:
        return None
    kinds = {"budget": str, "measure": str, "loss": float, "bound": float, "gap": float}
    if set(_expect(value, dict, "optimum")) != set(kinds):
        raise GMError(f"in a plan, an optimum is an object with the fields {', '.join(kinds)}")
    found = {key: _expect(value[key], kind, key) for key, kind in kinds.items()}
    if not all(isfinite(found[key]) for key in ("loss", "bound", "gap")):
        raise GMError("in a plan, the loss, bound and gap of an optimum are finite")
    return found


def _strings(value: Any, what: str) -> dict[str, str]:
    found = _expect(value, dict, what)
    return {
        _expect(name, str, f"a name in {what}"): _expect(found[name], str, f"{what}[{shown(name)}]") for name in found
    }


def _site_from(value: Any) -> Site:
    names = [field.name for field in fields(Site)]
    value = {"taps": "", **_expect(value, dict, "a site")}  # which plans once had not
    if set(value) != set(names):
        raise GMError(f"in a plan, a site is an object with the fields {', '.join(names)}")
    shape = tuple(_count(each, "an entry of a shape") for each in _expect(value["shape"], list, "a shape"))
    if not 2 <= len(shape) <= 8 or min(shape) < 1 or prod(shape) > MAX_COUNT:
        raise GMError(f"in a plan, {shown(list(shape))} is not the shape of a weight")
    aliases = tuple(_expect(each, str, "an alias") for each in _expect(value["aliases"], list, "aliases"))
    calls = value["calls"] if value["calls"] is None else _count(value["calls"], "calls")
    texts: dict[str, Any] = {key: _expect(value[key], str, key) for key in ("name", "kind", "role", "obstacle", "taps")}
    conv_groups = _count(value["conv_groups"], "conv_groups")
    if conv_groups < 1 or shape[0] % conv_groups:
        raise GMError(f"in a plan, {shape[0]} rows cannot be in {conv_groups} convolution groups")
    counts: dict[str, Any] = {"conv_groups": conv_groups, "parameters": _count(value["parameters"], "parameters")}
    return Site(shape=shape, aliases=aliases, calls=calls, **texts, **counts)


def _literal(site: Site, structure: Structure) -> Structure:
    """The structure, once it is known to fit the site as it stands, separable kernels on the grid of its taps."""
    if structure.separable is not None:
        structure = Structure.kernels(structure.separable.on(site.taps))
    structure.shapes(site.shape)
    if structure.rows is not None and site.shape[0] // site.conv_groups % structure.rows.size:
        raise GMError(f"{structure} does not fit {site.name!r}: {site.shape[0]} rows in {site.conv_groups} groups")
    return structure


def choose(
    sites: Sequence[Site],
    group: str | Group,
    *,
    model_parameters: int,
    rank: int = 1,
    residual: str = "displacement",
    include: Rules = (),
    exclude: Rules = (),
    overrides: Mapping[Rule, Override] | None = None,
) -> Plan:
    """The literal plan: on every eligible layer the largest fitting quotient of `group` with a residual of this rank.

    Where the layer would not get smaller by that, the residual is of the largest rank with which it does, or left out.
    A low rank on a k×k convolution is taken of rows·ky × columns·kx, the taps split between the two sides.
    A rule is a glob on names ("layer3.*"), a regular expression on whole names ("re:.*conv[12]") or a module type.
    `exclude` goes first, then the first matching override, then `include`, which brings stem and classifier in.

    Raises:
        GMError: unknown group or residual, negative rank, a rule that matches nothing, or no layer left to compress.
    """
    bound = Structure.parse(group if isinstance(group, Group) else parse_group(group))
    default = bound.with_rank(rank, residual=residual)
    if bound.acting.order == 1:
        raise GMError("the trivial group C1 compresses nothing; give a larger one")
    rules = _Rules(sites, include, exclude, overrides or {})
    layers: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for site in sites:
        found = _structure_or_reason(site, default, rules)
        if isinstance(found, Structure):
            layers[site.name] = str(found)
        else:
            skipped[site.name] = found
    if not layers:
        raise GMError(f"no layer can be compressed with {group}: {_reasons(skipped)}")
    return Plan(str(bound.group), layers, skipped, tuple(sites), model_parameters)


@dataclass(frozen=True)
class Eligible:
    """What a plan under a budget may choose: sites in which it is free, prescribed structures, reasons for the rest."""

    free: tuple[Site, ...]
    prescribed: Mapping[str, Structure]
    skipped: Mapping[str, str]
    ties: tuple[tuple[str, ...], ...]


def eligible(
    sites: Sequence[Site],
    *,
    include: Rules = (),
    exclude: Rules = (),
    overrides: Mapping[Rule, Override] | None = None,
    ties: Sequence[Rules] = (),
) -> Eligible:
    """Sort the sites by the rules of `choose`; an override prescribes a layer's structure as it is written.

    Each entry of `ties` is one or several rules; the layers that match and have the same parent module and shape will
    get the same structure.

    Raises:
        GMError: a rule that matches nothing, a structure that does not fit, or no layer left to compress.
    """
    rules = _Rules(sites, include, exclude, overrides or {})
    free, prescribed, skipped = [], {}, {}
    for site in sites:
        reason = _left_out(site, rules)
        overriding = rules.first(rules.overrides, site)
        if reason:
            skipped[site.name] = reason
        elif overriding is not None:
            prescribed[site.name] = _literal(site, Structure.parse(rules.overrides[overriding] or ""))
        else:
            free.append(site)
    if not free and not prescribed:
        raise GMError(f"no layer can be compressed: {_reasons(skipped)}")
    return Eligible(tuple(free), prescribed, skipped, _tied(free, sites, ties))


def _tied(free: Sequence[Site], sites: Sequence[Site], ties: Sequence[Rules]) -> tuple[tuple[str, ...], ...]:
    found = []
    if isinstance(ties, str) or not isinstance(ties, Sequence):
        raise GMError(f"ties is a sequence of rules, or of sequences of rules, not {shown(ties)}")
    for each in ties:
        rules = _Rules(sites, each, (), {})
        groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for site in free:
            if rules.first(rules.include, site) is not None:
                groups.setdefault((site.name.rpartition(".")[0], site.shape), []).append(site.name)
        found += [tuple(names) for names in groups.values() if len(names) > 1]
    return tuple(found)


def _left_out(site: Site, rules: _Rules) -> str:
    """Why a site stays dense whatever the group or the budget; "" where it need not."""
    excluding = rules.first(rules.exclude, site)
    if excluding is not None:
        return f"excluded by {told(excluding)}"
    if site.obstacle:
        return site.obstacle
    overriding = rules.first(rules.overrides, site)
    if overriding is not None:
        return f"left dense by the override {told(overriding)}" if rules.overrides[overriding] is None else ""
    if site.role not in ("", TIED_HEAD) and rules.first(rules.include, site) is None:
        return f"it is the {site.role}, left dense unless include names it"
    return ""


def _reasons(skipped: Mapping[str, str]) -> str:
    shown = [f"{name or 'the model'}: {reason}" for name, reason in list(skipped.items())[:3]]
    more = f" (and {len(skipped) - 3} more)" if len(skipped) > 3 else ""
    return "; ".join(shown) + more if shown else "it holds no weight matrix"


class _Rules:
    """Include, exclude and overrides, each checked to match something."""

    def __init__(
        self, sites: Sequence[Site], include: Rules, exclude: Rules, overrides: Mapping[Rule, Override]
    ) -> None:
        if not isinstance(overrides, Mapping):
            raise GMError(f'overrides map rules to structures, as {{"fc": None}}, not {shown(overrides)}')
        self.include, self.exclude, self.overrides = listed(include), listed(exclude), dict(overrides)
        every = (*self.include, *self.exclude, *listed(list(overrides)))
        self._names = {rule: matching(rule, sites) for rule in every}

    def first(self, rules: Iterable[Rule], site: Site) -> Rule | None:
        """The first of these rules that names a site."""
        return next((rule for rule in rules if site.name in self._names[rule]), None)


def _structure_or_reason(site: Site, default: Structure, rules: _Rules) -> Structure | str:
    """The structure of one site, or the reason why it stays dense."""
    reason = _left_out(site, rules)
    if reason:
        return reason
    overriding = rules.first(rules.overrides, site)
    wanted, ranked = default, True  # ranked: the residual is the default one, not written out in an override
    if overriding is not None:
        value = rules.overrides[overriding]
        assert value is not None  # that one is left out
        wanted = Structure.parse(value)
        plain = isinstance(value, Group) or (isinstance(value, str) and "+" not in value)
        if plain and wanted.group is not None:
            ranks: dict[str, Any] = {"displacement": default.displacement, "lowrank": default.lowrank}
            wanted = Structure(wanted.group, wanted.rows, wanted.columns, wanted.taps, **ranks)
        else:
            ranked = False
    if ranked and wanted.lowrank and views_of(site.shape)[-1]:
        wanted = replace(wanted, split=True)  # nearer to trained kernels than rows × columns·taps, at fewer numbers
    return _fitted(site, wanted, ranked=ranked)


def _fitted(site: Site, wanted: Structure, *, ranked: bool) -> Structure | str:
    """The structure on the largest quotient that fits the widths (one with other sets is literal), or the reason.

    Where `ranked`, its residual is of a lower rank if only then it stores fewer numbers than the dense layer.
    """
    rows, columns = site.shape[0] // site.conv_groups, site.shape[1]
    ranks: dict[str, Any] = {key: getattr(wanted, key) for key in ("displacement", "lowrank", "split")}
    if wanted.group is not None and wanted.grid is None and wanted == Structure.regular(wanted.group, **ranks):
        quotient = largest_quotient(wanted.group, gcd(rows, columns))
        if quotient.order == 1:
            each = " in each convolution group" if site.conv_groups > 1 else ""
            return f"{rows} rows and {columns} columns{each} admit no quotient of {wanted.group} but the trivial one"
        wanted = Structure.regular(quotient, **ranks)
    try:
        wanted = _literal(site, wanted)
    except GMError as problem:
        return str(problem)
    dense, stored = prod(site.shape), wanted.parameters(site.shape)
    if stored >= dense and ranked:
        wanted = _of_lower_rank(wanted, site.shape)
        stored = wanted.parameters(site.shape)
    if stored >= dense:
        return f"{wanted} would store {stored:,} numbers, the dense layer {dense:,}"
    return wanted


def _of_lower_rank(wanted: Structure, shape: tuple[int, ...]) -> Structure:
    """The same group matrices with the residual of largest rank, or none, that stores fewer numbers than dense."""

    def ranked(rank: int) -> Structure:
        residual = "displacement" if wanted.displacement else "lowrank"
        return wanted.with_rank(rank, residual=residual, split=wanted.split and rank > 0)

    alone = ranked(0).parameters(shape)
    of_each_rank = ranked(1).parameters(shape) - alone
    return ranked(max(0, (prod(shape) - 1 - alone) // of_each_rank))
