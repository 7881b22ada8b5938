"""The product with a factor part, low rank or adapted bases: input basis, coupling, output basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .structure import Structure


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


def factor_linear(
    rows: Tensor,  # (N, columns)
    ready: Mapping[str, Tensor],  # the stored left, right and scales
    structure: Structure,
) -> Tensor:  # (N, rows)
    """The factor part applied to rows."""
    left, right = ready["left"].flatten(0, -2), ready["right"].flatten(1)
    if structure.grid is None:
        return F.linear(F.linear(rows, right), left)
    (p, q), rank = structure.grid, len(right)
    basis = right.reshape(rank, q, -1).permute(1, 2, 0)
    inner = rows.reshape(rows.shape[0], q, -1).transpose(0, 1) @ basis  # (Q, N, r)
    coupled = torch.bmm(inner.permute(2, 1, 0), ready["scales"].permute(2, 1, 0))  # (r, N, Q) (r, Q, P)
    outer = torch.bmm(coupled.permute(2, 1, 0), left.reshape(p, -1, rank).mT)  # (P, N, r) (P, r, a)
    return outer.transpose(0, 1).reshape(rows.shape[0], -1)


def factor_conv2d(
    images: Tensor,  # (N, columns, height, width)
    ready: Mapping[str, Tensor],
    structure: Structure,
    window: Window,
) -> Tensor:  # (N, rows, height', width')
    """The factor part applied to images, by two convolutions, where split one along each side."""
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
        apart = inner.reshape(inner.shape[0], q, rank, -1).permute(2, 1, 0, 3).flatten(2)  # (r, Q, N·positions)
        coupled = torch.bmm(ready["scales"].permute(2, 0, 1), apart)  # (r, P, N·positions)
        coupled = coupled.reshape(rank, p, inner.shape[0], -1).permute(2, 1, 0, 3)
        inner = coupled.reshape(inner.shape[0], p * rank, *inner.shape[2:])
    return F.conv2d(inner, columnwise, None, second.stride, second.padding, second.dilation, p)
