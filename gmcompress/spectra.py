"""Correlation on a product of cyclic groups through its Fourier coefficients: cosines, sines and matrix products alone.

A coefficient is a real and an imaginary number on an axis of its own, and of the frequencies of the last axis half are
enough, because signals are real. The cosines and sines are the characters of `fourier`. No complex numbers and no FFT:
it runs in every dtype, and exports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .fourier import Matrix, characters

CHUNK = 1 << 19  # coefficients of a kernel that are made at once, so that they stay in the cache
KEPT = 1 << 22  # coefficients of a kernel above which the backward pass makes them again instead of keeping them


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The transforms of signals on a product of cyclic groups C_k1 × … × C_kd, n = Πk, and of kernels on some taps.

    `forward` and `inverse` hold a matrix for each axis, the last axis with cosines and sines of H = ⌊k/2⌋ + 1
    frequencies, the others with complex multiplication written as a real matrix; `inverse` stops at every `stride`-th
    place. There are f = H·Πk (without the last k) coefficients.
    """

    axes: tuple[int, ...]
    forward: tuple[Matrix, ...]  # (2k, 2k) from (place, part) to (part, frequency), and last (2H, k)
    inverse: tuple[Matrix, ...]  # (2k/s, 2k), and last (k/s, 2H)
    # a pair of taps u, −u has one cosine and, up to sign, one sine: e pairs and single taps
    waves: Matrix | None  # (2, f, e), cosine and sine; None where transforming the whole kernel is cheaper
    fold: Matrix  # (2, e, t), the sums and the differences over pairs

    @property
    def frequencies(self) -> int:
        """Number of complex coefficients of a real signal."""
        return prod(self.axes[:-1]) * (self.axes[-1] // 2 + 1)


def transform_macs(axes: tuple[int, ...]) -> int:
    """Multiply-adds that transform one channel, one axis after the other.

    >>> transform_macs((32, 32))
    104448
    """
    n, half = prod(axes), axes[-1] // 2 + 1
    return n * 2 * half + sum(n // axes[-1] * 2 * half * 2 * each for each in axes[:-1])


def multiply_adds(
    found: Spectrum,
    kernel: Sequence[int],  # (o, i, t)
    batch: int,
) -> int:
    """Multiply-adds of `correlate`: the transforms of signals and kernel, the coefficients' products, and back.

    >>> multiply_adds(spectrum((3,), (1,), np.array([[1]])), (1, 1, 1), 1)
    38
    """
    o, i, t = kernel
    f, each = found.frequencies, transform_macs(found.axes)
    of_kernel = each if found.waves is None else 2 * found.waves.shape[2] * (f + t)
    total = each * batch * i + of_kernel * i * o + 4 * f * batch * i * o
    before, behind = 1, f * batch * o
    for order, matrix in zip(found.axes[:-1], found.inverse[:-1], strict=True):
        behind //= order
        total += before * matrix.size * behind
        before *= matrix.shape[0] // 2
    return total + before * found.inverse[-1].size * batch * o


def spectrum(
    axes: tuple[int, ...],
    stride: tuple[int, ...],
    places: NDArray[np.int64],  # (t, d): the taps
) -> Spectrum:
    """The matrices, in float64.

    >>> found = spectrum((4, 6), (1, 2), np.array([[0, 0], [0, 1]]))
    >>> found.frequencies, [each.shape for each in found.inverse]
    (16, [(8, 8), (3, 8)])
    """
    forward: list[Matrix] = []
    inverse: list[Matrix] = []
    for order, step in zip(axes[:-1], stride[:-1], strict=True):
        every = np.arange(order)[:, None]
        cos, sin = characters([order], every, every)  # (frequency, place)
        # (a + ib)(cos − i·sin) = (a·cos + b·sin) + i(b·cos − a·sin)
        matrix = np.stack([np.stack([cos, sin], 2), np.stack([-sin, cos], 2)]).reshape(2 * order, 2 * order)
        forward.append(matrix)
        inverse.append(matrix.T.reshape(order, 2, -1)[::step].reshape(-1, 2 * order) / order)
    order, half = axes[-1], axes[-1] // 2 + 1
    cos, sin = characters([order], np.arange(half)[:, None], np.arange(order)[:, None])
    forward.append(np.concatenate([cos, -sin]))
    twice = np.where((2 * np.arange(half)) % order == 0, 1.0, 2.0)  # a frequency and its negative, where they differ
    inverse.append((forward[-1] * np.tile(twice, 2)[:, None]).T[:: stride[-1]] / order)
    first, fold = _fold(axes, places)
    waves = None
    if 2 * prod(axes[:-1]) * half * len(first) <= transform_macs(axes):
        grid = np.meshgrid(*map(np.arange, axes[:-1]), np.arange(half), indexing="ij")
        waves = np.stack(characters(axes, np.stack([each.ravel() for each in grid], 1), first))
    return Spectrum(axes, tuple(forward), tuple(inverse), waves, fold)


def _fold(axes: tuple[int, ...], places: NDArray[np.int64]) -> tuple[NDArray[np.int64], Matrix]:
    """The first place of each pair u, −u, and which taps it adds up: with equal signs, and −u with the other one."""
    numbers = np.ravel_multi_index(tuple(places.T), axes)
    opposite = np.ravel_multi_index(tuple((-places % np.array(axes)).T), axes)
    _, first, pair = np.unique(np.minimum(numbers, opposite), return_index=True, return_inverse=True)
    fold = np.zeros((2, len(first), len(places)))
    fold[:, pair, np.arange(len(places))] = np.stack(
        [np.ones(len(places)), np.where(numbers == numbers[first][pair], 1, -1)]
    )
    return places[first], fold


def correlate(
    signal: Tensor,  # (batch, i, n)
    kernel: Tensor,  # (o, i, t)
    found: Spectrum,
    places: Tensor,  # (t,) the taps as elements
) -> Tensor:  # (batch, o, m)
    """y[b, o, h] = Σ_c Σ_u kernel[o, c, u] signal[b, c, h + u]: coefficient by coefficient, ŷ = conj(k̂)·x̂.

    >>> ring = spectrum((3,), (1,), np.array([[1]]))
    >>> correlate(torch.tensor([[[1.0, 2, 3]]]), torch.ones(1, 1, 1), ring, torch.tensor([1])).round()
    tensor([[[2., 3., 1.]]])
    """
    batch, (o, i, t) = signal.shape[0], kernel.shape
    f = found.frequencies
    coefficients = _transform(signal.permute(2, 0, 1).flatten(1), found)  # (2, f, batch·i)
    coefficients = coefficients.transpose(0, 1).reshape(f, 2 * batch, i)
    columns = kernel.permute(2, 1, 0).reshape(t, i * o)
    if found.waves is None:
        filled = columns.new_zeros(prod(found.axes), i * o).index_copy(0, places, columns)
        real, imaginary = _transform(filled, found)
        pieces = [_product(coefficients, torch.stack([real, -imaginary]).unflatten(2, (i, o)))]
    else:
        waves = torch.as_tensor(found.waves, dtype=signal.dtype, device=signal.device)
        folded = (torch.as_tensor(found.fold, dtype=kernel.dtype, device=kernel.device) @ columns).to(columns)
        step = max(1, CHUNK // (2 * i * o))
        again = torch.is_grad_enabled() and 2 * f * i * o > KEPT
        pieces = [
            checkpoint(_filtered, *some, folded, o, use_reentrant=False, preserve_rng_state=False)
            if again
            else _filtered(*some, folded, o)
            for some in zip(coefficients.split(step), waves.split(step, 1), strict=True)
        ]
    del coefficients
    spread = torch.cat(pieces, 1).flatten(2)  # (2, f, batch·o)
    del pieces
    return _restore(spread, found).unflatten(1, (batch, o)).permute(1, 2, 0)


def _filtered(coefficients: Tensor, waves: Tensor, folded: Tensor, o: int) -> Tensor:
    """The product of some of the coefficients with those of the kernel."""
    return _product(coefficients, (waves @ folded).unflatten(2, (-1, o)))


def _product(x: Tensor, k: Tensor) -> Tensor:  # (f, 2·batch, i), (2, f, i, o) -> (2, f, batch, o)
    """(cos + i·sin)(a + ib) = (cos·a − sin·b) + i(cos·b + sin·a)."""
    cos, sin = ((x @ each).unflatten(1, (2, -1)) for each in k)  # (f, a or b, batch, o)
    return torch.stack([cos[:, 0] - sin[:, 1], cos[:, 1] + sin[:, 0]])


def _transform(values: Tensor, found: Spectrum) -> Tensor:  # (n, w) -> (2, f, w)
    """Last axis first; each axis of places, with that of the parts behind it, becomes (parts, frequencies)."""
    matrices = [torch.as_tensor(each, dtype=values.dtype, device=values.device) for each in found.forward]
    before, behind = prod(found.axes[:-1]), matrices[-1].shape[0] // 2 * values.shape[1]
    state = matrices[-1] @ values.reshape(before, found.axes[-1], values.shape[1])
    for order, matrix in zip(found.axes[-2::-1], matrices[-2::-1], strict=True):
        before //= order
        state = matrix @ state.reshape(before, 2 * order, behind)
        behind *= order
    return state.reshape(2, found.frequencies, values.shape[1])


def _restore(state: Tensor, found: Spectrum) -> Tensor:  # (2, f, w) -> (m, w)
    """First axis first, and only the places that are wanted."""
    wide, before, behind = state.shape[2], 1, found.frequencies * state.shape[2]
    matrices = [torch.as_tensor(each, dtype=state.dtype, device=state.device) for each in found.inverse]
    for order, matrix in zip(found.axes[:-1], matrices[:-1], strict=True):
        behind //= order
        state = matrix @ state.reshape(before, 2 * order, behind)
        before *= matrix.shape[0] // 2
    return (matrices[-1] @ state.reshape(before, matrices[-1].shape[1], wide)).flatten(0, 1)
