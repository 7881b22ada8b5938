"""What products cost: multiply-adds by formula, and which of two ways to multiply by a structured weight is faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from .factored import Window
from .products import layout_of, why_slow
from .structure import Structure

# In the time of one multiply-add of a large dense product, by least squares over 320 layers and sizes of input on a CPU
# with AVX-512, forward and backward: the way chosen so takes 3 % more than the faster of the two in the mean.
SMALL = 1.3  # a multiply-add of the small products of a structure
MOVED = 40  # one number that is moved to its place, or written and read once more
CALLED = {"group": 4_000_000, "adapted": 1_000_000, "low rank": 200_000}  # the calls that need more of Python and torch
MARGIN = 1.1  # how much faster the fast product must be


def multiply_adds(
    structure: Structure,
    shape: Sequence[int],  # of the weight
    size: Sequence[int],  # of the input, without channels: (N,) or (N, height, width)
    window: Window | None = None,
) -> int:
    """Multiply-adds of the fast product in matrix products and convolutions; gates and sums are not counted.

    >>> multiply_adds(Structure.parse("lowrank:3"), (10, 20), (7,))
    630
    """
    samples, rows, columns = size[0], shape[0], shape[1]
    height, width = tuple(size[1:]) or (1, 1)
    ky, kx = tuple(shape[2:]) or (1, 1)
    high, wide = _sides(shape, size, window or Window())
    outputs = samples * high * wide
    total = 0
    if structure.group is not None:
        more = 1 + structure.displacement
        n, layout = structure.group.order, layout_of(structure.group)
        total += sum(layout.lengths) * (samples * height * width * columns + outputs * rows * more)
        for each in layout.combinations:
            products = each.repeats * each.blocks * each.size**2
            total += outputs * products * (rows // n * more) * (columns // n) * ky * kx
    if structure.lowrank:
        inner = samples * height * wide if structure.split else outputs
        coupling = 0 if structure.grid is None else prod(structure.grid)
        across = kx if structure.split else ky * kx
        total += structure.lowrank * (inner * (columns * across + coupling))
        total += structure.lowrank * outputs * rows * (ky if structure.split else 1)
    return total


def expansion_macs(structure: Structure, shape: tuple[int, ...]) -> int:
    """Multiply-adds that compute the dense weight: gates × filters, scales × right, left × right, or terms."""
    if structure.separable is not None:
        return structure.separable.terms * prod(shape)
    gates = structure.displacement * prod(shape) if structure.displacement else 0
    scaled = 0 if structure.grid is None else structure.grid[0] * prod(structure.shapes(shape)["right"])
    return gates + scaled + structure.lowrank * prod(shape)


@lru_cache(maxsize=4096)
def is_fast(
    structure: Structure,
    shape: tuple[int, ...],  # of the weight
    size: tuple[int, ...],  # of the input, without channels
    window: Window | None = None,
    conv_groups: int = 1,
) -> bool:
    """Whether the fast product takes so much less than computing the dense weight and applying it that it is faster.

    A rule of shapes alone, so that what is done again takes the same way; for CPUs, where it was measured.

    >>> is_fast(Structure.parse("lowrank:16"), (512, 512), (9,)), is_fast(Structure.parse("C2"), (64, 64), (9,))
    (True, False)
    """
    if why_slow(structure, conv_groups) is not None:
        return False
    outputs = size[0] * prod(_sides(shape, size, window or Window()))
    stored, points, kind = structure.shapes(shape), prod(size), kind_of_cost(structure)
    dense = outputs * prod(shape) + expansion_macs(structure, shape)
    fast = SMALL * multiply_adds(structure, shape, size, window)
    if structure.group is not None:
        spectra = sum(prod(stored[part]) for part in ("kernel", "filters") if part in stored)
        fast += MOVED * (2 * spectra + points * shape[1] + outputs * shape[0] * (1 + structure.displacement))
    fast += MOVED * 2 * outputs * structure.lowrank * (1 if structure.grid is None else sum(structure.grid))
    if kind != "low rank" or structure.split:
        dense += MOVED * prod(shape)  # whose numbers are not made where they belong
    return dense > MARGIN * (fast + CALLED[kind])


def kind_of_cost(structure: Structure) -> str:
    """The part of a structure by which it is counted among those of CALLED: the group's, before that of factors."""
    return "group" if structure.group is not None else "low rank" if structure.grid is None else "adapted"


def _sides(shape: Sequence[int], size: Sequence[int], window: Window) -> tuple[int, int]:
    """Height and width of the outputs, 1 and 1 of a linear layer."""
    height, width = tuple(size[1:]) or (1, 1)
    ky, kx = tuple(shape[2:]) or (1, 1)
    return window.size(0, height, ky), window.size(1, width, kx)
