"""What adapted bases of every size would lose: fitted at some sizes, and at others as these tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod

import torch

from . import subjects
from .factors import Tensors, start_factors, views_of
from .fitting import OVERHEAD, refine, step_cost
from .selection import Candidate, undominated
from .structure import Structure, expand
from .subjects import Subject, ladder, rank_within

GRIDS = (4, 8, 16)  # blocks along each side of an adapted basis
ANCHOR = 0.33  # the share at which the grids of a layer are compared
STEPS = 100  # of every fit; three times as many where the weight is small
SMALL = 1 << 14  # numbers of a weight up to which fits cost next to nothing
TINIEST = 1 << 10  # and up to which all sizes are fitted
EASY = 0.35  # of the numbers of a weight; fits that store more take longer, as a power of the share
LAST = 0.7  # beyond, fits take too long to arrive, and the loss follows a power of what is not stored,
FLATTER = 0.75  # with an exponent so many times that between the last two fits
EFFORT = {True: 1e11, False: 2e10}  # multiply-adds for a layer's table, with data and without, that fits may take
ANCHORS = {0.25: 1, 0.48: 2, 0.7: 4}  # where they would take more, adapted bases are fitted at these shares only, each
ANCHOR_EFFORT = {True: 1.5e10, False: 1.5e9}  # with so many times these multiply-adds: larger ones arrive later
ANCHOR_STEPS = 50  # that this must allow, else each gets it once: fewer would tell little more of a huge weight
TINY = 1e-30  # stands for a loss of zero in logarithms


def adapted_bases(subject: Subject, lower: Sequence[Candidate], *, effort: float) -> list[Candidate]:
    """Adapted bases of every size offered, on the grid of blocks that suits a weight, beside its low ranks."""
    split = views_of(subject.shape)[-1]
    few = _cost(subject) > EFFORT[subject.metric.inputs is not None]
    fitted = (_few_fits if few else _fits)(subject, split=split, effort=effort)
    return _completed(subject, lower, fitted) if fitted else []


def _cost(subject: Subject) -> float:
    """Multiply-adds, about, of the fits behind one layer's table."""
    rank = min(subject.shape[0], prod(subject.shape[1:])) / 3
    product = 8 * subject.weight.numel() * rank
    product += 0 if subject.metric.inputs is None else subject.weight.numel() * prod(subject.shape[1:])
    return (product + OVERHEAD) * STEPS * (len(subjects.SHARES) + 2 * len(GRIDS))


def _fits(subject: Subject, *, split: bool, effort: float) -> dict[Structure, float]:
    """Adapted bases on the best of the grids, with the losses of their fits at many sizes."""
    limit, chains = subject.weight.numel(), []
    steps = max(1, round(effort * (3 * STEPS if limit <= SMALL else STEPS)))
    for grid in grids_of(subject.shape):
        rank = rank_within(subject.shape, int(ANCHOR * limit), grid=grid, split=split)
        if rank:
            structure = Structure.factors(rank, grid=grid, split=split)
            _, loss = fit_factors(subject, structure, None, iterations=2 * steps)
            chains.append((loss, grid))
    if not chains:
        return {}
    grid = min(chains)[1]
    tensors, losses = None, {}
    for share in subjects.SHARES:
        size = _sized(subject, share, grid, split=split)
        if size is not None and size not in losses and (share <= LAST or limit <= TINIEST):
            tensors, losses[size] = fit_factors(subject, size, tensors, iterations=round(steps * slowness(share)))
    return losses


def slowness(share: float, *, power: float = 2.0) -> float:
    """How many times as long as usual a fit takes to arrive: the more it may store, the flatter are its valleys."""
    return max(1.0, (share / EASY) ** power)


def _few_fits(subject: Subject, *, split: bool, effort: float) -> dict[Structure, float]:
    """Those on the finest grid, fitted at few sizes: for a large weight."""
    grids = grids_of(subject.shape)
    if not grids:
        return {}
    grid, known, fitted = grids[-1], subject.low_ranks(1, split=split), {}
    usual = effort * ANCHOR_EFFORT[subject.metric.inputs is not None]
    for share, longer in ANCHORS.items():
        structure = _sized(subject, share, grid, split=split)
        if structure is None or structure.lowrank > known.largest:
            return {}
        step = step_cost(structure, subject.shape, subject.metric)
        allowed = usual * (longer if longer * usual >= ANCHOR_STEPS * step else 1)
        tensors = refine(subject.weight, structure, known.as_adapted(structure), metric=subject.metric, effort=allowed)
        fitted[structure] = subject.loss_of(structure, tensors)
    return fitted


