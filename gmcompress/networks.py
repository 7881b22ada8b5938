"""Networks of group convolutions one after the other and a head: on finite groups, and on Lie groups by sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .errors import GMError, shown
from .groupconv import GroupConv
from .groups import Group
from .groups import group as parse
from .lieconv import LieConv
from .pooling import GroupPool, LiePool
from .signals import flat_signal, shaped_signal

HEADS = ("mean", "max", "flatten", "signal")
NORMS = ("batch", "layer", "none")
SKIPS = ("none", "same", "linear")
LIE_HEADS = ("mean", "max", "image")
SAMPLINGS = ("fixed", "random")


class GMCNN(nn.Module):
    """A classifier or regressor of signals on a group: layers of GroupConv, BatchNorm, activation, pooling; a head.

    There is a layer for each of `channels`. `radius`, `rank` and `strides` are one value for all layers or one for each
    (None: all of the group, no stride); a stride is a subgroup of the group that the layer before it left, taken by the
    convolution itself, or by a `GroupPool` of mode `pool` behind it. Further options go to every `GroupConv`.

    The head "mean" or "max" pools over the group that is left and is linear in the channels, so that with rank 0 and
    without strides outputs (batch, outputs) are invariant under the group; with strides, under the last subgroup.
    "flatten" is linear in all positions, and not invariant. "signal" is one more `GroupConv` of the
    last radius, for regression: outputs are a signal on `out_group`, and move with it. `head_bias` is about
    the head alone, `bias` among the options about the other layers.

    `norm` is "batch", "layer" (of all channels and positions, without parameters) or "none", True and False meaning
    the first and the last. `skip` adds what a layer reads to what its activation gives: "same" where channels and group
    stay, "linear" also elsewhere, through a `GroupConv` of radius 0. A `shared` kernel is one for all channels that a
    layer reads: the layer convolves their sum.

    Raises:
        GMError: lengths differ, the head, norm or skip is unknown, or as for `GroupConv` and `GroupPool`.
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
        head_bias: bool = True,
        norm: bool | str = True,
        skip: str = "none",
        shared: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        **options: Any,
    ) -> None:
        super().__init__()
        norm = norm if isinstance(norm, str) else "batch" if norm else "none"
        for name, value, known in (("head", head, HEADS), ("norm", norm, NORMS), ("skip", skip, SKIPS)):
            if value not in known:
                raise GMError(f"{name} is one of {', '.join(known)}, not {shown(value)}")
        if not channels:
            raise GMError("channels has an entry for each layer, and there is at least one layer")
        self.group = current = parse(group)
        radii, ranks = _each("radius", radius, len(channels)), _each("rank", rank, len(channels))
        taken = _each("strides", strides, len(channels))
        steps: list[nn.Module] = []
        for wide, reach, free, stride in zip(channels, radii, ranks, taken, strict=True):
            within = None if pool else stride
            read = 1 if shared else in_channels
            conv = GroupConv(current, read, wide, radius=reach, rank=free, stride=within, **options)
            step = [*([_Sum()] if shared else []), conv, *_norm(norm, wide, conv.out_group.order), activation()]
            beside = _beside(skip, current, in_channels, wide, within)
            steps += step if beside is None else [_Skip(nn.Sequential(*step), beside)]
            current, in_channels = conv.out_group, wide
            if pool and stride is not None:
                pooling = GroupPool(current, stride, pool)
                steps.append(pooling)
                current = pooling.out_group
        self.out_group, self.head = current, head
        self.features = nn.Sequential(*steps)
        if head == "signal":
            own = options | {"radius": radii[-1], "rank": ranks[-1], "bias": head_bias}
            self.last: nn.Module = GroupConv(current, in_channels, outputs, **own)
        else:
            self.last = nn.Linear(in_channels * (current.order if head == "flatten" else 1), outputs, bias=head_bias)

    @classmethod
    def paper(
        cls,
        factor: str,
        in_channels: int,
        outputs: int,
        *,
        channels: Sequence[int] = (120, 120),
        reach: int = 3,
        head_bias: bool = True,
    ) -> GMCNN:
        """The classifier whose parameters the GM paper counts, on the square of a group C_n or D_n.

        Every layer has one kernel for all its input channels, on N × N with N the powers −reach … reach of the rotation
        (and, of D_n, these times the reflection), a LayerNorm without parameters, one PReLU that all layers share, and
        a skip, through a 1×1 convolution where the widths differ; then the maximum over the group, and a dense head.
        With k = |N|² taps, o channels in each of two layers, i in and c outputs that is 2·o(k + 1) + o(i + 1) + 1 + c·o
        and, with its bias, c more. The dropout before the head is left to the caller.

        Raises:
            GMError: the factor is no C_n or D_n, or as for `GMCNN`.
        Source: GM paper, section on experiments and the configurations published with it (github.com/kiryteo/GM-CNN).

        >>> model = GMCNN.paper("C32", 3, 10, head_bias=False)
        >>> sum(each.numel() for each in model.parameters())
        13681
        """
        whole = parse(factor)
        kind, n = factor[:1], whole.order
        if kind not in "CD" or not factor[1:].isdigit():
            raise GMError(
                f"the paper's networks live on the square of C_n or D_n, such as C32 or D14, not {shown(factor)}"
            )
        flips = 2 if kind == "D" else 1
        powers = {flips * (turn % (n // flips)) + flip for turn in range(-reach, reach + 1) for flip in range(flips)}
        taps = sorted(a * n + b for a in powers for b in powers)
        prelu = nn.PReLU()
        options: dict[str, Any] = {"channels": channels, "radius": 1, "generators": taps[1:], "head_bias": head_bias}
        options |= {"head": "max", "norm": "layer", "skip": "linear", "shared": True, "activation": lambda: prelu}
        return cls(f"{factor}x{factor}", in_channels, outputs, **options)

    def forward(self, signal: Tensor) -> Tensor:  # (batch, in_channels, n or *axes) -> (batch, outputs, *axes or none)
        """The outputs, or where the head is "signal" a signal on `out_group`."""
        found = self.features(flat_signal(signal, self.group))
        if self.head == "signal":
            return shaped_signal(self.last(found), self.out_group, signal)
        if self.head == "flatten":
            return self.last(found.flatten(1))
        return self.last(found.mean(2) if self.head == "mean" else found.amax(2))


class _Sum(nn.Module):
    """The sum of all channels, as one."""

    def forward(self, signal: Tensor) -> Tensor:  # (batch, channels, n) -> (batch, 1, n)
        return signal.sum(1, keepdim=True)


class _Skip(nn.Module):
    """What the layer gives, plus what goes beside it."""

    def __init__(self, layer: nn.Module, beside: nn.Module) -> None:
        super().__init__()
        self.layer, self.beside = layer, beside

    def forward(self, signal: Tensor) -> Tensor:  # (batch, i, n) -> (batch, o, m)
        return self.layer(signal) + self.beside(signal)


def _beside(skip: str, group: Group, i: int, o: int, stride: str | Iterable[int] | None) -> nn.Module | None:
    """What goes beside a layer, or None."""
    if skip != "none" and i == o and stride is None:
        return nn.Identity()
    return GroupConv(group, i, o, radius=0, stride=stride) if skip == "linear" else None


def _norm(norm: str, channels: int, positions: int) -> list[nn.Module]:
    if norm == "layer":
        return [nn.LayerNorm([channels, positions], elementwise_affine=False)]
    return [nn.BatchNorm1d(channels)] if norm == "batch" else []


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
