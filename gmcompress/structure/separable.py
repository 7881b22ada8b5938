"""Separable kernels: the five kinds, their tensors, and the kernel of these on a grid of taps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

import torch
from torch import Tensor

from ..errors import GMError, nearest_names, shown

KINDS = ("nonseparable", "separable", "gseparable", "dseparable", "dgseparable")
FORMULAS = {
    "separable": "kox,koih->oixh",
    "gseparable": "koix,koih->oixh",
    "dseparable": "koi,koxh->oixh",
    "dgseparable": "koi,kox,koh->oixh",
}
MAX_TERMS = 9999
MAX_TAPS = 1 << 20  # places of a grid
_TEXT = re.compile(r"(separable|gseparable|dseparable|dgseparable):([0-9]{1,4})(?::(.*))?")
_GRID = re.compile(r"([0-9]{1,7})x([0-9]{1,7})(?:<([0-9,-]+)>)?")


def check_kind(kind: str) -> str:
    """The kind itself.

    Raises:
        GMError: it is none of the five.
    """
    if kind not in KINDS:
        known = nearest_names(kind, KINDS, count=5) if isinstance(kind, str) else ", ".join(KINDS)
        raise GMError(f"{shown(kind)} is no kind of separable kernel; there are {known}")
    return kind


def separable_shapes(kind: str, o: int, i: int, grid: tuple[int, int], terms: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of a kernel on |N| × |H| taps; `outer` belongs to N and `inner` to H.

    >>> separable_shapes("dgseparable", 4, 3, (9, 2), 1)
    {'mixing': (1, 4, 3), 'outer': (1, 4, 9), 'inner': (1, 4, 2)}
    """
    x, h = grid
    found: dict[str, dict[str, tuple[int, ...]]] = {
        "separable": {"outer": (o, x), "inner": (o, i, h)},
        "gseparable": {"outer": (o, i, x), "inner": (o, i, h)},
        "dseparable": {"mixing": (o, i), "outer": (o, x, h)},
        "dgseparable": {"mixing": (o, i), "outer": (o, x), "inner": (o, h)},
    }
    return {name: (terms, *shape) for name, shape in found[kind].items()}


def combine(tensors: Mapping[str, Tensor], kind: str) -> Tensor:  # (o, i, |N|, |H|)
    """The kernel that the tensors of a kind stand for, a sum over the terms k.

    separable    k_oi(x·h) = Σ_k outer_ko(x) inner_koi(h)
    gseparable   k_oi(x·h) = Σ_k outer_koi(x) inner_koi(h)
    dseparable   k_oi(x·h) = Σ_k mixing_koi outer_ko(x·h)
    dgseparable  k_oi(x·h) = Σ_k mixing_koi outer_ko(x) inner_ko(h)

    Source: Knigge et al. 2022, section 3.

    >>> combine({"outer": torch.ones(1, 2, 3), "inner": torch.ones(1, 2, 5, 4)}, "separable").shape
    torch.Size([2, 5, 3, 4])
    """
    if check_kind(kind) == "nonseparable":
        return tensors["kernel"]
    names = ("mixing", "outer", "inner")
    return torch.einsum(FORMULAS[kind], *(tensors[name] for name in names if name in tensors))


@dataclass(frozen=True)
class TapGrid:
    """How the taps of a kernel lie on the products x·h of two subgroups: |N| × |H| places, and that of every tap.

    >>> str(TapGrid.parse("3x3<1,3-5,7>"))
    '3x3<1,3-5,7>'
    """

    sizes: tuple[int, int]
    places: tuple[int, ...] | None = None  # row-major; None: the taps fill the grid in this order

    @classmethod
    def of(cls, sizes: tuple[int, int], places: Iterable[int]) -> TapGrid:
        """The grid of taps at these places."""
        found = tuple(int(each) for each in places)
        return cls(sizes, None if found == tuple(range(prod(sizes))) else found)

    @classmethod
    def parse(cls, text: str) -> TapGrid:
        """The grid that a text such as "8x8" stands for, the places behind it in brackets.

        Raises:
            GMError: it is malformed, or names a place twice or beyond the grid.
        """
        match = _GRID.fullmatch(text)
        sizes = (int(match[1]), int(match[2])) if match else (0, 0)
        if match is None or not 1 <= prod(sizes) <= MAX_TAPS:
            raise GMError(
                f'{shown(text)} is no grid of taps such as "8x8" or "3x3<1,3-5,7>", at most {MAX_TAPS:,} of them'
            )
        if match[3] is None:
            return cls(sizes)
        ranges = [_range_of(each, prod(sizes), text) for each in match[3].split(",")]
        if sum(map(len, ranges)) > prod(sizes):
            raise GMError(f"{shown(text)} names a place twice")
        places = tuple(chain.from_iterable(ranges))
        if len(set(places)) < len(places):
            raise GMError(f"{shown(text)} names a place twice")
        return cls.of(sizes, places)

    def __str__(self) -> str:
        sizes = f"{self.sizes[0]}x{self.sizes[1]}"
        if self.places is None:
            return sizes
        runs: list[list[int]] = []
        for place in self.places:
            if runs and place == runs[-1][-1] + 1:
                runs[-1][1:] = [place]
            else:
                runs.append([place])
        return f"{sizes}<{','.join('-'.join(map(str, run)) for run in runs)}>"

    @property
    def taps(self) -> int:
        """How many taps there are."""
        return prod(self.sizes) if self.places is None else len(self.places)

    def kernel(self, whole: Tensor) -> Tensor:  # (o, i, |N|, |H|) -> (o, i, taps)
        """The values at the taps of one on the whole grid."""
        flat = whole.flatten(2)
        return flat if self.places is None else flat[:, :, self._index(whole)]

    def whole(self, kernel: Tensor, elsewhere: Tensor | None = None) -> Tensor:  # (o, i, taps) -> (o, i, |N|, |H|)
        """The kernel on the whole grid, with these values, or zeros, where it has no taps."""
        if self.places is not None:
            rest = kernel.new_zeros(*kernel.shape[:2], prod(self.sizes)) if elsewhere is None else elsewhere.flatten(2)
            kernel = rest.index_copy(2, self._index(kernel), kernel)
        return kernel.unflatten(2, self.sizes)

    def _index(self, like: Tensor) -> Tensor:
        return torch.tensor(self.places, dtype=torch.int64, device=like.device)


