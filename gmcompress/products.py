"""The fast product: a structured weight applied without being computed, by small dense matrix products alone.

A block of group matrices is applied as: the inputs' real Fourier transform, one matrix product (or convolution) for
every irreducible representation, and the transform back. Residuals of displacement rank share both transforms; low
ranks and adapted bases are input basis, coupling, output basis. There are no complex numbers, so that everything runs
in half precision, under autocast, and exports; only what `fewrows` does for few inputs on the CPU may use them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from . import kernels
from .errors import GMError
from .factored import Window, factor_conv2d, factor_linear
from .fewrows import ROWS, SPECTRUM, cyclic_orders, few_rows, gated, prepare_few, prepare_waves
from .fourier import Fourier, Irreducibles, fourier_axes
from .groups import Group
from .structure import Structure

Tensors = dict[str, Tensor]

CACHED = 1 << 21  # bytes of inputs, or outputs, of a linear layer that go through all steps together: a core's cache


def why_slow(structure: Structure, conv_groups: int = 1) -> str | None:
    """Why a structure has no fast product, None where it has one.

    >>> why_slow(Structure.parse("D4[G/<1>,G]"))
    'the group acts on rows or columns that are not the group itself'
    """
    if conv_groups > 1:
        return "the convolution is grouped"
    if structure.separable is not None:
        return "a separable kernel is multiplied as a dense one"
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


class _Combination:
    """One family of irreducibles for each axis, and the permutations that bring their coefficients into products.

    The coefficients are (batch, blocks, count, copies, size, count, copies, size, ..., positions); a product wants
    (count, size, blocks | batch, copies, positions), a convolution (batch, copies | count, size, blocks, positions).
    """

    def __init__(self, families: tuple[Irreducibles, ...], lengths: tuple[int, ...]) -> None:
        k = len(families)
        self.families = families
        self.counts = tuple(each.count for each in families)
        self.copies = tuple(each.copies for each in families)
        self.sizes = tuple(each.size for each in families)
        self.blocks, self.repeats, self.size = prod(self.counts), prod(self.copies), prod(self.sizes)
        self.spans = tuple(each.stop - each.start for each in families)
        self.whole = self.spans == lengths
        self.apart = tuple(size for each in families for size in (each.count, each.copies, each.size))
        counts, copies, sizes = (range(2 + which, 2 + 3 * k, 3) for which in range(3))
        last = 2 + 3 * k
        self.for_product = (*counts, *sizes, 1, 0, *copies, last)
        self.for_images = (0, *copies, *counts, *sizes, 1, last)
        self.from_product, self.from_images = _inverse(self.for_product), _inverse(self.for_images)


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes one."""
    return tuple(sorted(range(len(order)), key=lambda each: order[each]))


@dataclass(frozen=True)
class Layout:
    """The axes of a group, and all choices of one family for each, the first axis slowest."""

    lengths: tuple[int, ...]
    choices: tuple[int, ...]
    combinations: tuple[_Combination, ...]


@lru_cache(maxsize=64)
def layout_of(group: Group) -> Layout:
    """How the coefficients of a group are ordered; the same at every call."""
    axes = fourier_axes(group)
    with torch.device("cpu"):  # whatever torch's default is
        lengths, families = tuple(axis.order for axis in axes), [_families(axis) for axis in axes]
        combinations = tuple(_Combination(each, lengths) for each in itertools.product(*families))
    return Layout(lengths, tuple(len(each) for each in families), combinations)


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
    place = tensors["kernel"].device.type
    with torch.autocast(place, enabled=False) if torch.amp.is_autocast_available(place) else nullcontext():
        return ready | _spectra(tensors, structure.group)


