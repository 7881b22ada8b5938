"""Which candidate each layer takes under a budget: a pure function of a table of costs and losses.

A knapsack problem with one choice per layer: the least sum of losses within the limits on the sums of costs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, inf, isfinite
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from .budgets import KINDS, check_kind
from .errors import GMError, nearest_names
from .knapsack import Indices, Problem, find_stuck, solve
from .tables import percent

_LARGEST = 1 << 50  # so that thousands of counts add up within an int64


@dataclass(frozen=True)
class Candidate:
    """One possibility for one layer: what it would cost and what it would lose. The structure None keeps it dense.

    `macs` is None where the multiply-adds are not known. Losses are added over the layers.

    >>> Candidate("C4", params=16, bytes=64, macs=None, loss=0.5).structure
    'C4'
    """

    structure: str | None
    params: int
    bytes: int
    macs: int | None
    loss: float


def undominated(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates than which no other is at most as large in every cost and at most as lossy, by size."""
    kept: list[Candidate] = []
    for each in sorted(found, key=lambda c: (c.params, c.loss, c.macs or 0)):
        if not any(beats(k, each) for k in kept):
            kept.append(each)
    return kept


def beats(one: Candidate, other: Candidate) -> bool:
    """Whether one candidate is at most as large as another in every cost and at most as lossy."""
    return one.params <= other.params and one.loss <= other.loss and (one.macs or 0) <= (other.macs or 0)


@dataclass(frozen=True)
class Selection:
    """The candidate of every layer, as its position in the table, and what all of them cost and lose together.

    `costs` are those of the layers in the table alone; without multiply-adds if one of the chosen has no count. No
    choice within the limits loses less than `bound`. `gap` is (loss - bound) / loss: 0 where the choice is the best
    there is, to about ten digits of the loss, more where the time ran out before that was proven.
    """

    choice: Mapping[str, int]
    loss: float
    costs: Mapping[str, int]
    bound: float
    gap: float


class _Option(NamedTuple):
    """One way to serve the layers of a unit: a candidate for each, their summed costs under the limits and loss."""

    picks: tuple[int, ...]
    costs: tuple[int, ...]
    loss: float


class _Unit(NamedTuple):
    """Layers that are tied together, or one alone, with the options no other one beats, the least loss first."""

    layers: tuple[str, ...]
    options: list[_Option]


def select(
    table: Mapping[str, Sequence[Candidate]],
    limits: Mapping[str, int],
    *,
    fixed_costs: Mapping[str, int] | None = None,
    totals: Mapping[str, int] | None = None,
    ties: Sequence[Sequence[str]] = (),
    time_limit: float = 30.0,
) -> Selection:
    """The least sum of losses with, for each kind of cost in `limits`, fixed costs + costs of the candidates <= limit.

    `fixed_costs` are those of everything outside the table; `totals`, those of the whole dense model, only serve the
    messages. Tied layers take the same structure, one that all of them offer; of layers whose candidates cost and lose
    the same, those that come earlier in the table lose less. After `time_limit` seconds it is the best
    choice so far, with its gap. While the solver runs, the standard output of the whole process is discarded.

    Raises:
        GMError: a malformed table, limit or tie; limits that no choice meets, with the smallest total there is.

    >>> table = {
    ...     "a": [Candidate(None, 64, 256, None, 0.0), Candidate("C4", 16, 64, None, 1.0)],
    ...     "b": [Candidate(None, 64, 256, None, 0.0), Candidate("C8", 8, 32, None, 3.0)],
    ... }
    >>> select(table, {"params": 100}).choice
    {'a': 1, 'b': 0}
    >>> select(table, {"params": 50}, fixed_costs={"params": 30})
    Traceback (most recent call last):
    gmcompress.errors.GMError: at most 50 parameters cannot be reached: the smallest possible is 54. Of these, 30 lie
    outside the layers to choose for; the largest inside are 'a' 16, 'b' 8
    """
    if not time_limit >= 0:
        raise GMError(f"time_limit is a number of seconds of at least 0, not {time_limit!r}")
    deadline = time.monotonic() + time_limit
    limits, fixed = _check_costs("limits", limits), _check_costs("fixed_costs", fixed_costs or {})
    totals = _check_costs("totals", totals or {})
    _check_table(table, limits)
    units, problem = _posed(table, limits, fixed, totals, ties)
    chosen, missing = solve(problem, deadline)
    if chosen is not None:
        return _selection(table, _choice(units, chosen - problem.first), missing)
    _check_exclusive(table, units, problem, deadline, limits, fixed, totals)
    raise GMError(f"no choice within {_phrase(limits)} was found in {time_limit:g} s; raise one or the other")


