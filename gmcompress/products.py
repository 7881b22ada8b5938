"""The fast product: a structured weight applied without being computed, by small dense matrix products alone.

A block of group matrices is applied as: the inputs' real Fourier transform, one matrix product (or convolution) for
every irreducible representation, and the transform back. Residuals of displacement rank share both transforms; low
ranks and adapted bases are input basis, coupling, output basis. There are no complex numbers, so that everything runs
in half precision, under autocast, and exports.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .errors import GMError
from .fourier import Fourier, Irreducibles, fourier_axes
from .groups import Group
from .structure import Structure

Tensors = dict[str, Tensor]

ROWS = 4  # inputs of a linear layer up to which they stay rows; more become the last axis, which needs fewer products


@dataclass(frozen=True)
class Window:
    """How a convolution moves: stride, zero padding and dilation, (vertical, horizontal)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def size(self, along: int, length: int, taps: int) -> int:
        """Number of outputs along an axis of this length."""
        covered = self.dilation[along] * (taps - 1) + 1
        return (length + 2 * self.padding[along] - covered) // self.stride[along] + 1


def why_slow(structure: Structure, conv_groups: int = 1) -> str | None:
    """Why a structure has no fast product, None where it has one.

    >>> why_slow(Structure.parse("D4[G/<1>,G]"))
    'the group acts on rows or columns that are not the group itself'
    """
    if conv_groups > 1:
        return "the convolution is grouped"
    if structure.group is None:
        return None
    if not structure.is_regular or structure.columns is None or not structure.columns.is_regular:
        return "the group acts on rows or columns that are not the group itself"
    if structure.taps is not None:
        return "the group acts on the taps"
    try:
        fourier_axes(structure.group)
    except GMError as problem:
        return str(problem)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The group part. Axes are those of `fourier_axes`; a combination has one family of irreducibles for each axis.


def _families(axis: Fourier) -> tuple[Irreducibles, ...]:
    """The parts of an axis, an even few real characters joined in twos to the pairs of complex ones: fewer products."""
    if len(axis.parts) < 2:
        return axis.parts
    ones, twos, *rest = axis.parts
    if ones.size != 1 or twos.size != 2 or twos.copies != 1 or ones.count % 2 or ones.count > twos.count:
        return axis.parts
    values = ones.matrices.reshape(-1, 2, 1, axis.order)
    joined = values * torch.eye(2, dtype=values.dtype)[None, :, :, None]
    matrices = torch.cat([joined, twos.matrices])
    return (Irreducibles(0, len(matrices), 1, 2, matrices), *rest)


@lru_cache(maxsize=64)
def _combinations(group: Group) -> tuple[tuple[Irreducibles, ...], ...]:
    """All choices of one family for each axis, the first axis slowest."""
    return tuple(itertools.product(*(_families(axis) for axis in fourier_axes(group))))


