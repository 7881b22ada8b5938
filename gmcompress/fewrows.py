"""The fast product for a few inputs: one multiplication and one sum in place of many small matrix products.

With a single input a product of group matrices takes less time than the calls that lead to it, and a batch of small
matrices times vectors is slow. So bases and spectra are kept in an order in which the frequencies are the last axis:
no step moves single numbers, none of a single input moves anything, and the irreducible blocks are applied by an
elementwise product that is summed up. Outputs come first in it, so that the thread that multiplies a part also sums it
up: numbers that another core has just written take longer to read than to compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

ROWS = 4  # inputs, at most: with more, matrix products are faster
LARGEST = 1 << 18  # entries of the spectra, at most: larger ones do not stay in the cache, and time is that of reading
BASES = ("few_basis0", "few_basis1")
SPECTRUM, GATES = "few_spectrum", "few_gates"


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
    if not linear or spectrum.numel() > LARGEST or spectrum.dtype not in (torch.float32, torch.float64):
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
    found = found.view(samples, -1)
    if GATES in ready:
        gates = ready[GATES].to(found.dtype)
        found = gated(found.view(samples, -1, gates.shape[1]), gates[None], 1)
    return found if bias is None or early else found + bias.to(found.dtype)


def _coupled(found: Tensor, spectrum: Tensor, samples: int, size: int) -> Tensor:
    """The irreducible blocks applied: (size, N, J, M), of whatever shape, and (K, size·J, M) -> (N, K, M)."""
    if samples > 1 and size > 1:
        found = found.view(size, samples, -1).transpose(0, 1).contiguous()
    return (spectrum * found.view(samples, 1, *spectrum.shape[1:])).sum(2)


def gated(signals: Tensor, gates: Tensor, axis: int) -> Tensor:
    """f⋆x + Σ_k a_k ⊙ (b_k⋆x): the signals have 1 + r parts along an axis, and the gates r."""
    whole, *parts = signals.unbind(axis)
    for part, gate in zip(parts, gates.unbind(axis), strict=True):
        whole = torch.addcmul(whole, part, gate)
    return whole