def check_reachable(
    table: Mapping[str, Sequence[Candidate]],
    limits: Mapping[str, int],
    *,
    fixed_costs: Mapping[str, int] | None = None,
    totals: Mapping[str, int] | None = None,
    ties: Sequence[Sequence[str]] = (),
    time_limit: float = 30.0,
) -> None:
    """Refuse limits that no choice meets, whatever the candidates lose, as far as that is found out in the time.

    Raises:
        GMError: as `select`, but that no choice was found in time.
    """
    deadline = time.monotonic() + time_limit
    limits, fixed = _check_costs("limits", limits), _check_costs("fixed_costs", fixed_costs or {})
    totals = _check_costs("totals", totals or {})
    _check_table(table, limits)
    units, problem = _posed(table, limits, fixed, totals, ties)
    problem = problem._replace(loss=np.zeros_like(problem.loss))
    if len(limits) > 1 and solve(problem, deadline)[0] is None:
        _check_exclusive(table, units, problem, deadline, limits, fixed, totals)


def sweep(
    table: Mapping[str, Sequence[Candidate]],
    limits_list: Sequence[Mapping[str, int]],
    *,
    fixed_costs: Mapping[str, int] | None = None,
    totals: Mapping[str, int] | None = None,
    ties: Sequence[Sequence[str]] = (),
    time_limit: float = 30.0,
) -> list[Selection]:
    """One selection for each of the limits, in their order, `time_limit` seconds each; otherwise as `select`.

    A larger budget never loses more: where the time ran out, it takes the better choice of a smaller one.

    Raises:
        GMError: as `select`, for the first of the limits that cannot be met.

    >>> table = {"a": [Candidate(None, 64, 256, None, 0.0), Candidate("C4", 16, 64, None, 1.0)]}
    >>> [each.loss for each in sweep(table, [{"params": 20}, {"params": 80}])]
    [1.0, 0.0]
    """
    fixed = fixed_costs or {}
    options: dict[str, Any] = {"fixed_costs": fixed, "totals": totals, "ties": ties, "time_limit": time_limit}
    found = [select(table, limits, **options) for limits in limits_list]
    best_first = sorted(found, key=lambda each: each.loss)
    swept = []
    for limits, own in zip(limits_list, found, strict=True):
        left = {kind: limit - fixed.get(kind, 0) for kind, limit in limits.items()}
        best = next(each for each in best_first if all(each.costs[kind] <= left[kind] for kind in left))
        bound = min(own.bound, best.loss)
        swept.append(own if best is own else replace(best, bound=bound, gap=_gap(best.loss, bound)))
    return swept


def _posed(
    table: Mapping[str, Sequence[Candidate]],
    limits: Mapping[str, int],
    fixed: Mapping[str, int],
    totals: Mapping[str, int],
    ties: Sequence[Sequence[str]],
) -> tuple[list[_Unit], Problem]:
    """What is to be solved, once each of the limits alone can be met."""
    units = [_unit(layers, table, tuple(limits)) for layers in _tied(table, ties)]
    problem = _flatten(units, [limit - fixed.get(kind, 0) for kind, limit in limits.items()])
    for place, kind in enumerate(limits):
        smallest = _taken(table, _choice(units, problem.cheapest(place) - problem.first), kind)
        if fixed.get(kind, 0) + sum(smallest.values()) > limits[kind]:
            raise _unreachable(kind, smallest, limits, fixed, totals)
    return units, problem


