"""The multiple-choice knapsack problem as arrays: one option for each unit, the least loss within limits on the costs.

Source: Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, chapter 11 (the multiple-choice knapsack problem).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from math import fsum, inf, isfinite
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import GMError

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

_SCALE = 1e4  # the solver stops at an absolute gap of 1e-6: at this scale that is 1e-10 of what is lost
_STDOUT = threading.Lock()  # the file descriptor belongs to all threads, so one at a time turns it aside


class Problem(NamedTuple):
    """The options of all units in one row; a choice is the position in this row of one option per unit.

    Losses and costs are what an option adds to the least of its unit, costs in multiples of their common divisor.
    """

    first: Indices  # (units,) where its options begin, the one of least loss in front
    owner: Indices  # (options,) the unit it serves
    loss: Floats  # (options,)
    costs: Indices  # (options, limits)
    room: Indices  # (limits,)

    def lost(self, chosen: Indices) -> float:
        return fsum(self.loss[chosen])

    def fits(self, chosen: Indices) -> bool:
        return bool((self.costs[chosen].sum(0) <= self.room).all())

    def cheapest(self, place: int) -> Indices:
        return np.lexsort((self.costs[:, place], self.owner))[self.first]

    def alike(self) -> list[Indices]:
        """The units in sets of those whose options lose and cost the same, which of them takes which is all one."""
        sets: dict[tuple[bytes, bytes], list[int]] = {}
        ends = [*self.first[1:], len(self.owner)]
        for unit, (start, end) in enumerate(zip(self.first, ends, strict=True)):
            sets.setdefault((self.loss[start:end].tobytes(), self.costs[start:end].tobytes()), []).append(unit)
        return [np.array(units, dtype=np.int64) for units in sets.values()]

    def sorted(self, chosen: Indices) -> Indices:
        """The same choice, where of units that are alike the earlier ones take the options of less loss."""
        local = chosen - self.first
        for units in self.alike():
            local[units] = np.sort(local[units])
        return self.first + local


def solve(problem: Problem, deadline: float) -> tuple[Indices | None, float]:
    """The best choice found, or None, and by how much at most another one loses less: 0 if it is proven the best.

    Of units that are alike the earlier ones take the options of less loss.
    """
    if problem.fits(problem.first):
        return problem.first, 0.0
    best, bound = _repaired(problem, problem.first), 0.0
    top = fsum(np.maximum.reduceat(problem.loss, problem.first))
    while best is None or problem.lost(best) > 0:
        top = top if best is None else problem.lost(best)
        found, low, optimal = _minimise(problem, top, deadline)
        bound = max(bound, low)
        repaired = None if found is None else _repaired(problem, found)
        if repaired is not None and (best is None or problem.lost(repaired) < problem.lost(best)):
            best = repaired
        if best is None or not (optimal and found is not None and problem.fits(found)):
            break
        if problem.lost(best) >= top / 100:  # else the scale was too coarse for so small a loss: once more
            return problem.sorted(best), 0.0
    if best is None:
        return None, inf
    _, relaxed, _ = _minimise(problem, top, inf, whole=False)
    return problem.sorted(best), max(0.0, problem.lost(best) - max(bound, relaxed))


def find_stuck(problem: Problem, deadline: float) -> tuple[int, Indices] | None:
    """The first limit that no choice meets beside those before it, and the nearest choice; None if unproven."""
    for place in range(1, len(problem.room)):
        order = np.lexsort((problem.costs[:, place], problem.owner))  # what is limited here is what is lost there
        costs = problem.costs[order]
        rest = problem._replace(loss=costs[:, place].astype(float), costs=costs[:, :place], room=problem.room[:place])
        chosen, missing = solve(rest, deadline)
        if chosen is not None and missing == 0 and costs[chosen, place].sum() > problem.room[place]:
            return place, order[chosen]
    return None


def _minimise(
    problem: Problem, top: float, deadline: float, *, whole: bool = True
) -> tuple[Indices | None, float, bool]:
    """The solver's choice, a lower bound of what is lost, and whether both agree; `whole=False`: fractions allowed.

    Units that are alike are one to the solver, which says how many of them take each option: to tell them apart would
    have it search through all their permutations. Options that alone lose more than `top` or do not fit are left out.
    Costs are scaled by powers of two, exactly.
    """
    if whole and time.monotonic() >= deadline:  # in no time the solver still does a little
        return None, 0.0, False
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise GMError("a choice under a budget needs the package 'scipy': pip install it") from None
    alike = problem.alike()
    options = [np.flatnonzero(problem.owner == units[0]) for units in alike]
    owner, places = np.repeat(np.arange(len(alike)), [len(each) for each in options]), np.concatenate(options)
    counts = np.array([len(units) for units in alike])
    loss, costs, size = problem.loss[places], problem.costs[places], len(places)
    useful = (loss <= top) & (costs <= problem.room).all(1)
    shifts = [max(0, int(each).bit_length() - 23) for each in problem.room]  # a tolerance of 1e-6 stays below one unit
    costs = np.ldexp(costs, [-each for each in shifts])
    each_once = sparse.csr_array((np.ones(size), (owner, np.arange(size))), shape=(len(alike), size))
    rows = [optimize.LinearConstraint(each_once, counts, counts)]
    if shifts:
        rows.append(optimize.LinearConstraint(costs.T, -np.inf, np.ldexp(problem.room, [-each for each in shifts])))
    settings = {"mip_rel_gap": 0.0} | ({"time_limit": max(0.0, deadline - time.monotonic())} if deadline < inf else {})
    with _silence():
        answer = optimize.milp(
            np.where(useful, loss / (top or 1.0), 0.0) * _SCALE,
            integrality=np.full(size, int(whole)),
            bounds=optimize.Bounds(0, np.where(useful, counts[owner], 0)),
            constraints=rows,
            options=settings,
        )
    low = answer.get("mip_dual_bound") if whole else answer.fun
    found = (
        None
        if answer.x is None
        else _told_apart(problem, alike, np.split(answer.x, np.cumsum([len(each) for each in options])[:-1]))
    )
    low = low / _SCALE * top if low is not None and isfinite(low) else 0.0
    return found, low, answer.status == 0


def _told_apart(problem: Problem, alike: list[Indices], taken: list[Floats]) -> Indices:
    """The choice in which of each set of units so many take each option; of fractions the largest are rounded up."""
    chosen = problem.first.copy()
    for units, shares in zip(alike, taken, strict=True):
        whole = np.floor(shares + 1e-6)
        missing = len(units) - int(whole.sum())
        whole[np.argsort(whole - shares, kind="stable")[: max(missing, 0)]] += 1
        chosen[units] += np.repeat(np.arange(len(shares)), whole.astype(np.int64))[: len(units)]
    return chosen


def _repaired(problem: Problem, chosen: Indices) -> Indices | None:
    """The choice made to fit by swaps of least loss per excess removed, or None; then improved by swaps."""
    chosen = chosen.copy()
    weight = 1 / np.maximum(1, np.maximum.reduceat(problem.costs, problem.first, axis=0).sum(0))
    while not problem.fits(chosen):
        used = problem.costs[chosen].sum(0)
        after = used + problem.costs - problem.costs[chosen][problem.owner]
        saved = (np.maximum(used - problem.room, 0) - np.maximum(after - problem.room, 0)) @ weight
        if not (useful := saved > weight.min() / 2).any():
            return None
        with np.errstate(all="ignore"):
            rate = np.where(useful, (problem.loss - problem.loss[chosen][problem.owner]) / saved, inf)
        chosen[problem.owner[rate.argmin()]] = rate.argmin()
    while True:  # a swap lowers what a unit loses, so this ends
        after = problem.costs[chosen].sum(0) + problem.costs - problem.costs[chosen][problem.owner]
        gain = problem.loss[chosen][problem.owner] - problem.loss
        gain[(after > problem.room).any(1)] = 0
        if gain.max() <= 0:
            return chosen
        chosen[problem.owner[gain.argmax()]] = gain.argmax()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Whatever native code writes to file descriptor 1 is discarded; Python's own buffer is not touched."""
    with _STDOUT:
        try:
            kept = os.dup(1)
        except OSError:  # closed, as in a daemon: nothing can be printed
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        _flush_native()  # what was printed before is not to be lost
        os.dup2(nowhere, 1)
        try:
            yield
        finally:
            _flush_native()  # what waits in the buffer of C would come out later
            os.dup2(kept, 1)
            os.close(kept)
            os.close(nowhere)


def _flush_native() -> None:
    with contextlib.suppress(OSError, TypeError, AttributeError):  # where C's library cannot be named: Windows
        ctypes.CDLL(None).fflush(None)