def keep(tensors: Mapping[str, Tensor], structure: Structure) -> Tensors:
    """What `prepare` makes, and what helps with few inputs, for a weight that stays as it is."""
    ready = prepare(tensors, structure)
    if structure.group is None:
        return ready
    layout, factors = layout_of(structure.group), structure.group.factors
    first, *others = layout.combinations
    few = {} if others or first.repeats > 1 else prepare_few(ready, first.counts, first.sizes)
    if few and len(layout.lengths) == 1 and len(factors) > 1:  # one small product in place of transforms of short axes
        return ready | few
    return ready | (prepare_waves(tensors, cyclic_orders(structure.group)) or few)


def _spectra(tensors: Mapping[str, Tensor], group: Group) -> Tensors:
    """The bases, the spectra of kernel and filters, and the gates."""
    ready = {"gates": tensors["gates"]} if "gates" in tensors else {}
    kernel = tensors["kernel"].unsqueeze(1)  # (o, 1, i, n, *taps)
    if "gates" in tensors:
        kernel = torch.cat([kernel, tensors["filters"]], dim=1)
    o, more, i, _, *taps = kernel.shape
    layout = layout_of(group)
    wide = torch.promote_types(kernel.dtype, torch.float32)
    apart = kernel.to(wide).movedim(3, 0).reshape(group.order, -1)  # whose transforms move no single numbers
    for number, basis in enumerate(_constants(group, kernel.dtype, kernel.device)):
        ready[f"basis{number}"] = basis
    for number, each in enumerate(layout.combinations):
        found, done = apart, 1
        for length, family in zip(layout.lengths, each.families, strict=True):  # n -> count·size·size, the first first
            matrices = _matrices(family, wide, kernel.device).flatten(0, 2)
            found = torch.matmul(matrices, found.reshape(done, length, -1))
            done *= len(matrices)
        k = 3 * len(each.families)
        sizes = tuple(size for family in each.families for size in (family.count, family.size, family.size))
        order = [*range(0, k, 3), *range(1, k, 3), k, *range(2, k, 3), k + 1]
        spectrum = found.reshape(*sizes, o * more, -1).permute(order)
        spectrum = spectrum.reshape(each.blocks, each.size * o * more, each.size * i, *taps)
        ready[f"spectrum{number}"] = spectrum.to(kernel.dtype).contiguous()
    return ready


def _transformed(signal: Tensor, bases: Sequence[Tensor], *, back: bool) -> Tensor:  # (batch, blocks, n, positions)
    """The Fourier transform along the group, or back from it, one axis after the other."""
    shape, rest = signal.shape, signal.shape[3]
    for basis in reversed(bases):
        size = basis.shape[0]
        if rest == 1:
            signal = signal.reshape(-1, size) @ (basis.mT if back else basis)
        else:
            signal = torch.matmul(basis if back else basis.mT, signal.reshape(-1, size, rest))
        rest *= size
    return signal.reshape(shape)


def _coefficients(signal: Tensor, choice: _Combination, layout: Layout) -> Tensor:
    """The coefficients of one combination, as it documents them, of all of them: (batch, blocks, n, positions)."""
    batch, blocks, _, positions = signal.shape
    if not choice.whole:
        signal = signal.reshape(batch, blocks, *layout.lengths, positions)
        for number, family in enumerate(choice.families):
            signal = signal.narrow(2 + number, family.start, choice.spans[number])
    return signal.reshape(batch, blocks, *choice.apart, positions)


def _joined(pieces: list[Tensor], choices: Sequence[int]) -> Tensor:
    """The combinations, each (batch, blocks, *axes, positions), put together, the last axis fastest."""
    for number in reversed(range(len(choices))):
        step = choices[number]
        if step > 1:
            pieces = [torch.cat(pieces[at : at + step], dim=2 + number) for at in range(0, len(pieces), step)]
    return pieces[0]