def _range_of(text: str, size: int, whole: str) -> range:
    """The places of "3" or "3-5"."""
    first, _, last = text.partition("-")
    if not first or not (last or "-" not in text) or "-" in last or len(text) > 16:
        raise GMError(f"in {shown(whole)}: {shown(text)} is no place or range of places")
    found = range(int(first), int(last or first) + 1)
    if not found or found[-1] >= size:
        raise GMError(f"in {shown(whole)}: {shown(text)} is no place or range of places below {size}")
    return found


@dataclass(frozen=True)
class Separable:
    """A sum of separable kernels in place of a weight (rows, columns, *taps), rows and columns being channels.

    Where `grid` is None the two tap axes of the weight are its sides; dseparable kernels need none.

    >>> Separable("separable", 2).shapes((4, 3, 5, 5))
    {'outer': (2, 4, 5), 'inner': (2, 4, 3, 5)}
    """

    kind: str
    terms: int
    grid: TapGrid | None = None

    def __post_init__(self) -> None:
        if check_kind(self.kind) == "nonseparable":
            raise GMError("a nonseparable kernel is no structure: the weight would stay as it is")
        if not isinstance(self.terms, int) or isinstance(self.terms, bool) or not 1 <= self.terms <= MAX_TERMS:
            raise GMError(f"terms are an integer from 1 to {MAX_TERMS:,}, not {shown(self.terms)}")

    @classmethod
    def parse(cls, text: str) -> Separable | None:
        """What a text such as "separable:2" stands for; None where it names no separable kernel.

        Raises:
            GMError: the grid of taps behind it is malformed.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        return cls(match[1], int(match[2]), None if match[3] is None else TapGrid.parse(match[3]))

    def __str__(self) -> str:
        return f"{self.kind}:{self.terms}" + ("" if self.grid is None else f":{self.grid}")

    def on(self, taps: str) -> Separable:
        """The same on a grid of taps, unless it has one or needs none."""
        given = self.grid is not None or self.kind == "dseparable" or not taps
        return self if given else replace(self, grid=TapGrid.parse(taps))

    def grid_of(self, shape: Sequence[int]) -> TapGrid:
        """The grid of a weight of this shape.

        Raises:
            GMError: it has not these taps, or its sides are not known.
        """
        taps = tuple(shape[2:])
        if len(shape) < 3:
            raise GMError(f"{self} is for kernels (rows, columns, *taps), but the weight has shape {tuple(shape)}")
        if self.grid is not None:
            if self.grid.taps != prod(taps):
                raise GMError(f"{self} has {self.grid.taps} taps, but the weight has shape {tuple(shape)}")
            return self.grid
        if self.kind == "dseparable":
            return TapGrid((prod(taps), 1))
        if len(taps) != 2:
            raise GMError(f"{self} needs two axes of taps, but the weight has shape {tuple(shape)}")
        return TapGrid((taps[0], taps[1]))

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every stored tensor for a weight of the given shape."""
        sizes = self.grid_of(shape).sizes
        return separable_shapes(self.kind, shape[0], shape[1], sizes, self.terms)

    def weight(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The weight that stored tensors stand for, differentiable."""
        return self.grid_of(shape).kernel(combine(tensors, self.kind)).reshape(tuple(shape))
