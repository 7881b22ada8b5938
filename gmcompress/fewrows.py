"""The fast product for a few inputs: one multiplication and one sum in place of many small matrix products.

For products of cyclic groups on the CPU that is done in between of fast Fourier transforms, of complex numbers, which
read the least; where these cannot be, and for other groups, in between of products with real bases.

With a single input a product of group matrices takes less time than the calls that lead to it, and a batch of small
matrices times vectors is slow. So bases and spectra are kept in an order in which the frequencies are the last axis:
no step moves single numbers, none of a single input moves anything, and the irreducible blocks are applied by an
elementwise product that is summed up. Outputs come first in it, so that the thread that multiplies a part also sums it
up: numbers that another core has just written take longer to read than to compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from .groups import Group

ROWS = 4  # inputs, at most: with more, matrix products are faster
FFT_ROWS = 8  # with fast Fourier transforms
WIDEST = 3 << 19  # numbers in the product of all spectra with all inputs' coefficients, at most: memory, and time
LARGEST = 1 << 18  # entries of the spectra, at most: larger ones do not stay in the cache, and time is that of reading
WHOLE = (torch.float32, torch.float64)
BASES = ("few_basis0", "few_basis1")
SPECTRUM, WAVES, GATES = "few_spectrum", "few_waves", "few_gates"


def prepare_few(
    ready: Mapping[str, Tensor],  # as `products.prepare` makes it, of a group with one family of irreducibles per axis
    counts: Sequence[int],  # of irreducibles, by axis
    sizes: Sequence[int],  # of an irreducible, by axis
) -> dict[str, Tensor]:
    """Bases, spectra and gates with the frequencies last; nothing where matrix products are the better way.

    `few_basis0` is (n, n), its columns (size, count) where those of the given one are (count, size); `few_basis1`, of
    a second axis, is (size, count, m). `few_spectrum` is (size1·(1+r)·o·size0, size1·i·size0, M), outputs in front, and
    `few_gates` (r, o·n).
    """
    spectrum = ready["spectrum0"]  # (M, D·o·(1+r), D·i)
    linear = spectrum.dim() == 3 and len(counts) <= len(BASES)
    if not linear or spectrum.numel() > LARGEST or spectrum.dtype not in WHOLE:
        return {}
    apart = [
        ready[f"basis{number}"].unflatten(1, each) for number, each in enumerate(zip(counts, sizes, strict=True))
    ]  # (n, count, size)
    found = {BASES[0]: apart[0].transpose(1, 2).flatten(1).contiguous()}
    if len(counts) > 1:
        found[BASES[1]] = apart[1].permute(2, 1, 0).contiguous()
    axes, size, more = len(counts), prod(sizes), 1
    if "gates" in ready:
        gates = ready["gates"].detach()  # (o, r, n)
        found[GATES], more = gates.transpose(0, 1).flatten(1).contiguous(), 1 + gates.shape[1]
    split = spectrum.reshape(*counts, *sizes, -1, more, *sizes, spectrum.shape[2] // size)
    outputs, o, inputs = range(axes, 2 * axes), 2 * axes, range(2 * axes + 2, 3 * axes + 2)
    summed, kept = (*inputs[1:], inputs.stop, inputs[0]), (*outputs[1:], o + 1, o, outputs[0])
    moved = split.permute(*kept, *summed, *range(axes))
    found[SPECTRUM] = moved.reshape(spectrum.shape[1], spectrum.shape[2], spectrum.shape[0])
    return found


def few_rows(
    rows: Tensor,  # (N, columns)
    ready: Mapping[str, Tensor],
    bias: Tensor | None,  # (o·n,)
) -> Tensor:  # (N, o·n)
    """The group part applied to few rows, and the bias added."""
    first, second = ready[BASES[0]], ready.get(BASES[1])
    samples, n, m = rows.shape[0], first.shape[0], (first if second is None else second).shape[-1]
    # a single input without gates takes the bias along in its last product
    early = bias is not None and samples == 1 and GATES not in ready
    start = bias.to(first.dtype).view(-1, m) if bias is not None and early else first.new_zeros(())
    if second is None:
        found = torch.mm(rows.reshape(-1, n), first)
        found = _coupled(found, ready[SPECTRUM], samples, 1)
        found = torch.addmm(start, found.view(-1, n), first.mT, beta=int(early))
    else:
        size, wide, _ = second.shape
        found = torch.bmm(rows.reshape(1, -1, m).expand(size, -1, m), second.mT).view(-1, n, wide)
        found = torch.bmm(first.mT.expand(found.shape[0], n, n), found)
        found = _coupled(found, ready[SPECTRUM], samples, size).view(-1, n, wide)
        found = torch.bmm(first.expand(found.shape[0], n, n), found)
        if samples > 1:
            found = found.view(samples, size, -1).transpose(0, 1).contiguous()
        found = torch.addbmm(start, found.view(size, -1, wide), second, beta=int(early))
    return _finished(found.view(samples, -1), ready.get(GATES), None if early else bias)


def _coupled(found: Tensor, spectrum: Tensor, samples: int, size: int) -> Tensor:
    """The irreducible blocks applied: (size, N, J, M), of whatever shape, and (K, size·J, M) -> (N, K, M)."""
    if samples > 1 and size > 1:
        found = found.view(size, samples, -1).transpose(0, 1).contiguous()
    return (spectrum * found.view(samples, 1, *spectrum.shape[1:])).sum(2)


def _finished(found: Tensor, gates: Tensor | None, bias: Tensor | None) -> Tensor:
    """Gates and bias: (N, (1+r)·o·n) -> (N, o·n)."""
    if gates is not None:
        found = gated(found.view(found.shape[0], -1, gates.shape[1]), gates[None].to(found.dtype), 1)
    if bias is None:
        return found
    return found + (bias if bias.dtype is found.dtype else bias.to(found.dtype))


def cyclic_orders(group: Group) -> tuple[int, ...]:
    """Of a product of cyclic groups of order 3 and more, numbered as residues are, their orders; () of others."""
    factors = group.factors or (group,)
    for each in factors:
        residues = np.arange(each.order)
        if each.order < 3 or not np.array_equal(each.table, (residues[:, None] + residues) % each.order):
            return ()
    return tuple(each.order for each in factors)


def prepare_waves(
    tensors: Mapping[str, Tensor],  # the stored ones
    orders: tuple[int, ...],  # of the cyclic groups
) -> dict[str, Tensor]:
    """Spectra and gates for fast Fourier transforms; nothing where there are none, or too many numbers.

    `few_waves` is ((1+r)·o, i, *orders, 2), the last of the orders halved: the conjugate transforms of kernel and
    filters, real and imaginary parts; `few_gates` is (r, o·n).
    """
    kernel = tensors["kernel"].detach()  # (o, i, n)
    if not orders or kernel.dim() != 3 or kernel.device.type != "cpu" or kernel.dtype not in WHOLE:
        return {}
    found, parts = {}, kernel[None]
    if "gates" in tensors:
        found[GATES] = tensors["gates"].detach().transpose(0, 1).flatten(1).contiguous()
        parts = torch.cat([parts, tensors["filters"].detach().transpose(0, 1)])
    if 2 * parts.numel() // orders[-1] * (orders[-1] // 2 + 1) > WIDEST:
        return {}
    waves = torch.fft.rfftn(parts.reshape(-1, kernel.shape[1], *orders), orders)
    return found | {WAVES: torch.view_as_real(waves.conj().resolve_conj()).contiguous()}


class Waves:
    """The group part applied to few inputs by fast Fourier transforms, and the bias added."""

    __slots__ = ("_apart", "_gates", "_orders", "_waves", "most")

    def __init__(
        self,
        ready: Mapping[str, Tensor],  # what `prepare_waves` made
        columns: int,  # of the weight
    ) -> None:
        self._waves, self._gates = torch.view_as_complex(ready[WAVES]), ready.get(GATES)
        _, blocks, *orders, _ = self._waves.shape
        self._orders = (*orders, columns // (blocks * prod(orders)))
        self._apart = (-1, 1, blocks, *self._orders)
        self.most = min(FFT_ROWS, WIDEST // ready[WAVES].numel())  # inputs

    def __call__(
        self,
        rows: Tensor,  # (N, columns)
        bias: Tensor | None,  # (o·n,)
    ) -> Tensor:  # (N, o·n)
        found = (self._waves * torch.fft.rfftn(rows.reshape(self._apart), self._orders)).sum(2)
        found = torch.fft.irfftn(found, self._orders).view(len(rows), -1)  # (N, (1+r)·o·n)
        return _finished(found, self._gates, bias)


def gated(signals: Tensor, gates: Tensor, axis: int) -> Tensor:
    """f⋆x + Σ_k a_k ⊙ (b_k⋆x): the signals have 1 + r parts along an axis, and the gates r."""
    whole, *parts = signals.unbind(axis)
    for part, gate in zip(parts, gates.unbind(axis), strict=True):
        whole = torch.addcmul(whole, part, gate)
    return whole