def _completed(subject: Subject, lower: Sequence[Candidate], fitted: Mapping[Structure, float]) -> list[Candidate]:
    """All sizes of adapted bases, of which some were fitted.

    Between these the others are as far ahead of low ranks as lies between; beyond, the loss falls with a power of the
    share that is not stored, for adapted bases that store as much as the weight can be any weight.
    """
    first, limit = next(iter(fitted)), subject.weight.numel()
    stored = {each: each.parameters(subject.shape) for each in fitted}
    *_, before, last = [min(fitted, key=lambda each: stored[each]), *fitted]
    ahead = [_ahead(lower, stored[each], loss) for each, loss in fitted.items()]
    free = {each: math.log(1 - stored[each] / limit) for each in (before, last)}
    steep = math.log(max(fitted[before], TINY) / max(fitted[last], TINY)) / max(free[before] - free[last], TINY)
    found = []
    for rank in ladder(subject.shape, first.grid, split=first.split):
        each = Structure.factors(rank, grid=first.grid, split=first.split)
        size = each.parameters(subject.shape)
        loss = math.exp(min(_between(ahead, size), 0.0)) * _loss_at(lower, size)
        if size > stored[last]:
            power = FLATTER * steep * (math.log(1 - size / limit) - free[last])
            loss = min(_loss_at(lower, size), fitted[last] * math.exp(power))
        if each in fitted:
            loss = fitted[each]
        loss = min([loss, *(known for other, known in fitted.items() if stored[other] <= size)])
        loss = max([loss, *(known for other, known in fitted.items() if stored[other] >= size)])
        found.append(subject.candidate(each, loss))
    return found


def _ahead(lower: Sequence[Candidate], stored: int, loss: float) -> tuple[float, float]:
    """A size, and the logarithm of a loss there over that of a low rank."""
    return float(stored), math.log(max(loss, TINY) / max(_loss_at(lower, stored), TINY))


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x on the straight lines through points in order, constant before the first and going on at the end.

    >>> [_between([(0.0, 1.0), (1.0, 2.0), (2.0, 0.0)], x) for x in (-1.0, 0.5, 3.0)]
    [1.0, 1.5, -2.0]
    """
    pairs = list(pairwise(points)) or [(points[0], points[0])]
    (x0, y0), (x1, y1) = next((pair for pair in pairs if x <= pair[1][0]), pairs[-1])
    return y0 + (y1 - y0) / max(x1 - x0, TINY) * max(x - x0, 0.0)


def grids_of(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The grids of blocks that divide a weight's rows and columns, square or as near as they allow."""
    found = {(_divisor(shape[0], size), _divisor(shape[1], size)) for size in GRIDS}
    return sorted(each for each in found if each[0] * each[1] > 1)


def _divisor(width: int, wanted: int) -> int:
    """The largest number of at most `wanted` blocks, of at least two channels, that divides a width."""
    return max(each for each in range(1, wanted + 1) if width % each == 0 and (width >= 2 * each or each == 1))


def _sized(subject: Subject, share: float, grid: tuple[int, int], *, split: bool) -> Structure | None:
    """Adapted bases that store at most this share of the dense numbers; None where not even rank 1 does."""
    rank = rank_within(subject.shape, int(share * subject.weight.numel()), grid=grid, split=split)
    return Structure.factors(rank, grid=grid, split=split) if rank else None


def _loss_at(lower: Sequence[Candidate], stored: int) -> float:
    """The loss of a low rank of any size, by log-linear interpolation in the table; 0 where none loses."""
    known = [each for each in undominated(lower) if each.loss > 0]
    if not known:
        return 0.0
    smaller = [each for each in known if each.params <= stored]
    larger = [each for each in known if each.params > stored]
    if not smaller or not larger:
        return (smaller or larger)[-1 if smaller else 0].loss
    a, b = smaller[-1], larger[0]
    share = (stored - a.params) / (b.params - a.params)
    return a.loss ** (1 - share) * b.loss**share


def fit_factors(
    subject: Subject, structure: Structure, smaller: Tensors | None, *, iterations: int
) -> tuple[Tensors, float]:
    """A factor part and its relative loss, from the fit of a smaller rank grown by what that one leaves, if given."""
    start = _start(subject, structure)
    if smaller is not None:
        start = min((start, _grown(subject, structure, smaller)), key=lambda each: subject.loss_of(structure, each))
    tensors = refine(subject.weight, structure, start, metric=subject.metric, iterations=iterations)
    return tensors, subject.loss_of(structure, tensors)


def _start(subject: Subject, structure: Structure) -> Tensors:
    """What `start_factors` gives."""
    known = subject.low_ranks(structure.lowrank, split=structure.split)
    return known.leading(structure.lowrank) if structure.grid is None else known.as_adapted(structure)


def _grown(subject: Subject, structure: Structure, smaller: Tensors) -> Tensors:
    """A fit of smaller rank, with the leading components of its error appended."""
    had = smaller["right"].shape[0]
    old = Structure.factors(had, grid=structure.grid, split=structure.split)
    more = Structure.factors(structure.lowrank - had, grid=structure.grid, split=structure.split)
    rest = subject.weight - expand(smaller, old, subject.shape)
    extra = start_factors(rest, more, subject.metric)
    axes = {"left": -1, "right": 0, "scales": -1}
    return {name: torch.cat([smaller[name], extra[name]], dim=axes[name]) for name in smaller}
