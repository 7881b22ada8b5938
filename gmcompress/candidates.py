"""What one layer may become: candidates of every size with their cost and the loss of a fit of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from . import costs
from .errors import GMError
from .factored import Window
from .factors import Metric, Tensors, start_factors, views_of
from .fitting import OVERHEAD, refine, step_cost
from .groups import Group, quotients
from .lowranks import LowRanks, low_ranks
from .products import why_slow
from .projection import project
from .selection import Candidate
from .structure import KINDS, MAX_TERMS, Separable, Structure, expand

SHARES = (0.04, 0.07, 0.11, 0.17, 0.25, 0.35, 0.48, 0.64, 0.84)  # of the dense weight: sizes offered
GRIDS = (4, 8, 16)  # blocks along each side of an adapted basis
ANCHOR = 0.33  # the share at which the grids of a layer are compared
STEPS = 100  # of the fit of every candidate; three times as many where the weight is small
SMALL = 1 << 14  # numbers of a weight up to which fits cost next to nothing
EFFORT = {True: 1e11, False: 2e10}  # multiply-adds for a layer's table, with data and without, that fits may take
ANCHORS = {0.25: 1, 0.48: 2, 0.7: 4}  # where they would take more, adapted bases are fitted at these shares only, each
ANCHOR_EFFORT = {True: 1.5e10, False: 1.5e9}  # with so many times these multiply-adds: larger ones arrive later
ANCHOR_STEPS = 50  # that this must allow, else each gets it once: fewer would tell little more of a huge weight
TINY = 1e-30  # stands for a loss of zero in logarithms
LARGEST_QUOTIENT = 64  # order; larger ones keep less than 2 % of an unstructured weight


@dataclass(frozen=True)
class Subject:
    """A weight to be planned: float64 (rows, columns, *taps), what its errors cost, and how often it is applied."""

    weight: Tensor
    metric: Metric
    conv_groups: int = 1
    positions: int | None = None  # outputs of one example to which the weight is applied; None where unknown
    itemsize: int = 4  # bytes of a stored number
    taps: str = ""  # how the taps lie on a grid of two subgroups, where that is known
    factored: dict[bool, LowRanks] = field(default_factory=dict, compare=False, repr=False)  # those asked for, by view

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @cached_property
    def weighed(self) -> Tensor:  # (rows, m)
        """G W S."""
        return self.metric.apply(self.weight.flatten(1))

    @cached_property
    def whole(self) -> float:
        """tr(G W S Wᵀ), or 1 where that is nothing."""
        return float((self.weight.flatten(1) * self.weighed).sum()) or 1.0

    def low_ranks(self, rank: int, *, split: bool) -> LowRanks:
        """The low ranks up to this one at least, and to the largest offered, of the view with the taps split or not."""
        known = self.factored.get(split)
        if known is None or known.largest < rank:
            largest = max([rank, *_ladder(self.shape, split=split)])
            known = self.factored[split] = low_ranks(self.weight, self.metric, largest, split=split)
        return known

    def low_rank_loss(self, rank: int, *, split: bool) -> float:
        """The relative loss of a low rank."""
        return float(self.low_ranks(rank, split=split).losses[rank]) / self.whole

    def relative_loss(self, approximation: Tensor) -> float:
        """tr(G E S Eᵀ)/tr(G W S Wᵀ)."""
        return self.metric.loss(approximation.to(self.weight) - self.weight) / self.whole

    def least_loss(self, approximation: Tensor) -> float:
        """A bound from below of `relative_loss` that takes no product: (1 − ⟨Ŵ, G W S⟩/tr(G W S Wᵀ))².

        By the Cauchy–Schwarz inequality, ⟨Ŵ, G W S⟩² is at most tr(G Ŵ S Ŵᵀ) tr(G W S Wᵀ).
        """
        return (1 - float((approximation.to(self.weight).flatten(1) * self.weighed).sum()) / self.whole) ** 2

    def candidate(self, structure: Structure | None, loss: float) -> Candidate:
        """The candidate with its exact costs."""
        counts: dict[str, Any] = {"positions": self.positions, "itemsize": self.itemsize}
        return priced(structure, self.shape, loss, conv_groups=self.conv_groups, **counts)


def priced(
    structure: Structure | None,  # None: dense
    shape: Sequence[int],  # of the weight
    loss: float,
    *,
    conv_groups: int,
    positions: int | None,
    itemsize: int,
) -> Candidate:
    """A structure in place of a weight as a candidate, with its exact costs; the counts are as in `Subject`."""
    stored = prod(shape) if structure is None else structure.parameters(shape)
    macs = None if positions is None else positions * multiply_adds(structure, shape, conv_groups=conv_groups)
    return Candidate(None if structure is None else str(structure), stored, stored * itemsize, macs, loss)


def multiply_adds(structure: Structure | None, shape: Sequence[int], *, conv_groups: int = 1) -> int:
    """Multiply-adds for one output position of a layer, whichever is less of the dense and the fast product.

    A kernel of odd size is taken to see each input position once, one of even size to cut the image into patches. A
    grouped convolution has no fast product.

    >>> multiply_adds(Structure.parse("C2^2"), (64, 64, 3, 3))  # a quarter of 36,864, and two transforms
    9728
    """
    dense = prod(shape)
    if structure is None:
        return dense
    if why_slow(structure, conv_groups) is not None:
        return dense
    if structure.group is None:
        return min(dense, structure.parameters(shape))
    if len(shape) not in (2, 4):
        return dense
    taps = tuple(shape[2:]) or (1, 1)
    sizes = tuple(1 if each % 2 else each for each in taps)
    window = Window(padding=(taps[0] // 2 * (taps[0] % 2), taps[1] // 2 * (taps[1] % 2)))
    return min(dense, costs.multiply_adds(structure, shape, (1, *sizes), window))


def rank_within(shape: Sequence[int], limit: int, *, grid: tuple[int, int] | None, split: bool) -> int:
    """The largest rank of a factor part that stores at most `limit` numbers; 0 where not even 1 does.

    >>> rank_within((64, 64, 3, 3), 18432, grid=(8, 8), split=True)
    41
    """
    each = Structure.factors(1, grid=grid, split=split).parameters(shape)
    rows = shape[0] * (shape[2] if split else 1)
    return min(limit // each, rows, prod(shape) // rows)


def candidates(subject: Subject, group: Group | None, *, effort: float = 1.0) -> list[Candidate]:
    """The candidates of one layer, dense among them, each with the relative loss of its fit; dominated ones left out.

    Low ranks in both views, adapted bases on the grid of blocks that suits the layer, separable kernels where the taps
    are known to lie on a grid of two subgroups, and the group matrices of every quotient of `group` that fits, with
    displacement ranks up to 2. Along each family the fits are nested: a larger
    rank starts from the smaller one's fit, so that more parameters never give a larger loss. `effort` multiplies what
    the fits may take.
    """
    lower = [each for split in views_of(subject.shape) for each in _low_ranks(subject, split=split)]
    found = [subject.candidate(None, 0.0), *lower]
    split = views_of(subject.shape)[-1]
    if _cost(subject) <= EFFORT[subject.metric.inputs is not None]:
        found += _adapted(subject, split=split, effort=effort)
    else:
        found += _estimated(subject, lower, split=split, effort=effort)
    for structure in _separables(subject.shape, subject.taps):
        fitted = expand(project(subject.weight, structure).tensors, structure, subject.shape)
        found.append(subject.candidate(structure, subject.relative_loss(fitted)))
    if group is not None:
        found += _group_matrices(subject, group, lower)
    return undominated(found)


def offered(
    shape: Sequence[int],
    group: Group | None,
    *,
    conv_groups: int = 1,
    grids: bool = True,
    taps: str = "",
) -> list[Structure | None]:
    """The structures among which `candidates` finds those of a weight of this shape, known before any fit; None: dense.

    Each is sure to be there, or one that is no larger, but for adapted bases, left out without `grids`: the fits tell
    which grid is kept.

    >>> [str(each) for each in offered((8, 8), None, grids=False)]
    ['None', 'lowrank:1', 'lowrank:2', 'lowrank:3']
    """
    found: list[Structure | None] = [None]
    for split in views_of(shape):
        found += [Structure.factors(rank, split=split) for rank in _ladder(shape, split=split)]
    for grid in grids_of(shape) if grids else []:
        found += [Structure.factors(rank, grid=grid, split=split) for rank in _ladder(shape, grid, split=split)]
    found += _separables(shape, taps)
    return found if group is None else [*found, *_group_structures(shape, group, conv_groups)]


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


def _cost(subject: Subject) -> float:
    """Multiply-adds, about, of the fits behind one layer's table."""
    rank = min(subject.shape[0], prod(subject.shape[1:])) / 3
    product = 8 * subject.weight.numel() * rank
    product += 0 if subject.metric.inputs is None else subject.weight.numel() * prod(subject.shape[1:])
    return (product + OVERHEAD) * STEPS * (len(SHARES) + 2 * len(GRIDS))