def _coupled(signal: Tensor, ready: Mapping[str, Tensor], layout: Layout, window: Window | None) -> Tensor:
    """One product, or with a window one convolution, per irreducible: (batch, i, n, *positions) -> (batch, o, ...)."""
    size, order = tuple(signal.shape[3:]), signal.shape[2]
    flat = signal.flatten(3)
    batch, pieces = flat.shape[0], []
    for number, each in enumerate(layout.combinations):
        spectrum = ready[f"spectrum{number}"]
        apart, blocks = _coefficients(flat, each, layout), spectrum.shape[1] // each.size
        if window is None:
            matrix = apart.permute(each.for_product).reshape(each.blocks, spectrum.shape[2], -1)
            found = torch.bmm(spectrum, matrix)
            found = found.reshape(*each.counts, *each.sizes, blocks, batch, *each.copies, -1)
            found, new = found.permute(each.from_product), size
        else:
            image = apart.permute(each.for_images).reshape(batch * each.repeats, -1, *size)
            moves = (window.stride, window.padding, window.dilation)
            found = F.conv2d(image, spectrum.flatten(0, 1), None, *moves, each.blocks)
            new = tuple(found.shape[2:])
            found = found.reshape(batch, *each.copies, *each.counts, *each.sizes, blocks, -1)
            found = found.permute(each.from_images)
        pieces.append(found.reshape(batch, blocks, *each.spans, found.shape[-1]))
    return _joined(pieces, layout.choices).reshape(batch, blocks, order, *new)


def _group_product(signal: Tensor, ready: Mapping[str, Tensor], layout: Layout, window: Window | None) -> Tensor:
    """The group part applied to (batch, i, n, *positions)."""
    bases = [ready[f"basis{number}"] for number in range(len(layout.lengths))]
    size = tuple(signal.shape[3:])
    spectrum = _transformed(signal.reshape(*signal.shape[:3], -1), bases, back=False)
    coupled = _coupled(spectrum.reshape(*spectrum.shape[:3], *size), ready, layout, window)
    size = tuple(coupled.shape[3:])
    found = _transformed(coupled.reshape(*coupled.shape[:3], -1), bases, back=True)
    if "gates" in ready:
        o, rank, n = ready["gates"].shape
        gates = ready["gates"].to(found.dtype)[None, :, :, :, None]
        found = gated(found.reshape(found.shape[0], o, 1 + rank, n, -1), gates, 2)
    return found.reshape(*found.shape[:3], *size)


# ---------------------------------------------------------------------------------------------------------------------
# Whole layers.


