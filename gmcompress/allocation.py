"""Where the parameters go: the table of every layer's candidates, the model's sensitivity to each layer, the choice."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .batches import first_examples
from .budgets import Budget
from .calibration import divergence, outputs
from .candidates import Subject, candidates, offered, priced, rank_within
from .errors import GMError
from .factors import Metric, views_of
from .groups import Group
from .moments import Moments
from .notes import Notes
from .plain import is_plain
from .planning import Eligible, Plan
from .projection import exactness
from .reconstruction import Calibration, absorb
from .selection import Candidate, Selection, check_reachable, select
from .structure import Structure, expand
from .surgery import Site, find_weight, read_weight, write_weight

PROBES = (0.45, 0.18)  # shares of a layer's weight at which the model's sensitivity to it is measured
WORK = 1.5e12  # multiply-adds spent on measuring sensitivities
FEWEST = 8  # examples on which they are measured in any case
EXPONENTS = (0.5, 2.0)  # between which the growth of the divergence with the loss is believed

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """The divergence of the model's outputs when one layer alone loses `loss`: scale × loss^exponent."""

    scale: float
    exponent: float

    def weigh(self, candidate: Candidate) -> Candidate:
        """The candidate with its loss as the divergence that it is expected to cause."""
        lost = self.scale * candidate.loss**self.exponent if candidate.loss > 0 else 0.0
        return replace(candidate, loss=lost)

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Sensitivity:
        """The power law through two measured (loss, divergence), the exponent kept within EXPONENTS.

        >>> Sensitivity.through([(0.1, 0.01), (0.4, 0.04)])
        Sensitivity(scale=0.1, exponent=1.0)
        """
        tiny = 1e-12
        (x0, y0), (x1, y1) = ((max(x, tiny), max(y, tiny)) for x, y in sorted(points))
        slope = math.log(y1 / y0) / math.log(x1 / x0) if x1 > x0 * 1.01 else 1.0
        exponent = round(min(max(slope, EXPONENTS[0]), EXPONENTS[1]), 6)
        scale = math.sqrt(y0 / x0**exponent * (y1 / x1**exponent))
        return cls(float(f"{scale:.6g}"), exponent)


def subject_of(site: Site, weight: Tensor, metric: Metric, *, positions: int | None) -> Subject:
    """What the table needs to know of one layer."""
    exact = exactness(weight)
    return Subject(weight.to(exact), metric.to(exact), site.conv_groups, positions, weight.element_size())


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
    notes, kind = notes or Notes(None, {}), "table" if effort == 1 else f"table-{effort:g}"
    by_name = {site.name: site for site in sites}
    kept = {name: notes.read(kind, name) for name in by_name}
    found = {name: [Candidate(**row) for row in each[0]["rows"]] for name, each in kept.items() if each}
    names = [name for name in by_name if name not in found]
    chunks = [names] if calibration is None else _chunks(dense, names, calibration)
    probes = None
    for chunk in chunks:
        known = calibration is not None and is_plain(dense, chunk[0])
        moments = calibration.moments(dense, dense, chunk) if calibration is not None and known else {}
        if calibration is not None and probes is None:
            probes = Probes(dense, calibration, len(sites))
        for name in chunk:
            if progress is not None:
                progress(name, len(found), len(sites))
            layer, seen, weight = find_weight(dense, name)[0], moments.pop(name, None), read_weight(dense, name)
            assert weight is not None, "only matrices are planned"
            metric = Metric() if calibration is None else calibration.metric(name, layer, seen)
            subject = subject_of(by_name[name], weight, metric, positions=(positions or {}).get(name))
            found[name] = candidates(subject, _fitting(dense, name, group), effort=effort)
            if probes is not None:
                sensitivity = probes.measure(name, subject, seen)
                found[name] = [sensitivity.weigh(each) for each in found[name]]
            notes.write(kind, name, {"rows": [asdict(each) for each in found[name]]})
    return {name: found[name] for name in by_name}


def _fitting(dense: nn.Module, name: str, group: Group | None) -> Group | None:
    """The group whose matrices a layer may become; none for a table, in which the order of the rows means nothing."""
    return None if isinstance(find_weight(dense, name)[0], nn.Embedding | nn.EmbeddingBag) else group


def _chunks(dense: nn.Module, names: Sequence[str], calibration: Calibration) -> list[list[str]]:
    """Layers whose moments are collected in one pass, and first, where there are any, all that have none."""
    plain = [name for name in names if is_plain(dense, name)]
    others = [name for name in names if name not in plain]
    return ([others] if others else []) + calibration.chunks(dense, plain, passes=1)


class Probes:
    """Measures how the model's outputs change when one layer alone is replaced."""

    def __init__(self, dense: nn.Module, calibration: Calibration, layers: int) -> None:
        self.dense, self.calibration = dense, calibration
        examples = int(WORK / max(1, len(PROBES) * layers * calibration.macs))
        self.batches = first_examples(calibration.batches, max(FEWEST, examples))
        self.wanted = outputs(dense, self.batches)

    def measure(self, name: str, subject: Subject, moments: Moments | None) -> Sensitivity:
        """The sensitivity to one layer, from low ranks of two sizes in its place; all is put back.

        As in a compression, what they shift the mean output by is taken out of the bias. The mean of a BatchNorm is
        left: a ResNet-20 at a quarter of its size came out at 88.7 % so, at 88.2 % with it moved, which is not much
        more than such runs differ by.
        """
        weight = read_weight(self.dense, name)
        assert weight is not None, "only matrices are planned"
        points, split = [], views_of(weight.shape)[-1]
        for share in PROBES:
            rank = max(1, rank_within(weight.shape, int(share * weight.numel()), grid=None, split=split))
            tensors = subject.low_ranks(rank, split=split).leading(rank)
            fitted = expand(tensors, Structure.factors(rank, split=split), weight.shape)
            points.append((subject.low_rank_loss(rank, split=split), self._away(name, weight.clone(), fitted, moments)))
        return Sensitivity.through(points)

    def _away(self, name: str, weight: Tensor, fitted: Tensor, moments: Moments | None) -> float:
        """How far the outputs lie from the dense model's with another weight in a layer, and the bias for it."""
        layer = find_weight(self.dense, name)[0]
        bias, _ = self.calibration.absorbed(name, layer, self.dense, fitted, moments)
        before = None if bias is None else layer.get_parameter("bias").detach().clone()
        try:
            write_weight(self.dense, name, fitted)
            absorb(self.dense, name, bias, None)
            return divergence(self.wanted, outputs(self.dense, self.batches), logits=self.calibration.logits)
        finally:
            write_weight(self.dense, name, weight)
            absorb(self.dense, name, before, None)


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
            own = _fitting(dense, site.name, group)
            found = offered(site.shape, own, conv_groups=site.conv_groups, grids=grids)
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
