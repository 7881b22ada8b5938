"""Networks of group convolutions one after the other and a head: on finite groups, and on Lie groups by sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .errors import GMError, shown
from .groupconv import GroupConv, flat_signal, shaped_signal
from .groups import Group
from .groups import group as parse
from .lieconv import LieConv
from .pooling import GroupPool, LiePool

HEADS = ("mean", "max", "flatten", "signal")
LIE_HEADS = ("mean", "max", "image")
SAMPLINGS = ("fixed", "random")


class GMCNN(nn.Module):
    """A classifier or regressor of signals on a group: layers of GroupConv, BatchNorm, activation, pooling; a head.

    There is a layer for each of `channels`. `radius`, `rank` and `strides` are one value for all layers or one for each
    (None: all of the group, no stride); a stride is a subgroup of the group that the layer before it left, taken by the
    convolution itself, or by a `GroupPool` of mode `pool` behind it. Further options go to every `GroupConv`.

    The head "mean" or "max" pools over the group that is left and is linear in the channels, so that with rank 0 and
    without strides outputs (batch, outputs) are invariant under the group; with strides, under the last subgroup.
    "flatten" is linear in all positions, as in the paper, and not invariant. "signal" is one more `GroupConv` of the
    last radius, for regression: outputs are a signal on `out_group`, and move with it.

    Raises:
        GMError: lengths differ, the head is unknown, or as for `GroupConv` and `GroupPool`.
    Source: GM paper, section on experiments.

    >>> import torch
    >>> model = GMCNN("C8xC8", 1, 10, channels=(8, 16), radius=2, strides=("C4xC4", None), pool="max")
    >>> model(torch.ones(5, 1, 8, 8)).shape, sum(each.numel() for each in model.parameters())
    (torch.Size([5, 10]), 1754)
    """

    def __init__(
        self,
        group: Group | str,
        in_channels: int,
        outputs: int,
        *,
        channels: Sequence[int] = (16, 16),
        radius: int | Sequence[int | None] | None = 2,
        strides: Sequence[str | Iterable[int] | None] | None = None,
        pool: str | None = None,
        rank: int | Sequence[int] = 0,
        head: str = "mean",
        norm: bool = True,
        activation: Callable[[], nn.Module] = nn.ReLU,
        **options: Any,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise GMError(f"head is one of {', '.join(HEADS)}, not {shown(head)}")
        if not channels:
            raise GMError("channels has an entry for each layer, and there is at least one layer")
        self.group = current = parse(group)
        radii, ranks = _each("radius", radius, len(channels)), _each("rank", rank, len(channels))
        taken = _each("strides", strides, len(channels))
        steps: list[nn.Module] = []
        for wide, reach, free, stride in zip(channels, radii, ranks, taken, strict=True):
            within = None if pool else stride
            conv = GroupConv(current, in_channels, wide, radius=reach, rank=free, stride=within, **options)
            steps += [conv, *([nn.BatchNorm1d(wide)] if norm else []), activation()]
            current, in_channels = conv.out_group, wide
            if pool and stride is not None:
                pooling = GroupPool(current, stride, pool)
                steps.append(pooling)
                current = pooling.out_group
        self.out_group, self.head = current, head
        self.features = nn.Sequential(*steps)
        if head == "signal":
            self.last: nn.Module = GroupConv(current, in_channels, outputs, radius=radii[-1], rank=ranks[-1], **options)
        else:
            self.last = nn.Linear(in_channels * (current.order if head == "flatten" else 1), outputs)

    def forward(self, signal: Tensor) -> Tensor:  # (batch, in_channels, n or *axes) -> (batch, outputs, *axes or none)
        """The outputs, or where the head is "signal" a signal on `out_group`."""
        found = self.features(flat_signal(signal, self.group))
        if self.head == "signal":
            return shaped_signal(self.last(found), self.out_group, signal)
        if self.head == "flatten":
            return self.last(found.flatten(1))
        return self.last(found.mean(2) if self.head == "mean" else found.amax(2))


class LieCNN(nn.Module):
    """A classifier or regressor of images on SE(2), R²⋊R⁺ or Sim(2): LieConv, BatchNorm, activation, pooling; a head.

    There is a layer for each of `channels`, the first of them lifting. `kernel_size` and `shrink` are one value for all
    layers or one for each; shrink is the side of the squares of pixels whose means go on to the next layer, which have
    to divide the image; the fewer pixels, the larger the error at angles between quarter turns. Further options go to
    every `LieConv`, and `separable` and `terms` to all but the first.

    With sampling="random" every layer has its samples of H moved by an offset of its own, drawn anew in each forward
    pass of training; in evaluation, and always where "fixed", samples are those of `LieGrid` without offset.

    The head "mean" or "max" pools over G and is linear in the channels: outputs (batch, outputs) do not change when an
    image is turned, but for what sampling costs, which `equivariance_error` measures. Dilations change areas, and so
    the mean; "max" hardly changes with them while what there is to see stays within the scales. "image" is one more
    `LieConv` whose mean over H is an image (batch, outputs, height, width) that moves as the input does.

    Raises:
        GMError: lengths differ, the head or the sampling is unknown, or as for `LieConv`.
    Source: Knigge, Romero, Bekkers 2022, the sections on the method and on experiments.

    >>> import torch
    >>> model = LieCNN("SE(2)", 1, 10, samples=8, channels=(8, 16), separable="separable", shrink=(2, 1))
    >>> model(torch.ones(5, 1, 16, 16)).shape, model.resampled(16)(torch.ones(5, 1, 16, 16)).shape
    (torch.Size([5, 10]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        group: str,
        in_channels: int,
        outputs: int,
        *,
        samples: int | tuple[int, int],
        channels: Sequence[int] = (16, 16),
        kernel_size: int | Sequence[int] = 5,
        shrink: int | Sequence[int] = 1,
        sampling: str = "fixed",
        head: str = "mean",
        norm: bool = True,
        activation: Callable[[], nn.Module] = nn.ReLU,
        separable: str | None = None,
        terms: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if head not in LIE_HEADS:
            raise GMError(f"head is one of {', '.join(LIE_HEADS)}, not {shown(head)}")
        if sampling not in SAMPLINGS:
            raise GMError(f"sampling is one of {', '.join(SAMPLINGS)}, not {shown(sampling)}")
        if not channels:
            raise GMError("channels has an entry for each layer, and there is at least one layer")
        sides = _each("kernel_size", kernel_size, len(channels))
        shrinks = _each("shrink", shrink, len(channels))
        if not all(type(each) is int and each > 0 for each in shrinks):
            raise GMError(f"shrink is an integer of at least 1, or one for each layer, not {shown(shrink)}")
        steps: list[nn.Module] = []
        kinds: dict[str, Any] = {"lift": True}
        for wide, side, factor in zip(channels, sides, shrinks, strict=True):
            steps.append(LieConv(group, in_channels, wide, side, samples=samples, **kinds, **options))
            steps += [*([nn.BatchNorm3d(wide)] if norm else []), activation()]
            steps += [LiePool("mean", over=factor)] if factor > 1 else []
            in_channels, kinds = wide, {"separable": separable, "terms": terms}
        if head == "image":
            steps.append(LieConv(group, in_channels, outputs, sides[-1], samples=samples, **kinds, **options))
        self.group, self.head, self.sampling = group, head, sampling
        self.features = nn.Sequential(*steps)
        self.pool = LiePool("mean") if head == "image" else LiePool(head, over="G")
        self.last = nn.Identity() if head == "image" else nn.Linear(in_channels, outputs)

    def forward(self, images: Tensor) -> Tensor:  # (batch, in_channels, height, width)
        """The outputs (batch, outputs), or where the head is "image" images, smaller by all of `shrink`."""
        found, source = images, None
        for step in self.features:
            if isinstance(step, LieConv) and self.sampling == "random" and self.training:
                target = step.grid.draw(device=images.device)
                found = step(found, source=source, target=target)
                source = target
            else:
                found = step(found)
        return self.last(self.pool(found))

    def resampled(self, samples: int | tuple[int, int]) -> LieCNN:
        """A copy, of the same parameters, on another number of samples of H."""
        made = copy.deepcopy(self)
        for step in made.features:
            if isinstance(step, LieConv):
                step.grid = replace(step.grid, samples=samples)
        return made


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for every layer."""
    if value is None or isinstance(value, int | str):
        return [value] * count
    if len(value) != count:
        raise GMError(f"{name} is one value or one for each of {count} layers, not {shown(value)}")
    return list(value)
