"""Where the parameters go: the table of every layer's candidates, the model's sensitivity to each layer, the choice."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .budgets import Budget
from .candidates import candidates, offered
from .copies import device_of
from .errors import GMError
from .factors import Metric
from .groups import Group
from .notes import Notes
from .plain import is_plain
from .planning import Eligible, Plan
from .probes import Probe, Probes, Sensitivity
from .projection import exactness
from .reconstruction import Calibration, Seen
from .selection import Candidate, Selection, check_reachable, select
from .structure import Structure
from .subjects import Subject, priced, rank_within
from .surgery import Site, find_weight
from .workers import side_by_side

Progress = Callable[[str, int, int], None]


def subject_of(site: Site, weight: Tensor, metric: Metric, *, positions: int | None) -> Subject:
    """What the table needs to know of one layer."""
    exact = exactness(weight)
    return Subject(weight.to(exact), metric.to(exact), site.conv_groups, positions, weight.element_size(), site.taps)


def tabulate(
    dense: nn.Module,
    sites: Sequence[Site],
    group: Group | None,
    *,
    calibration: Calibration | None = None,
    positions: Mapping[str, int] | None = None,
    notes: Notes | None = None,
    progress: Progress | None = None,
    effort: float = 1.0,
) -> dict[str, list[Candidate]]:
    """For every site the candidates and their losses: weighted by sensitivity with data, relative squared without.

    `effort` multiplies what the fits may take.
    """
    notes, kind = notes or Notes(None, {}), "candidates" if effort == 1 else f"candidates-{effort:g}"
    by_name = {site.name: site for site in sites}
    found, probes = _kept(notes, kind, list(by_name))
    names = [name for name in by_name if name not in found]

    def work(one: Seen) -> tuple[list[Candidate], Probe | None]:
        rows = (positions or {}).get(one.name)
        return _examined(one, by_name[one.name], calibration, group, positions=rows, effort=effort)

    for chunk in [names] if calibration is None else _chunks(dense, names, calibration):
        known = calibration is not None and is_plain(dense, chunk[0])
        moments = calibration.moments(dense, dense, chunk) if calibration is not None and known else {}
        shapes = [by_name[name].shape for name in chunk]
        weights = (Seen.of(dense, name, moments.pop(name, None)) for name in chunk)
        examined = side_by_side(work, weights, shapes, device=device_of(dense))
        for name in chunk:
            if progress is not None:
                progress(name, len(found), len(sites))
            found[name], probe = next(examined)
            facts: dict[str, Any] = {"rows": [asdict(each) for each in found[name]]}
            tensors: dict[str, Tensor] = {}
            if probe is not None:
                probes[name] = probe
                facts["probe"], tensors = probe.notes()
            notes.write(kind, name, facts, tensors)
    if calibration is None:
        return {name: found[name] for name in by_name}
    measured = _sensitivities(dense, calibration, {name: probes[name] for name in by_name}, notes, kind)
    return {name: [measured[name].weigh(each) for each in found[name]] for name in by_name}


def _examined(
    one: Seen,
    site: Site,
    calibration: Calibration | None,
    group: Group | None,
    *,
    positions: int | None,
    effort: float,
) -> tuple[list[Candidate], Probe | None]:
    """The candidates of a layer, and with data the low ranks that stand for them where their effect is measured."""
    name, seen = one.name, one.moments
    metric = Metric() if calibration is None else calibration.metric(name, one.layer, seen)
    subject = subject_of(site, one.weight, metric, positions=positions)
    found = candidates(subject, _fitting(one.layer, group), effort=effort)
    if calibration is None:
        return found, None
    return found, Probe.of(subject, seen.mean if seen and calibration.absorbs(name, one.layer) else None)


def _kept(notes: Notes, kind: str, names: Iterable[str]) -> tuple[dict[str, list[Candidate]], dict[str, Probe]]:
    """The candidates and probes of the layers done already."""
    found, probes = {}, {}
    for name in names:
        kept = notes.read(kind, name)
        if kept is not None:
            found[name] = [Candidate(**row) for row in kept[0]["rows"]]
            if "probe" in kept[0]:
                probes[name] = Probe.from_notes(kept[0]["probe"], kept[1])
    return found, probes


def _sensitivities(
    dense: nn.Module, calibration: Calibration, probes: Mapping[str, Probe], notes: Notes, kind: str
) -> dict[str, Sensitivity]:
    """The model's sensitivity to every layer, by the notes or measured."""
    entry = f"sensitivities of {', '.join(probes)}"
    kept = notes.read(kind, entry)
    if kept is not None:
        return {name: Sensitivity(*each) for name, each in kept[0]["layers"].items()}
    found = Probes(dense, calibration, len(probes)).sensitivities(probes)
    notes.write(kind, entry, {"layers": {name: [each.scale, each.exponent] for name, each in found.items()}})
    return found