def _tied(table: Mapping[str, Sequence[Candidate]], ties: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The layers in groups that choose together, in the order of the table; ties that share a layer are one."""
    group: dict[str, tuple[str, ...]] = {name: (name,) for name in table}
    for tie in ties:
        for name in tie:
            if name not in group:
                raise GMError(f"a tie names {name!r}, not in the table; the nearest are {nearest_names(name, table)}")
        joined = {each for name in tie for each in group[name]}
        merged = tuple(name for name in table if name in joined)
        group |= dict.fromkeys(merged, merged)
    return list(dict.fromkeys(group.values()))


def _unit(layers: tuple[str, ...], table: Mapping[str, Sequence[Candidate]], kinds: Sequence[str]) -> _Unit:
    """The options these layers share but those no better than another in loss or any limited cost, then the others."""
    offered = [_numbered(table[name]) for name in layers]
    shared = [key for key in offered[0] if all(key in each for each in offered)]
    if not shared:
        kept = "; ".join(f"{name!r} offers {', '.join(str(each.structure) for each in table[name])}" for name in layers)
        raise GMError(f"layers that are tied together take the same structure, but these share none: {kept}")
    ranked = []
    for key in shared:
        picks = tuple(each[key] for each in offered)
        taken = [table[name][index] for name, index in zip(layers, picks, strict=True)]
        costs = tuple(sum(int(getattr(each, kind)) for each in taken) for kind in kinds)
        others = tuple(sum(int(getattr(each, kind) or 0) for each in taken) for kind in KINDS)
        option = _Option(picks, costs, fsum(each.loss for each in taken))
        ranked.append((option.loss, costs, others, picks, option))
    options: list[_Option] = []
    for *_, option in sorted(ranked):
        if not any(all(a <= b for a, b in zip(kept.costs, option.costs, strict=True)) for kept in options):
            options.append(option)
    return _Unit(layers, options)


def _numbered(candidates: Sequence[Candidate]) -> dict[tuple[str | None, int], int]:
    """(structure, how often it came before) -> position."""
    names = [each.structure for each in candidates]
    return {(name, names[:position].count(name)): position for position, name in enumerate(names)}


def _flatten(units: Sequence[_Unit], room: Sequence[int]) -> Problem:
    """The options of all units, where `room` is what the limits leave to them."""
    sizes = [len(unit.options) for unit in units]
    owner = np.repeat(np.arange(len(units)), sizes)
    first = np.cumsum([0, *sizes[:-1]])
    loss = np.array([option.loss for unit in units for option in unit.options])
    costs = np.array([option.costs for unit in units for option in unit.options], dtype=np.int64)
    costs = costs.reshape(len(owner), len(room))
    least = np.minimum.reduceat(costs, first, axis=0)
    costs = costs - least[owner]
    divisor = np.maximum(1, np.gcd.reduce(costs, axis=0))
    costs //= divisor
    largest = np.maximum.reduceat(costs, first, axis=0).sum(0)
    left = [(limit - int(base)) // int(step) for limit, base, step in zip(room, least.sum(0), divisor, strict=True)]
    bounded = np.array([min(a, int(b)) for a, b in zip(left, largest, strict=True)], dtype=np.int64)
    return Problem(first, owner, loss - loss[first][owner], costs, bounded)


def _choice(units: Sequence[_Unit], taken: Indices) -> dict[str, int]:
    """Layer -> position in the table, for the option taken in every unit."""
    picks = [(unit, unit.options[index].picks) for unit, index in zip(units, taken, strict=True)]
    return {name: index for unit, each in picks for name, index in zip(unit.layers, each, strict=True)}


def _taken(table: Mapping[str, Sequence[Candidate]], choice: Mapping[str, int], kind: str) -> dict[str, int]:
    """Layer -> its cost under a choice, in the order of the table."""
    return {name: int(getattr(table[name][choice[name]], kind)) for name in table}


def _selection(table: Mapping[str, Sequence[Candidate]], choice: Mapping[str, int], missing: float) -> Selection:
    taken = {name: table[name][choice[name]] for name in table}
    known = [kind for kind in KINDS if all(getattr(each, kind) is not None for each in taken.values())]
    costs = {kind: sum(_taken(table, choice, kind).values()) for kind in known}
    loss = fsum(each.loss for each in taken.values())
    bound = max(0.0, loss - missing)
    return Selection({name: choice[name] for name in table}, loss, costs, bound, _gap(loss, bound))


def _gap(loss: float, bound: float) -> float:
    return (loss - bound) / loss if loss > bound else 0.0


def _is_count(value: object, *, largest: float = inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) <= largest


def _check_costs(what: str, costs: Mapping[str, int]) -> dict[str, int]:
    for kind, value in costs.items():
        check_kind(kind)
        if not _is_count(value):
            raise GMError(f"{what}: the {KINDS[kind]} are a whole number of at least 0, not {value!r}")
    return {kind: int(value) for kind, value in costs.items()}


def _check_table(table: Mapping[str, Sequence[Candidate]], limits: Mapping[str, int]) -> None:
    if not table:
        raise GMError("there is no layer to choose for: the table is empty")
    for name, candidates in table.items():
        if not candidates:
            raise GMError(f"layer {name!r} has no candidates; offer at least the dense layer, structure None")
        for each in candidates:
            where = f"layer {name!r}, candidate {each.structure or 'dense'}"
            if not (isfinite(each.loss) and each.loss >= 0):
                raise GMError(f"{where}: a loss is a finite number of at least 0, not {each.loss!r}")
            if each.macs is None and "macs" in limits:
                raise GMError(f"{where}: the multiply-adds are limited but not known; they need example inputs")
            for kind in KINDS:
                value = getattr(each, kind)
                if not _is_count(value, largest=_LARGEST) and (kind, value) != ("macs", None):
                    raise GMError(f"{where}: the {KINDS[kind]} are a whole number from 0 to 2^50, not {value!r}")


def _phrase(limits: Mapping[str, int]) -> str:
    return " and ".join(f"{limit:,} {KINDS[kind]}" for kind, limit in limits.items())


def _check_exclusive(
    table: Mapping[str, Sequence[Candidate]],
    units: Sequence[_Unit],
    problem: Problem,
    deadline: float,
    limits: Mapping[str, int],
    fixed: Mapping[str, int],
    totals: Mapping[str, int],
) -> None:
    """Refuse a limit that cannot be met together with those before it, where that is found out in time."""
    stuck = find_stuck(problem, deadline)
    if stuck is None:
        return
    place, nearest = stuck
    kind, beside = list(limits)[place], list(limits)[:place]
    smallest = _taken(table, _choice(units, nearest - problem.first), kind)
    raise _unreachable(kind, smallest, limits, fixed, totals, beside=beside)


def _unreachable(
    kind: str,
    smallest: Mapping[str, int],  # layer -> cost
    limits: Mapping[str, int],
    fixed: Mapping[str, int],
    totals: Mapping[str, int],
    *,
    beside: Sequence[str] = (),
) -> GMError:
    """What cannot be reached, the smallest total there is, and what it consists of."""

    def share(count: int) -> str:
        return f" ({percent(count, totals[kind])})" if totals.get(kind) else ""

    outside, limit = fixed.get(kind, 0), limits[kind]
    least = outside + sum(smallest.values())
    together = f" together with at most {_phrase({each: limits[each] for each in beside})}" if beside else ""
    order = sorted((name for name in smallest if smallest[name]), key=lambda name: -smallest[name])
    largest = ", ".join(f"{name!r} {smallest[name]:,}" for name in order[:3]) or "none"
    where = " or in such as no structure makes cheaper to apply" if kind == "macs" else ""
    return GMError(
        f"at most {limit:,} {KINDS[kind]}{share(limit)} cannot be reached{together}: the smallest possible is "
        f"{least:,}{share(least)}. Of these, {outside:,}{share(outside)} lie outside the layers to choose for{where}; "
        f"the largest inside are {largest}"
    )
