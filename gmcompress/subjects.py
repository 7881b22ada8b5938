"""A weight to be planned, what its errors cost, and the sizes at which structures are offered in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor

from . import costs
from .factored import Window
from .factors import Metric
from .lowranks import LowRanks, low_ranks
from .products import why_slow
from .selection import Candidate
from .structure import Structure, expand

# of the dense weight: sizes offered
SHARES = (0.04, 0.07, 0.11, 0.17, 0.25, 0.35, 0.48, 0.64, 0.84, 0.95)
FINER = 0.25  # and above this one those half-way between them: what smaller ones cost a network is less well known


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
            largest = max([rank, *ladder(self.shape, split=split)])
            known = self.factored[split] = low_ranks(self.weight, self.metric, largest, split=split)
        return known

    def low_rank_loss(self, rank: int, *, split: bool) -> float:
        """The relative loss of a low rank."""
        return float(self.low_ranks(rank, split=split).losses[rank]) / self.whole

    def relative_loss(self, approximation: Tensor) -> float:
        """tr(G E S Eᵀ)/tr(G W S Wᵀ)."""
        return self.metric.loss(approximation.to(self.weight) - self.weight) / self.whole

    def loss_of(self, structure: Structure, tensors: Mapping[str, Tensor]) -> float:
        """The relative loss of stored tensors."""
        return self.relative_loss(expand(tensors, structure, self.shape))

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


def shares() -> list[float]:
    """The sizes offered."""
    return [*SHARES, *(sum(pair) / 2 for pair in pairwise(SHARES) if min(pair) >= FINER)]


def ladder(shape: Sequence[int], grid: tuple[int, int] | None = None, *, split: bool) -> list[int]:
    """The ranks offered of one family, the largest within every share of the dense numbers, ascending."""
    ranks = {rank_within(shape, int(share * prod(shape)), grid=grid, split=split) for share in shares()}
    return sorted(ranks - {0})