def _fitting(layer: nn.Module, group: Group | None) -> Group | None:
    """The group whose matrices a layer may become; none for a table, in which the order of the rows means nothing."""
    return None if isinstance(layer, nn.Embedding | nn.EmbeddingBag) else group


def _chunks(dense: nn.Module, names: Sequence[str], calibration: Calibration) -> list[list[str]]:
    """Layers whose moments are collected in one pass, and first, where there are any, all that have none."""
    plain = [name for name in names if is_plain(dense, name)]
    others = [name for name in names if name not in plain]
    return ([others] if others else []) + calibration.chunks(dense, plain, passes=1)


@dataclass(frozen=True)
class Table:
    """Everything that a choice under a budget depends on; plans for any number of budgets follow from one table.

    `totals` are those of the dense model: params, bytes and, where it was run, macs. `itemsizes` are the bytes of a
    number of each layer that may change, free or prescribed; they differ in a model of several dtypes.
    """

    eligible: Eligible
    sites: Sequence[Site]
    candidates: Mapping[str, Sequence[Candidate]]  # of the free layers
    group: str
    totals: Mapping[str, int]
    positions: Mapping[str, int] | None
    itemsizes: Mapping[str, int]
    calibrated: bool

    @cached_property
    def named(self) -> dict[str, Site]:
        """The sites by name."""
        return {site.name: site for site in self.sites}

    def whole(self) -> dict[str, list[Candidate]]:
        """The candidates of the free layers, and of the prescribed ones the single one that each has."""
        full = {name: list(each) for name, each in self.candidates.items()}
        for name, structure in self.eligible.prescribed.items():
            full[name] = self.priced(name, [structure])
        return full

    def priced(self, name: str, structures: Iterable[Structure | None]) -> list[Candidate]:
        """Structures, None for dense, in place of a layer, with their costs and no loss."""
        site = self.named[name]
        positions = None if self.positions is None else self.positions.get(name, 0)
        facts: dict[str, Any] = {"conv_groups": site.conv_groups, "itemsize": self.itemsizes[name]}
        return [priced(each, site.shape, 0.0, positions=positions, **facts) for each in structures]

    def limits(self, budgets: Sequence[Budget]) -> dict[str, int]:
        """The budgets as counts, by what they limit.

        Raises:
            GMError: one on multiply-adds where no inputs were given.
        """
        for budget in budgets:
            if budget.what not in self.totals:
                raise GMError(f"{budget}: multiply-adds are counted from a run, so give example inputs or data")
        return {budget.what: budget.absolute(self.totals[budget.what]) for budget in budgets}

    def fixed(self) -> dict[str, int]:
        """The costs of what no choice changes."""
        names = list(self.itemsizes)
        dense = {name: math.prod(self.named[name].shape) for name in names}
        found = {
            "params": self.totals["params"] - sum(dense.values()),
            "bytes": self.totals["bytes"] - sum(self.itemsizes[name] * dense[name] for name in names),
        }
        if "macs" in self.totals:
            positions = self.positions or {}
            found["macs"] = self.totals["macs"] - sum(positions.get(name, 0) * dense[name] for name in names)
        return found


def check_budgets(table: Table, dense: nn.Module, group: Group | None, budgets: Sequence[Budget]) -> None:
    """Refuse budgets that no choice can meet, as the shapes alone tell; the table needs no candidates for that.

    Where adapted bases may be smaller than all else by the rounding of ranks, the size told leaves them out, for it is
    not known before the fits which of them there will be.

    Raises:
        GMError: as `allocate`.
    """
    limits = table.limits(budgets)
    facts: dict[str, Any] = {"fixed_costs": table.fixed(), "totals": table.totals, "ties": table.eligible.ties}

    def check(*, grids: bool) -> None:
        known: dict[str, list[Candidate]] = {}
        for site in table.eligible.free:
            own = _fitting(find_weight(dense, site.name)[0], group)
            found = offered(site.shape, own, conv_groups=site.conv_groups, grids=grids, taps=site.taps)
            known[site.name] = table.priced(site.name, found)
        check_reachable(replace(table, candidates=known).whole(), limits, **facts)

    try:
        check(grids=True)
    except GMError:
        check(grids=False)  # which offers less, so that it raises too