def _low_ranks(subject: Subject, *, split: bool) -> Iterator[Candidate]:
    """Low ranks of rows × columns·taps or, split, of rows·ky × columns·kx."""
    for rank in _ladder(subject.shape, split=split):
        yield subject.candidate(Structure.factors(rank, split=split), subject.low_rank_loss(rank, split=split))


def _ladder(shape: Sequence[int], grid: tuple[int, int] | None = None, *, split: bool) -> list[int]:
    """The ranks offered of one family, ascending: the largest within every share of the dense numbers."""
    ranks = {rank_within(shape, int(share * prod(shape)), grid=grid, split=split) for share in SHARES}
    return sorted(ranks - {0})


def grids_of(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The grids of blocks that divide a weight's rows and columns, square or as near as they allow."""
    found = {(_divisor(shape[0], size), _divisor(shape[1], size)) for size in GRIDS}
    return sorted(each for each in found if each[0] * each[1] > 1)


def _divisor(width: int, wanted: int) -> int:
    """The largest number of at most `wanted` blocks, of at least two channels, that divides a width."""
    return max(each for each in range(1, wanted + 1) if width % each == 0 and (width >= 2 * each or each == 1))


def _adapted(subject: Subject, *, split: bool, effort: float) -> list[Candidate]:
    limit, chains = subject.weight.numel(), []
    steps = max(1, round(effort * (3 * STEPS if limit <= SMALL else STEPS)))
    for grid in grids_of(subject.shape):
        rank = rank_within(subject.shape, int(ANCHOR * limit), grid=grid, split=split)
        if rank:
            structure = Structure.factors(rank, grid=grid, split=split)
            _, loss = fit_factors(subject, structure, None, iterations=2 * steps)
            chains.append((loss, grid))
    if not chains:
        return []
    grid = min(chains)[1]
    found, tensors = [], None
    for rank in _ladder(subject.shape, grid, split=split):
        structure = Structure.factors(rank, grid=grid, split=split)
        tensors, loss = fit_factors(subject, structure, tensors, iterations=steps)
        found.append(subject.candidate(structure, loss))
    return found


def _estimated(subject: Subject, lower: Sequence[Candidate], *, split: bool, effort: float) -> list[Candidate]:
    """Adapted bases of a large weight: fitted at few sizes; at others as far ahead of low ranks as lies between."""
    limit, grids = subject.weight.numel(), grids_of(subject.shape)
    if not grids:
        return []
    grid, known, ahead = grids[-1], subject.low_ranks(1, split=split), []
    usual = effort * ANCHOR_EFFORT[subject.metric.inputs is not None]
    for share, longer in ANCHORS.items():
        structure = _sized(subject, share, grid, split=split)
        if structure is None or structure.lowrank > known.largest:
            return []
        step = step_cost(structure, subject.shape, subject.metric)
        allowed = usual * (longer if longer * usual >= ANCHOR_STEPS * step else 1)
        tensors = refine(subject.weight, structure, known.as_adapted(structure), metric=subject.metric, effort=allowed)
        stored = structure.parameters(subject.shape)
        reached = max(_loss(subject, structure, tensors), TINY)
        ahead.append((stored / limit, math.log(reached / max(_loss_at(lower, stored), TINY))))
    found = []
    for rank in _ladder(subject.shape, grid, split=split):
        structure = Structure.factors(rank, grid=grid, split=split)
        stored = structure.parameters(subject.shape)
        factor = math.exp(min(_between(ahead, stored / limit), 0.0))
        found.append(subject.candidate(structure, factor * _loss_at(lower, stored)))
    return found


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x on the straight lines through points in order, constant before the first and going on at the end.

    >>> [_between([(0.0, 1.0), (1.0, 2.0), (2.0, 0.0)], x) for x in (-1.0, 0.5, 3.0)]
    [1.0, 1.5, -2.0]
    """
    pairs = list(pairwise(points))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if x <= pair[1][0]), pairs[-1])
    return y0 + (y1 - y0) / max(x1 - x0, TINY) * max(x - x0, 0.0)


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
        start = min((start, _grown(subject, structure, smaller)), key=lambda each: _loss(subject, structure, each))
    tensors = refine(subject.weight, structure, start, metric=subject.metric, iterations=iterations)
    return tensors, _loss(subject, structure, tensors)


def _start(subject: Subject, structure: Structure) -> Tensors:
    """What `start_factors` gives."""
    known = subject.low_ranks(structure.lowrank, split=structure.split)
    return known.leading(structure.lowrank) if structure.grid is None else known.as_adapted(structure)


def _loss(subject: Subject, structure: Structure, tensors: Tensors) -> float:
    return subject.relative_loss(expand(tensors, structure, subject.shape))


def _grown(subject: Subject, structure: Structure, smaller: Tensors) -> Tensors:
    """A fit of smaller rank, with the leading components of its error appended."""
    had = smaller["right"].shape[0]
    old = Structure.factors(had, grid=structure.grid, split=structure.split)
    more = Structure.factors(structure.lowrank - had, grid=structure.grid, split=structure.split)
    rest = subject.weight - expand(smaller, old, subject.shape)
    extra = start_factors(rest, more, subject.metric)
    axes = {"left": -1, "right": 0, "scales": -1}
    return {name: torch.cat([smaller[name], extra[name]], dim=axes[name]) for name in smaller}


def _group_matrices(subject: Subject, group: Group, lower: Sequence[Candidate]) -> Iterator[Candidate]:
    """The nearest group matrices of every quotient that fits, alone and with small displacement ranks.

    Under a metric, in which losses take long to find, those are left out that cannot be better than a low rank.
    """
    for structure in _group_structures(subject.shape, group, subject.conv_groups):
        fit = project(subject.weight, structure)
        if subject.metric == Metric():
            yield subject.candidate(structure, fit.loss)
            continue
        found = expand(fit.tensors, structure, subject.shape)
        at_best = subject.candidate(structure, subject.least_loss(found))
        if not any(beats(each, at_best) for each in lower):
            yield subject.candidate(structure, subject.relative_loss(found))


def _separables(shape: Sequence[int], taps: str) -> Iterator[Structure]:
    """Sums of separable kernels of every kind: of as many terms as each share of the dense numbers allows."""
    for kind in KINDS[1:] if taps else ():
        each = Separable(kind, 1).on(taps)
        alone = sum(map(prod, each.shapes(shape).values()))
        for terms in sorted({int(share * prod(shape)) // alone for share in SHARES} - {0}):
            if terms <= MAX_TERMS:
                yield Structure.kernels(replace(each, terms=terms))


def _group_structures(shape: Sequence[int], group: Group, conv_groups: int) -> Iterator[Structure]:
    width = gcd(shape[0] // conv_groups, shape[1])
    for quotient in quotients(group):
        if quotient.order == 1 or quotient.order > LARGEST_QUOTIENT or width % quotient.order:
            continue
        for rank in range(min(3, quotient.order)):
            structure = Structure.regular(quotient, displacement=rank)
            if structure.parameters(shape) < prod(shape):
                yield structure


def plain_svd(subject: Subject, limit: int) -> tuple[Structure, float]:
    """The better view's low rank of at most `limit` stored numbers, by truncated (whitened) SVD, and its loss.

    Raises:
        GMError: not even rank 1 fits.
    """
    found = []
    for split in views_of(subject.shape):
        rank = rank_within(subject.shape, limit, grid=None, split=split)
        if rank:
            structure = Structure.factors(rank, split=split)
            tensors = start_factors(subject.weight, structure, subject.metric)
            found.append((_loss(subject, structure, tensors), split, structure))
    if not found:
        raise GMError(f"a weight of shape {subject.shape} has no low rank of at most {limit} numbers")
    loss, _, structure = min(found, key=lambda each: each[:2])
    return structure, loss
