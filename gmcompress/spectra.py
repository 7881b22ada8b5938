"""Correlation on a product of cyclic groups through its Fourier coefficients: cosines, sines and matrix products alone.

A coefficient is a real and an imaginary number on an axis of its own, and of the frequencies of the last axis half are
enough, because signals are real. No complex numbers and no FFT: it runs in every dtype, and exports.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 19  # coefficients of a kernel that are made at once, so that they stay in the cache
KEPT = 1 << 22  # coefficients of a kernel above which the backward pass makes them again instead of keeping them

Matrix = NDArray[np.float64]


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
    taps: Matrix | None  # (f, 2, t), cosine and sine at every tap; None where transforming the whole kernel is cheaper

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
        angle = 2 * np.pi * np.outer(np.arange(order), np.arange(order)) / order  # (frequency, place)
        cos, sin = np.cos(angle), np.sin(angle)
        # (a + ib)(cos − i·sin) = (a·cos + b·sin) + i(b·cos − a·sin)
        matrix = np.stack([np.stack([cos, sin], 2), np.stack([-sin, cos], 2)]).reshape(2 * order, 2 * order)
        forward.append(matrix)
        inverse.append(matrix.T.reshape(order, 2, -1)[::step].reshape(-1, 2 * order) / order)
    order, half = axes[-1], axes[-1] // 2 + 1
    angle = 2 * np.pi * np.outer(np.arange(half), np.arange(order)) / order
    forward.append(np.concatenate([np.cos(angle), -np.sin(angle)]))
    twice = np.where((2 * np.arange(half)) % order == 0, 1.0, 2.0)  # a frequency and its negative, where they differ
    inverse.append((forward[-1] * np.tile(twice, 2)[:, None]).T[:: stride[-1]] / order)
    taps = None
    if 2 * prod(axes[:-1]) * half * len(places) <= transform_macs(axes):
        grid = np.meshgrid(*map(np.arange, axes[:-1]), np.arange(half), indexing="ij")
        turns = np.stack([each.ravel() for each in grid], 1) / np.array(axes)  # (f, d)
        angle = 2 * np.pi * turns @ places.T
        taps = np.stack([np.cos(angle), np.sin(angle)], 1)
    return Spectrum(axes, tuple(forward), tuple(inverse), taps)


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
    coefficients = coefficients.transpose(0, 1).reshape(f, 1, 2 * batch, i)
    columns = kernel.permute(2, 1, 0).reshape(t, i * o)
    if found.taps is None:
        filled = columns.new_zeros(prod(found.axes), i * o).index_copy(0, places, columns)
        given = _transform(filled, found).transpose(0, 1)  # (f, 2, i·o), the sine with the other sign
        pieces = [_product(coefficients, (given * given.new_tensor([[1.0], [-1.0]])).unflatten(2, (i, o)))]
    else:
        waves = torch.as_tensor(found.taps, dtype=signal.dtype, device=signal.device)
        step = max(1, CHUNK // (2 * i * o))
        pieces = []
        for start in range(0, f, step):
            some = (coefficients[start : start + step], waves[start : start + step], columns, o)
            if torch.is_grad_enabled() and 2 * f * i * o > KEPT:
                pieces.append(checkpoint(_filtered, *some, use_reentrant=False, preserve_rng_state=False))
            else:
                pieces.append(_filtered(*some))
    spread = torch.cat(pieces, 1).flatten(2)  # (2, f, batch·o)
    return _restore(spread, found).unflatten(1, (batch, o)).permute(1, 2, 0)


def _filtered(coefficients: Tensor, waves: Tensor, columns: Tensor, o: int) -> Tensor:
    """The product of a part of the coefficients with those of the kernel."""
    return _product(coefficients, (waves.flatten(0, 1) @ columns).unflatten(0, (-1, 2)).unflatten(2, (-1, o)))


def _product(x: Tensor, k: Tensor) -> Tensor:  # (f, 1, 2·batch, i), (f, 2, i, o) -> (2, f, batch, o)
    """(cos + i·sin)(a + ib) = (cos·a − sin·b) + i(cos·b + sin·a)."""
    both = (x @ k).unflatten(2, (2, -1))  # (f, cos or sin, a or b, batch, o)
    return torch.stack([both[:, 0, 0] - both[:, 1, 1], both[:, 0, 1] + both[:, 1, 0]])


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