@lru_cache(maxsize=64)
def _constants(group: Group, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The bases of the axes."""
    return tuple(axis.basis.to(device, dtype) for axis in fourier_axes(group))


@lru_cache(maxsize=256)
def _matrices(family: Irreducibles, dtype: torch.dtype, device: torch.device) -> Tensor:
    return family.matrices.to(device, dtype)


def prepare(tensors: Mapping[str, Tensor], structure: Structure) -> Tensors:
    """What the product needs, from the stored tensors of a weight, differentiable: bases, spectra, gates, factors.

    `spectrum0`, … are (M, D·o·(1+r), D·i, *taps): M blocks for one combination of irreducibles of sizes D.
    """
    ready = {name: tensors[name] for name in ("left", "right", "scales") if name in tensors}
    if structure.group is None:
        return ready
    with torch.autocast(tensors["kernel"].device.type, enabled=False):
        return ready | _spectra(tensors, structure.group)


def _spectra(tensors: Mapping[str, Tensor], group: Group) -> Tensors:
    """The bases, the spectra of kernel and filters, and the gates."""
    ready = {"gates": tensors["gates"]} if "gates" in tensors else {}
    kernel = tensors["kernel"].unsqueeze(1)  # (o, 1, i, n, *taps)
    if "gates" in tensors:
        kernel = torch.cat([kernel, tensors["filters"]], dim=1)
    o, more, i, _, *taps = kernel.shape
    axes = fourier_axes(group)
    wide = torch.promote_types(kernel.dtype, torch.float32)
    apart = kernel.to(wide).reshape(o * more, i, *(axis.order for axis in axes), prod(taps))
    for number, basis in enumerate(_constants(group, kernel.dtype, kernel.device)):
        ready[f"basis{number}"] = basis
    for number, families in enumerate(_combinations(group)):
        found = apart
        for family in families:  # (o, i, n, ..., taps) -> (o, i, ..., taps, count, size, size)
            found = torch.tensordot(found, _matrices(family, wide, kernel.device), dims=([2], [3]))
        k = len(families)
        order = [*range(3, 3 + 3 * k, 3), *range(4, 3 + 3 * k, 3), 0, *range(5, 3 + 3 * k, 3), 1, 2]
        blocks, size = prod(each.count for each in families), prod(each.size for each in families)
        spectrum = found.permute(order).reshape(blocks, size * o * more, size * i, *taps)
        ready[f"spectrum{number}"] = spectrum.to(kernel.dtype).contiguous()
    return ready


def _bases(ready: Mapping[str, Tensor], structure: Structure) -> list[Tensor]:
    return [ready[f"basis{number}"] for number in range(len(fourier_axes(structure.acting)))]


def _transformed(signal: Tensor, bases: Sequence[Tensor], *, back: bool) -> Tensor:  # (batch, blocks, n, positions)
    """The Fourier transform along the group, or back from it, one axis after the other."""
    shape, rest = signal.shape, signal.shape[3]
    for basis in reversed(bases):
        matrix = basis if back else basis.mT
        size = len(basis)
        if rest == 1:
            signal = signal.reshape(-1, size) @ matrix.mT
        else:
            signal = torch.matmul(matrix, signal.reshape(-1, size, rest))
        rest *= size
    return signal.reshape(shape)


def _apart(signal: Tensor, families: Sequence[Irreducibles], axes: Sequence[int]) -> Tensor:
    """The coefficients of one combination, (batch, blocks, count, copies, size, count, ..., positions)."""
    found = signal.reshape(*signal.shape[:2], *axes, signal.shape[-1])
    for number, family in enumerate(families):
        if family.stop - family.start < axes[number]:
            found = found.narrow(2 + number, family.start, family.stop - family.start)
    sizes = [size for each in families for size in (each.count, each.copies, each.size)]
    return found.reshape(*signal.shape[:2], *sizes, signal.shape[-1])


def _joined(pieces: list[Tensor], choices: Sequence[int]) -> Tensor:
    """The combinations, each (batch, blocks, *axes, positions), put together, the last axis fastest."""
    for number in reversed(range(len(choices))):
        step = choices[number]
        if step > 1:
            pieces = [torch.cat(pieces[at : at + step], dim=2 + number) for at in range(0, len(pieces), step)]
    return pieces[0]


def _coupled(signal: Tensor, ready: Mapping[str, Tensor], group: Group, window: Window | None) -> Tensor:
    """One product, or with a window one convolution, per irreducible: (batch, i, n, *positions) -> (batch, o, ...)."""
    axes = [axis.order for axis in fourier_axes(group)]
    size = tuple(signal.shape[3:])
    flat = signal.reshape(*signal.shape[:3], -1)
    pieces = []
    for number, families in enumerate(_combinations(group)):
        spectrum, k = ready[f"spectrum{number}"], len(families)
        apart = _apart(flat, families, axes)
        counts, copies, sizes = (range(2 + which, 2 + 3 * k, 3) for which in range(3))
        shape = [[getattr(each, what) for each in families] for what in ("count", "copies", "size")]
        batch, last = len(flat), 2 + 3 * k
        if window is None:  # (count, size, blocks | batch, copies, positions)
            order = [*counts, *sizes, 1, 0, *copies, last]
            matrix = apart.permute(order).reshape(len(spectrum), spectrum.shape[2], -1)
            found = torch.bmm(spectrum, matrix)
            blocks = spectrum.shape[1] // prod(shape[2])
            found = found.reshape(*shape[0], *shape[2], blocks, batch, *shape[1], -1)
            inverse = [2 * k + 1, 2 * k]
            inverse += [at for each in range(k) for at in (each, 2 * k + 2 + each, k + each)] + [3 * k + 2]
        else:  # (batch, copies | count, size, blocks | height, width)
            order = [0, *copies, *counts, *sizes, 1, last]
            image = apart.permute(order).reshape(batch * prod(shape[1]), -1, *size)
            groups, moves = len(spectrum), (window.stride, window.padding, window.dilation)
            found = F.conv2d(image, spectrum.flatten(0, 1), None, *moves, groups)
            new = tuple(found.shape[2:])
            blocks = spectrum.shape[1] // prod(shape[2])
            found = found.reshape(batch, *shape[1], *shape[0], *shape[2], blocks, -1)
            inverse = [0, 3 * k + 1]
            inverse += [at for each in range(k) for at in (1 + k + each, 1 + each, 1 + 2 * k + each)] + [3 * k + 2]
        found = found.permute(inverse)
        pieces.append(found.reshape(batch, blocks, *(each.stop - each.start for each in families), found.shape[-1]))
    size = size if window is None else new
    whole = _joined(pieces, [len(_families(axis)) for axis in fourier_axes(group)])
    return whole.reshape(batch, blocks, group.order, *size)


def _gated(signal: Tensor, gates: Tensor) -> Tensor:  # (batch, o·(1+r), n, positions), (o, r, n) -> (batch, o, n, ...)
    """f⋆x + Σ_k a_k ⊙ (b_k⋆x)."""
    o, rank, n = gates.shape
    apart = signal.reshape(len(signal), o, 1 + rank, n, -1)
    weights = gates.to(signal.dtype)[None, :, :, :, None]
    found = apart[:, :, 0]
    for number in range(rank):
        found = torch.addcmul(found, apart[:, :, 1 + number], weights[:, :, number])
    return found


def _group_product(signal: Tensor, ready: Mapping[str, Tensor], structure: Structure, window: Window | None) -> Tensor:
    """The group part applied to (batch, i, n, *positions)."""
    group, bases = structure.acting, _bases(ready, structure)
    size = tuple(signal.shape[3:])
    spectrum = _transformed(signal.reshape(*signal.shape[:3], -1), bases, back=False)
    coupled = _coupled(spectrum.reshape(*spectrum.shape[:3], *size), ready, group, window)
    size = tuple(coupled.shape[3:])
    found = _transformed(coupled.reshape(*coupled.shape[:3], -1), bases, back=True)
    if "gates" in ready:
        found = _gated(found, ready["gates"])
    return found.reshape(*found.shape[:3], *size)


# ---------------------------------------------------------------------------------------------------------------------
# The factor part.


def _factor_linear(rows: Tensor, ready: Mapping[str, Tensor], structure: Structure) -> Tensor:  # (N, columns)
    left, right = ready["left"].flatten(0, -2), ready["right"].flatten(1)
    if structure.grid is None:
        return F.linear(F.linear(rows, right), left)
    (p, q), rank = structure.grid, len(right)
    inner = rows.reshape(len(rows), q, -1).transpose(0, 1) @ right.reshape(rank, q, -1).permute(1, 2, 0)  # (Q, N, r)
    coupled = torch.bmm(inner.permute(2, 1, 0), ready["scales"].permute(2, 1, 0))  # (r, N, Q) (r, Q, P)
    outer = torch.bmm(coupled.permute(2, 1, 0), left.reshape(p, -1, rank).mT)  # (P, N, r) (P, r, a)
    return outer.transpose(0, 1).reshape(len(rows), -1)


def _factor_conv2d(images: Tensor, ready: Mapping[str, Tensor], structure: Structure, window: Window) -> Tensor:
    left, right, (p, q) = ready["left"], ready["right"], structure.grid or (1, 1)
    rank, columns = right.shape[:2]
    (sy, sx), (py, px), (dy, dx) = window.stride, window.padding, window.dilation
    if structure.split:
        first = Window((1, sx), (0, px), (1, dx))
        second = Window((sy, 1), (py, 0), (dy, 1))
        taps: tuple[int, ...] = (1, right.shape[2])
        columnwise = left.mT[..., None]  # (rows, r, ky, 1)
    else:
        first, second, taps = window, Window(), tuple(right.shape[2:])
        columnwise = left[..., None, None]
    rowwise = right.reshape(rank, q, columns // q, *taps).transpose(0, 1).flatten(0, 1)  # (Q·r, columns/Q, *taps)
    inner = F.conv2d(images, rowwise, None, first.stride, first.padding, first.dilation, q)
    if structure.grid is not None:
        apart = inner.reshape(len(inner), q, rank, -1).permute(2, 1, 0, 3).flatten(2)  # (r, Q, N·positions)
        coupled = torch.bmm(ready["scales"].permute(2, 0, 1), apart)  # (r, P, N·positions)
        coupled = coupled.reshape(rank, p, len(inner), -1).permute(2, 1, 0, 3)
        inner = coupled.reshape(len(inner), p * rank, *inner.shape[2:])
    return F.conv2d(inner, columnwise, None, second.stride, second.padding, second.dilation, p)


# ---------------------------------------------------------------------------------------------------------------------
# Whole layers.


def linear(given: Tensor, ready: Mapping[str, Tensor], structure: Structure, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, (*batch, columns) -> (*batch, rows), from what `prepare` made of the weight's tensors.

    >>> shift = prepare({"kernel": torch.tensor([[[0.0, 1.0, 0.0]]])}, Structure.parse("C3"))
    >>> linear(torch.tensor([[1.0, 2.0, 3.0]]), shift, Structure.parse("C3")).round(decimals=4).tolist()
    [[2.0, 3.0, 1.0]]
    """
    rows = given.reshape(-1, given.shape[-1])
    found = None
    if structure.group is not None:
        n = structure.group.order
        if len(rows) <= ROWS:
            found = _group_product(rows.reshape(len(rows), -1, n, 1), ready, structure, None).reshape(len(rows), -1)
        else:
            moved = rows.mT.reshape(1, -1, n, len(rows))
            found = _group_product(moved, ready, structure, None).reshape(-1, len(rows)).mT
    if "left" in ready:
        factors = _factor_linear(rows, ready, structure)
        found = factors if found is None else found + factors
    assert found is not None, "a structure has a group or a factor part"
    if bias is not None:
        found = found + bias.to(found.dtype)
    return found.reshape(*given.shape[:-1], -1)


def conv2d(
    images: Tensor,  # (N, columns, height, width), or without N
    ready: Mapping[str, Tensor],
    structure: Structure,
    bias: Tensor | None = None,
    *,
    window: Window,
) -> Tensor:  # (N, rows, height', width')
    """The convolution with the weight of whose tensors `prepare` made `ready`; it has one convolution group."""
    if images.dim() == 3:
        return conv2d(images[None], ready, structure, bias, window=window)[0]
    found = None
    if structure.group is not None:
        signal = images.reshape(len(images), -1, structure.group.order, *images.shape[2:])
        taps = ready["spectrum0"].shape[3:]
        pointwise = prod(taps) == 1 and window == Window()
        if pointwise:
            plain = {key: each.flatten(2) if key.startswith("spectrum") else each for key, each in ready.items()}
            flat = _group_product(signal.flatten(3), plain, structure, None)
            found = flat.reshape(len(images), -1, *images.shape[2:])
        else:
            found = _group_product(signal, ready, structure, window).flatten(1, 2)
    if "left" in ready:
        factors = _factor_conv2d(images, ready, structure, window)
        found = factors if found is None else found + factors
    assert found is not None, "a structure has a group or a factor part"
    return found if bias is None else found + bias.to(found.dtype)[:, None, None]


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
    window = window or Window()
    height, width = tuple(size[1:]) or (1, 1)
    ky, kx = tuple(shape[2:]) or (1, 1)
    high, wide = window.size(0, height, ky), window.size(1, width, kx)
    outputs = samples * high * wide
    total = 0
    if structure.group is not None:
        more = 1 + structure.displacement
        n, lengths = structure.group.order, sum(axis.order for axis in fourier_axes(structure.group))
        total += lengths * (samples * height * width * columns + outputs * rows * more)
        for families in _combinations(structure.group):
            count, copies, side = (prod(getattr(x, w) for x in families) for w in ("count", "copies", "size"))
            total += outputs * copies * count * side**2 * (rows // n * more) * (columns // n) * ky * kx
    if structure.lowrank:
        inner = samples * height * wide if structure.split else outputs
        coupling = 0 if structure.grid is None else prod(structure.grid)
        across = kx if structure.split else ky * kx
        total += structure.lowrank * (inner * (columns * across + coupling))
        total += structure.lowrank * outputs * rows * (ky if structure.split else 1)
    return total
