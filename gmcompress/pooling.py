"""Pooling on a group: every position of a subgroup gathers one tile of it, or an image gathers the samples of H."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .errors import GMError, shown
from .groups import Group, as_given, embed, transversal
from .groups import group as parse
from .signals import flat_signal, shaped_signal


class _Tiling(nn.Module):
    """What pooling and unpooling share: the subgroup H, and the tiles h·T that cover the group without overlap."""

    tiles: Tensor

    def __init__(
        self, group: Group | str, stride: str | Iterable[int], mode: str, generators: Iterable[int] | None
    ) -> None:
        super().__init__()
        self.group = parse(group)
        self.stride = as_given(stride)
        self.mode = mode
        self.generators = None if generators is None else tuple(generators)
        self.subgroup, members = embed(self.group, self.stride)
        tile = transversal(self.group, members, self.generators)
        # tiles[h, t] is the element h·t; row by row every element once
        table = torch.tensor(self.group.table[members][:, tile], dtype=torch.int64)
        self.register_buffer("tiles", table, persistent=False)

    def __repr__(self) -> str:
        group = repr(self.group.name) if self.group.name else repr(self.group)
        metric = "" if self.generators is None else f", generators={self.generators!r}"
        return f"{type(self).__name__}({group}, {self.stride!r}, mode={self.mode!r}{metric})"


class GroupPool(_Tiling):
    """Pooling onto a subgroup H: out[h] is the maximum or the mean of x over the tile h·T.

    T holds one element of every coset H·t, the nearest to the identity in the word metric of `generators` (by default
    those of the factors), so the tiles h·T cover the group, each position once, and the layer commutes with H. The
    trivial subgroup, `stride=()`, pools over all of G: the result is then invariant under G.

    Raises:
        GMError: the subgroup is not there, the mode is unknown, or the generators do not generate G.
    Source: GM paper, section on pooling.

    >>> GroupPool("C4", [2])(torch.tensor([[[1.0, 5.0, 2.0, 3.0]]]))
    tensor([[[5., 3.]]])
    >>> GroupPool("C8xC8", "C4xC4", mode="mean")(torch.ones(2, 3, 8, 8)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self,
        group: Group | str,
        stride: str | Iterable[int],
        mode: str = "max",
        *,
        generators: Iterable[int] | None = None,
    ) -> None:
        if mode not in ("max", "mean"):
            raise GMError(f'the mode of pooling is "max" or "mean", not {shown(mode)}')
        super().__init__(group, stride, mode, generators)
        self.out_group = self.subgroup

    def forward(self, signal: Tensor) -> Tensor:  # (batch, channels, n or *axes) -> (batch, channels, m or *axes)
        """The signal on `out_group`."""
        flat = flat_signal(signal, self.group)
        apart = flat.index_select(2, self.tiles.flatten()).unflatten(2, self.tiles.shape)
        pooled = apart.max(3).values if self.mode == "max" else apart.mean(3)
        return shaped_signal(pooled, self.out_group, signal)


class GroupUnpool(_Tiling):
    """From a subgroup H back to G, with the tiles of `GroupPool`: out[h·t] is x[h], or where "zero" only at t = 1.

    Commutes with H. Mean pooling after it gives the signal back where "copy", and is its adjoint up to the factor |T|.

    Raises:
        GMError: as for `GroupPool`.

    >>> GroupUnpool("C4", [2])(torch.tensor([[[1.0, 5.0]]]))
    tensor([[[1., 1., 5., 5.]]])
    """

    def __init__(
        self,
        group: Group | str,
        stride: str | Iterable[int],
        mode: str = "copy",
        *,
        generators: Iterable[int] | None = None,
    ) -> None:
        if mode not in ("copy", "zero"):
            raise GMError(f'the mode of unpooling is "copy" or "zero", not {shown(mode)}')
        super().__init__(group, stride, mode, generators)
        self.out_group = self.group

    def forward(self, signal: Tensor) -> Tensor:  # (batch, channels, m or *axes) -> (batch, channels, n or *axes)
        """The signal on the whole group."""
        flat = flat_signal(signal, self.subgroup)
        if self.mode == "copy":
            source = torch.empty_like(self.tiles.flatten())
            rows = torch.arange(len(self.tiles), device=source.device).repeat_interleave(self.tiles.shape[1])
            found = flat.index_select(2, source.index_copy(0, self.tiles.flatten(), rows))
        else:
            found = flat.new_zeros(*flat.shape[:2], self.group.order).index_copy(2, self.tiles[:, 0], flat)
        return shaped_signal(found, self.out_group, signal)


class LiePool(nn.Module):
    """Pooling of signals on R²⋊H by sampling: over H to an image, over all of G to an invariant, or over few pixels.

    With over="H" out[x] is the maximum, or the mean by the measure of H, of f[x, h] over all samples h, and moves with
    rotations and dilations as an image does. With over="G" it is the maximum or mean of that over the image. An integer
    pools over squares of so many pixels a side, which have to divide the image, and leaves the samples as they are.

    Raises:
        GMError: the mode or what to pool over is unknown, the signal has not five axes, or squares do not divide it.
    Source: Knigge, Romero, Bekkers 2022, the section on the method, for the projection over H.

    >>> signal = torch.ones(2, 3, 8, 16, 16)
    >>> [tuple(LiePool("max", over=over)(signal).shape) for over in ("H", "G", 4)]
    [(2, 3, 16, 16), (2, 3), (2, 3, 8, 4, 4)]
    """

    def __init__(self, mode: str = "max", *, over: str | int = "H") -> None:
        super().__init__()
        if mode not in ("max", "mean"):
            raise GMError(f'the mode of pooling is "max" or "mean", not {shown(mode)}')
        if over not in ("H", "G") and (type(over) is not int or over < 1):
            raise GMError(f'pooling is over "H", over "G", or over squares of so many pixels, not over {shown(over)}')
        self.mode, self.over = mode, over

    def forward(self, signal: Tensor) -> Tensor:  # (batch, channels, samples, height, width)
        """The image (batch, channels, height, width), the invariant (batch, channels), or the smaller signal."""
        if signal.dim() != 5:
            raise GMError(f"a signal here is (batch, channels, samples, height, width), not {tuple(signal.shape)}")
        if isinstance(self.over, int):
            if any(side % self.over for side in signal.shape[3:]):
                raise GMError(f"squares of {self.over} pixels do not divide an image of {tuple(signal.shape[3:])}")
            pool = F.max_pool2d if self.mode == "max" else F.avg_pool2d
            return pool(signal.flatten(1, 2), self.over).unflatten(1, signal.shape[1:3])
        axes = (2,) if self.over == "H" else (2, 3, 4)
        return signal.amax(axes) if self.mode == "max" else signal.mean(axes)

    def __repr__(self) -> str:
        return f"LiePool({self.mode!r}, over={self.over!r})"
