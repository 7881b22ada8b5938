"""The networks of the benchmark of dynamics: group matrices, a plain CNN, and a relaxed group convolution."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from smoke import SIDE
from torch import Tensor, nn

import gmcompress as gm

FIELDS = 3  # the density, and the two components of the velocity
SEEN = 2  # states that a network reads
GROUP = f"C{SIDE}xC{SIDE}"
MOST = 12_500  # parameters


class RelaxedConv(nn.Module):
    """Convolution on the torus, relaxed: y[p] = b + Σ_l w_l[p] Σ_u k_l[u] x[p + u], with weights of each position.

    Parameters: `filters` (banks, out_channels, in_channels, size, size); `weights` (banks, side, side), of all channels
    together, which begin as 1, where the layer commutes with translations; `bias` (out_channels).
    Source: Wang, Walters and Yu 2022, "Approximately equivariant networks for imperfectly symmetric dynamics", the
    section on relaxed group convolutions, for the group of translations.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, *, banks: int, side: int = SIDE) -> None:
        super().__init__()
        self.banks, self.size = banks, size
        bound = 1 / math.sqrt(in_channels * size**2 * banks)
        self.filters = nn.Parameter(torch.empty(banks, out_channels, in_channels, size, size).uniform_(-bound, bound))
        self.weights = nn.Parameter(torch.ones(banks, side, side))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))

    def forward(self, signal: Tensor) -> Tensor:  # (batch, in_channels, side, side) -> (batch, out_channels, same)
        """The sum of the banks, each weighed at every position."""
        padded = F.pad(signal, [self.size // 2] * 4, mode="circular")
        found = F.conv2d(padded, self.filters.flatten(0, 1)).unflatten(1, (self.banks, -1))
        return (self.weights[:, None] * found).sum(1) + self.bias[:, None, None]


class Layers(nn.Module):
    """Layers with SiLUs between them, and skips where the width stays; `made` builds one by its place and widths."""

    def __init__(self, widths: tuple[int, ...], made: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        pairs = enumerate(itertools.pairwise(widths))
        self.layers = nn.ModuleList(made(place, i, o) for place, (i, o) in pairs)

    def forward(self, signal: Tensor) -> Tensor:  # (batch, widths[0], side, side) -> (batch, widths[-1], same)
        """The last layer, of what the others made."""
        *inner, last = self.layers
        for layer in inner:
            found = F.silu(layer(signal))
            signal = found + signal if found.shape == signal.shape else found
        return last(signal)


class Coarse(nn.Module):
    """There and back between the group and a subgroup, on which a convolution reaches everywhere."""

    def __init__(self, channels: int, subgroup: str, width: int, *, radius: int) -> None:
        super().__init__()
        self.down = gm.GroupConv(GROUP, channels, width, radius=radius, stride=subgroup)
        self.across = gm.GroupConv(subgroup, width, channels, separable="dseparable")
        self.up = gm.GroupUnpool(GROUP, subgroup)

    def forward(self, signal: Tensor) -> Tensor:  # (batch, channels, side, side) -> same
        """What the subgroup made of it, the same all over each of its tiles."""
        return self.up(self.across(F.silu(self.down(signal))))


class Gated(nn.Module):
    """A network of group matrices that also reads what a layer with gates makes of the input.

    The gates are a residual of displacement rank 1: with them a layer is another one at every position.
    """

    def __init__(self, gates: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.gates, self.network = gates, network

    def forward(self, signal: Tensor) -> Tensor:  # (batch, channels, side, side) -> (batch, outputs, side, side)
        """What the network makes of the input and of what the gates made of it."""
        return self.network(torch.cat([signal, self.gates(signal)], 1))


class Forecaster(nn.Module):
    """The next state: the last one, plus what a network makes of those seen, in the units of the states.

    `scale` and `change` are the deviations of the fields and of their changes in one step, which the network reads and
    writes in units of; they are buffers (fields, 1, 1).
    """

    scale: Tensor
    change: Tensor

    def __init__(self, network: nn.Module, states: Tensor) -> None:  # (simulations, steps, fields, side, side)
        super().__init__()
        self.network = network
        for name, values in (("scale", states), ("change", states.diff(dim=1))):
            square = values.square().mean((0, 1, 3, 4))
            square[1:] = square[1:].mean()  # no direction of the velocity has units of its own
            self.register_buffer(name, square.sqrt()[:, None, None])

    def forward(self, history: Tensor, steps: int) -> Tensor:  # (batch, SEEN, fields, side, side) -> (batch, steps, …)
        """The states of the next steps, each forecast from those before it."""
        found: list[Tensor] = []
        for _ in range(steps):
            state = history[:, -1] + self.change * self.network((history / self.scale).flatten(1, 2))
            found.append(state)
            history = torch.cat([history[:, 1:], state[:, None]], 1)
        return torch.stack(found, 1)


@dataclass(frozen=True)
class Row:
    """One network: `model` says what it is, `most` the parameters that it may have; `ours` are of group matrices."""

    name: str
    model: str
    build: Callable[[], nn.Module]
    most: int = MOST
    ours: bool = False


INPUTS = SEEN * FIELDS


def group_matrices(gates: int, width: int, inner: int, radius: int, subgroup: str, coarse: int) -> nn.Module:
    """Group convolutions on the torus, the second by way of a subgroup, behind as many channels of gates."""

    def made(place: int, i: int, o: int) -> nn.Module:
        if place == 1:
            return Coarse(o, subgroup, coarse, radius=radius)
        return gm.GroupConv(GROUP, i, o, radius=radius)

    layers = Layers((INPUTS + gates, *[width] * inner, FIELDS), made)
    if not gates:
        return layers
    return Gated(gm.GroupConv(GROUP, INPUTS, gates, radius=0, rank=1, residual="diagonal"), layers)


def convolutions(width: int, size: int, *, inner: int = 3, relaxed: int = 0, banks: int = 2) -> nn.Module:
    """Convolutions on the torus, the first `relaxed` of them relaxed; `inner` of them besides the last."""

    def made(place: int, i: int, o: int) -> nn.Module:
        if place < relaxed:
            return RelaxedConv(i, o, size, banks=banks)
        return nn.Conv2d(i, o, size, padding=size // 2, padding_mode="circular")

    return Layers((INPUTS, *[width] * inner, FIELDS), made)


def _rows() -> tuple[Row, ...]:
    """Each network as written and as built."""
    own: dict[str, Any] = {"gates": 2, "width": 23, "inner": 4, "radius": 1, "subgroup": "C8xC8", "coarse": 8}
    every = (
        ("group matrices", group_matrices, own),
        ("group matrices, without gates", group_matrices, own | {"gates": 0}),
        ("plain CNN", convolutions, {"width": 24, "size": 3}),
        ("plain CNN, deeper", convolutions, {"width": 17, "size": 3, "inner": 5}),
        ("relaxed in every layer", convolutions, {"width": 8, "size": 3, "relaxed": 4}),
        ("relaxed in the first layer", convolutions, {"width": 20, "size": 3, "relaxed": 1}),
    )
    return tuple(
        Row(
            name,
            f"{build.__name__}({', '.join(f'{option}={value!r}' for option, value in options.items())})",
            functools.partial(build, **options),
            ours=build is group_matrices,
        )
        for name, build, options in every
    )


ROWS = _rows()