def allocate(table: Table, budgets: Sequence[Budget]) -> Plan:
    """The plan of least predicted loss within the budgets, the rounding left by the table's sizes spent on ranks.

    Raises:
        GMError: the budgets cannot be reached, or one on multiply-adds where no inputs were given.
    """
    full, fixed, limits = table.whole(), table.fixed(), table.limits(budgets)
    ties = table.eligible.ties
    chosen = select(full, limits, fixed_costs=fixed, totals=table.totals, ties=ties)
    picked = {name: full[name][index].structure for name, index in chosen.choice.items()}
    structures = {name: None if text is None else Structure.parse(text) for name, text in picked.items()}
    held = [*table.eligible.prescribed, *(name for names in ties for name in names)]
    room = {kind: limit - fixed[kind] - chosen.costs[kind] for kind, limit in limits.items()}
    structures = fill(structures, table, room, fixed=held)
    return _plan(table, structures, chosen, budgets)


def _plan(
    table: Table, structures: Mapping[str, Structure | None], chosen: Selection, budgets: Sequence[Budget]
) -> Plan:
    layers = {site.name: str(structures[site.name]) for site in table.sites if structures.get(site.name) is not None}
    kept = {name: "dense is its best use of the budget" for name, each in structures.items() if each is None}
    optimum: dict[str, float | str] = {
        "budget": ", ".join(map(str, budgets)),
        "measure": "divergence of the outputs" if table.calibrated else "squared relative error",
        "loss": chosen.loss,
        "bound": chosen.bound,
        "gap": chosen.gap,
    }
    reasons = {**table.eligible.skipped, **kept}
    skipped = {site.name: reasons[site.name] for site in table.sites if site.name not in layers}
    return Plan(table.group, layers, skipped, tuple(table.sites), table.totals["params"], optimum)


def fill(
    chosen: Mapping[str, Structure | None],
    table: Table,
    room: Mapping[str, int],  # what is left, by the kind of cost that is limited
    *,
    fixed: Sequence[str] = (),  # layers that keep the rank they have
) -> dict[str, Structure | None]:
    """The choice with ranks raised as long as all that is limited has room, the most loss spared for it first.

    The table offers a ladder of sizes; between its rungs the loss still falls with every rank.
    """
    found, left = dict(chosen), dict(room)
    ranked = {
        name: structure
        for name, structure in chosen.items()
        if name not in fixed and structure is not None and structure.group is None and structure.lowrank
    }
    slopes = {name: _slope(table.candidates[name], str(structure), room) for name, structure in ranked.items()}
    for name in sorted(ranked, key=lambda each: -slopes[each]):
        found[name], spent = _raised(table, name, ranked[name], left)
        left = {kind: left[kind] - spent[kind] for kind in left}
    return found


def _raised(table: Table, name: str, structure: Structure, room: Mapping[str, int]) -> tuple[Structure, dict[str, int]]:
    """A layer's structure with the largest rank up to the next rung that there is room for, and what that takes."""
    shape, low = table.named[name].shape, structure.lowrank
    family: dict[str, Any] = {"grid": structure.grid, "split": structure.split}
    most = min(rank_within(shape, math.prod(shape) - 1, **family), _next_rank(table.candidates[name], structure))
    (had,) = table.priced(name, [structure])

    def spent(rank: int) -> dict[str, int]:
        (more,) = table.priced(name, [Structure.factors(rank, **family)])
        return {kind: getattr(more, kind) - getattr(had, kind) for kind in room}

    def too_large(rank: int) -> bool:
        return any(taken > room[kind] for kind, taken in spent(rank).items())

    rank = low + bisect_left(range(low + 1, most + 1), True, key=too_large)
    return Structure.factors(rank, **family), spent(rank)


def _rungs(table: Sequence[Candidate], structure: Structure) -> list[tuple[Structure, Candidate]]:
    """The candidates of the same family, by rank."""
    parsed = [(Structure.parse(each.structure), each) for each in table if each.structure]
    same = [(s, c) for s, c in parsed if s.group is None and (s.grid, s.split) == (structure.grid, structure.split)]
    return sorted(same, key=lambda pair: pair[0].lowrank)


def _next_rank(table: Sequence[Candidate], structure: Structure) -> int:
    """The rank of the rung above, which the choice did not find worth its size; without one any rank will do."""
    above = [s.lowrank for s, _ in _rungs(table, structure) if s.lowrank > structure.lowrank]
    return min(above, default=1 << 30)


def _slope(table: Sequence[Candidate], chosen: str, room: Mapping[str, int]) -> float:
    """Loss saved for the whole room, from the chosen candidate to the larger one that saves most for what it takes."""
    own = next((each for each in table if each.structure == chosen), None)
    if own is None:
        return 0.0
    shares = {
        each: max((getattr(each, kind) - getattr(own, kind)) / max(1, room[kind]) for kind in room) for each in table
    }
    return max(((own.loss - each.loss) / share for each, share in shares.items() if share > 0), default=0.0)