def linear(
    given: Tensor,  # (*batch, columns)
    ready: Mapping[str, Tensor],
    structure: Structure,
    bias: Tensor | None = None,
    *,
    layout: Layout | None = None,  # that of the group, where the caller keeps it: a compiler sees through no cache
    interpret: bool = False,  # a CUDA kernel on the CPU, by Triton's interpreter
) -> Tensor:  # (*batch, rows)
    """x Wᵀ + b from what `prepare` made of the weight's tensors; on a CUDA device by a kernel, where it has one.

    >>> shift = prepare({"kernel": torch.tensor([[[0.0, 1.0, 0.0]]])}, Structure.parse("C3"))
    >>> linear(torch.tensor([[1.0, 2.0, 3.0]]), shift, Structure.parse("C3")).round(decimals=4).tolist()
    [[2.0, 3.0, 1.0]]
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not given.numel():
        one = torch.cat([given.reshape(0, given.shape[-1]), given.new_zeros(1, given.shape[-1])])
        single = linear(one, ready, structure, bias, layout=layout)
        return single[:0].reshape(*given.shape[:-1], single.shape[-1])
    rows, shape = given.reshape(-1, given.shape[-1]), (*given.shape[:-1], -1)
    few = not compiling and SPECTRUM in ready and rows.shape[0] <= ROWS
    if few and not (rows.is_cuda or interpret):
        return _few(rows, ready, structure, bias).view(shape)
    if structure.group is None:
        return _rows_product(rows, ready, structure, None, bias).reshape(shape)
    layout = layout or layout_of(structure.group)
    plain = partial(_rows_product, structure=structure, layout=layout, bias=bias)
    if compiling:
        return plain(rows, ready).reshape(shape)
    if few:
        plain = partial(_few, structure=structure, bias=bias)
    sizes = layout.combinations[0].sizes
    fits = (rows.is_cuda or interpret) and kernels.supports(rows, ready, sizes, bias, interpret=interpret) is None
    if fits and (interpret or kernels.pays(rows, ready, sizes, plain)):
        return _with_factors(kernels.product(rows, ready, sizes, bias), rows, ready, structure).reshape(shape)
    widest = max(given.shape[-1], ready["spectrum0"].shape[1] // layout.combinations[0].size * structure.group.order)
    pieces = rows.split(max(2 * ROWS, CACHED // (widest * rows.element_size())))
    found = [plain(each, ready) for each in pieces]
    return (found[0] if len(found) == 1 else torch.cat(found)).reshape(shape)


def _few(
    rows: Tensor, ready: Mapping[str, Tensor], structure: Structure, bias: Tensor | None
) -> Tensor:  # (N, columns) -> (N, rows)
    """The product of few inputs, on the shortest way."""
    return _with_factors(few_rows(rows, ready, bias), rows, ready, structure)


def _with_factors(
    found: Tensor, rows: Tensor, ready: Mapping[str, Tensor], structure: Structure
) -> Tensor:  # (N, rows), (N, columns) -> (N, rows)
    """The product of the group part, and that of a low-rank residual added."""
    return found + factor_linear(rows, ready, structure) if "left" in ready else found


def _rows_product(
    rows: Tensor, ready: Mapping[str, Tensor], structure: Structure, layout: Layout | None, bias: Tensor | None
) -> Tensor:  # (N, columns) -> (N, rows)
    found = None
    if structure.group is not None:
        assert layout is not None, "a group has a layout"
        n = structure.group.order
        if torch.compiler.is_compiling() or rows.shape[0] > ROWS:  # a graph is for any number of them
            moved = rows.mT.reshape(1, -1, n, rows.shape[0])
            found = _group_product(moved, ready, layout, None).reshape(-1, rows.shape[0]).mT
        else:
            found = _group_product(rows.reshape(rows.shape[0], -1, n, 1), ready, layout, None)
            found = found.reshape(rows.shape[0], -1)
    if "left" in ready:
        factors = factor_linear(rows, ready, structure)
        found = factors if found is None else found + factors
    assert found is not None, "a structure has a group or a factor part"
    return found if bias is None else found + bias.to(found.dtype)


def conv2d(
    images: Tensor,  # (N, columns, height, width), or without N
    ready: Mapping[str, Tensor],
    structure: Structure,
    bias: Tensor | None = None,
    *,
    window: Window,
    layout: Layout | None = None,
) -> Tensor:  # (N, rows, height', width')
    """The convolution with the weight of whose tensors `prepare` made `ready`; it has one convolution group."""
    if images.dim() == 3:
        return conv2d(images[None], ready, structure, bias, window=window, layout=layout)[0]
    if not torch.compiler.is_compiling() and not images.shape[0]:
        one = torch.cat([images, images.new_zeros(1, *images.shape[1:])])
        return conv2d(one, ready, structure, bias, window=window, layout=layout)[:0]
    found = None
    if structure.group is not None:
        layout = layout or layout_of(structure.group)
        signal = images.reshape(images.shape[0], -1, structure.group.order, *images.shape[2:])
        taps = ready["spectrum0"].shape[3:]
        pointwise = prod(taps) == 1 and window == Window()
        if pointwise:
            plain = {key: each.flatten(2) if key.startswith("spectrum") else each for key, each in ready.items()}
            flat = _group_product(signal.flatten(3), plain, layout, None)
            found = flat.reshape(images.shape[0], -1, *images.shape[2:])
        else:
            found = _group_product(signal, ready, layout, window).flatten(1, 2)
    if "left" in ready:
        factors = factor_conv2d(images, ready, structure, window)
        found = factors if found is None else found + factors
    assert found is not None, "a structure has a group or a factor part"
    return found if bias is None else found + bias.to(found.dtype)[:, None, None]
