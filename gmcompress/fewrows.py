"""The fast product for a few inputs: one multiplication and one sum in place of many small matrix products.

With a single input a product of group matrices takes less time than the calls that lead to it, and a batch of small
matrices times vectors is slow. So bases and spectra are kept in an order in which the frequencies are the last axis:
no step moves single numbers, and the irreducible blocks are applied by an elementwise product that is summed up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

ROWS = 4  # inputs, at most: with more, matrix products are faster
LARGEST = 1 << 18  # entries of the spectra, at most: larger ones do not stay in the cache, and time is that of reading
BASES = ("few_basis0", "few_basis1")
SPECTRUM = "few_spectrum"


def prepare_few(
    ready: Mapping[str, Tensor],  # as `products.prepare` makes it, of a group with one family of irreducibles per axis
    counts: Sequence[int],  # of irreducibles, by axis
    sizes: Sequence[int],  # of an irreducible, by axis
) -> dict[str, Tensor]:
    """Bases and spectra with the frequencies last; nothing where matrix products are the better way.

    `few_basis0`, … are (n, n), their columns (size, count) where those of the given ones are (count, size);
    `few_spectrum` is (o·(1+r)·D, i·D, M).
    """
    spectrum = ready["spectrum0"]  # (M, D·o·(1+r), D·i)
    linear = spectrum.dim() == 3 and len(counts) <= len(BASES)
    if not linear or spectrum.numel() > LARGEST or spectrum.dtype not in (torch.float32, torch.float64):
        return {}
    found = {}
    for number, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        basis = ready[f"basis{number}"]
        found[BASES[number]] = basis.unflatten(1, (count, size)).transpose(1, 2).flatten(1).contiguous()
    axes, size = len(counts), prod(sizes)
    apart = spectrum.reshape(*counts, *sizes, spectrum.shape[1] // size, *sizes, spectrum.shape[2] // size)
    outputs, inputs = [2 * axes, *range(axes, 2 * axes)], [3 * axes + 1, *range(2 * axes + 1, 3 * axes + 1)]
    moved = apart.permute(*outputs, *inputs, *range(axes))
    found[SPECTRUM] = moved.reshape(spectrum.shape[1], spectrum.shape[2], spectrum.shape[0])
    return found


def few_rows(
    rows: Tensor,  # (N, columns)
    ready: Mapping[str, Tensor],
    counts: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:  # (N, o·(1+r)·n)
    """The group part applied to few rows, gates aside."""
    spectrum, first, samples = ready[SPECTRUM], ready[BASES[0]], rows.shape[0]
    if len(counts) == 1:
        found = torch.mm(rows.reshape(-1, first.shape[0]), first)
        found = (spectrum * found.view(samples, 1, spectrum.shape[1], -1)).sum(2)
        return torch.mm(found.view(-1, first.shape[0]), first.mT).view(samples, -1)
    second, (high, wide), (tall, broad) = ready[BASES[1]], counts, sizes
    n, m = first.shape[0], second.shape[0]
    found = torch.mm(rows.reshape(-1, m), second).view(-1, n, m)
    found = torch.bmm(first.mT.expand(found.shape[0], n, n), found)
    found = found.view(-1, tall, high, broad, wide).transpose(2, 3).reshape(samples, 1, spectrum.shape[1], -1)
    found = (spectrum * found).sum(2)
    found = found.view(-1, tall, broad, high, wide).transpose(2, 3).reshape(-1, n, m)
    found = torch.bmm(first.expand(found.shape[0], n, n), found)
    return torch.mm(found.view(-1, m), second.mT).view(samples, -1)
