"""The networks of the GM paper: group convolutions one after the other, with strides or pooling, and a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .errors import GMError, shown
from .groupconv import GroupConv, flat_signal, shaped_signal
from .groups import Group
from .groups import group as parse
from .pooling import GroupPool

HEADS = ("mean", "max", "flatten", "signal")


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


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for every layer."""
    if value is None or isinstance(value, int | str):
        return [value] * count
    if len(value) != count:
        raise GMError(f"{name} is one value or one for each of {count} layers, not {shown(value)}")
    return list(value)
