"""Convolution of finitely supported signals on infinite groups: the lattices Z^d, and Z² with turns and mirrors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .errors import GMError, shown
from .groups import Group, GSet, fixed, grid, regular
from .groups import group as parse
from .linalg import usual_strides
from .structure import Structure, expand

SUPPORTS = ("same", "full", "valid")


class LatticeConv(nn.Module):
    """The convolution of finitely supported signals on Z^d or Z²⋊H: y[g] = b + Σ_c Σ_u k[c, u] x[c, g·u].

    `group` is "Z", "Z^2" or "Z^3", or "Z^2:H" with H one of C1, C2, C4, D1, D2, D4: "Z^2:C4" is p4, "Z^2:D4" is p4m.
    A signal is given on a box and is zero outside it: (batch, channels, *box) on Z^d, (batch, channels, |H|, height,
    width) on Z²⋊H, where h is an element as in `gmcompress.groups.grid` and (x, g)·(u, h) = (x + g·u, g·h). Inputs of
    the first layer of a network live on Z² alone: `lift=True` reads (batch, channels, height, width). The kernel lives
    on a box of odd sides around 0, a square where H has quarter turns.

    Outputs live on the box of the input ("same"), on all of the larger box where they can differ from zero before the
    bias is added ("full"), or where nothing outside was read ("valid"). All commute with the motions of H, where they
    keep the box, and with translations; "same" does so away from the border, because it restricts.

    Parameters: `kernel` (o, i, |H|, *size), without |H| on Z^d and where lifting; `bias` (o).

    Raises:
        GMError: the group is none of these, a side of the kernel is even, or a quarter turn does not keep its box.
    Source: GM paper, section on infinite groups; Cohen and Welling 2016 for p4 and p4m.

    >>> lift, conv = LatticeConv("Z^2:C4", 3, 8, 3, lift=True), LatticeConv("Z^2:C4", 8, 8, 3)
    >>> conv(lift(torch.ones(2, 3, 9, 9))).shape
    torch.Size([2, 8, 4, 9, 9])
    >>> LatticeConv("Z^3", 1, 2, (3, 1, 5), support="full")(torch.ones(1, 1, 4, 4, 4)).shape
    torch.Size([1, 2, 6, 4, 8])
    """

    def __init__(
        self,
        group: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        lift: bool = False,
        support: str = "same",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group, (self.dimension, self.point) = group, _read(group)
        sides = (kernel_size,) * self.dimension if isinstance(kernel_size, int) else tuple(kernel_size)
        odd = all(isinstance(each, int) and each > 0 and each % 2 for each in sides)
        if not odd or len(sides) != self.dimension:
            raise GMError(f"kernel_size on {group} is {self.dimension} odd numbers, not {shown(kernel_size)}")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or value < 1:
                raise GMError(f"{name} is an integer of at least 1, not {shown(value)}")
        if support not in SUPPORTS:
            raise GMError(f"support is one of {', '.join(SUPPORTS)}, not {shown(support)}")
        if lift and self.point is None:
            raise GMError(f"there is nothing to lift to on {group}: it has no turns and no mirrors")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, sides
        self.lift, self.support = lift, support
        self.structure: Structure | None = None
        if self.point is not None:
            taps, rows = grid(self.point, sides[0], sides[1]), regular(self.point)
            columns: GSet = fixed(self.point, 1) if lift else rows
            self.structure = Structure(self.point, rows, columns, taps)
        inner = () if self.point is None or lift else (self.point.order,)
        self.kernel = nn.Parameter(torch.empty(out_channels, in_channels, *inner, *sides, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a start: the variance of torch's own layers."""
        bound = 1 / math.sqrt(math.prod(self.kernel.shape[1:]))
        for each in self.parameters():
            nn.init.uniform_(each, -bound, bound)

    @property
    def weight(self) -> Tensor:  # (o·|H|, i·|H|, *size)
        """The weight of the ordinary convolution that does the same, differentiable; rows are (channel, element)."""
        if self.structure is None or self.point is None:
            return usual_strides(self.kernel)
        columns = self.in_channels * (1 if self.lift else self.point.order)
        shape = (self.out_channels * self.point.order, columns, *self.kernel_size)
        return expand({"kernel": usual_strides(self.kernel).flatten(2)}, self.structure, shape)

    def forward(self, signal: Tensor) -> Tensor:  # (batch, i, |H| if any, *box) -> (batch, o, |H| if any, *box)
        """The signal on the group, restricted to the box that `support` names."""
        inner = () if self.point is None or self.lift else (self.point.order,)
        wanted = (self.in_channels, *inner)
        if signal.dim() != 1 + len(wanted) + self.dimension or tuple(signal.shape[1 : 1 + len(wanted)]) != wanted:
            shape = ", ".join(map(str, wanted))
            raise GMError(f"a signal here has shape (batch, {shape}, *box), but this one has {tuple(signal.shape)}")
        flat = signal.flatten(1, 2) if inner else signal
        share = {"same": 1, "full": 2, "valid": 0}[self.support]
        padding = tuple(share * (each // 2) for each in self.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dimension - 1]
        found = convolve(flat, self.weight, padding=padding)
        if self.point is not None:
            found = found.unflatten(1, (self.out_channels, self.point.order))
        return found if self.bias is None else found + self.bias.to(found).reshape(-1, *[1] * (found.dim() - 2))

    def multiply_adds(
        self,
        shape: Sequence[int],  # of an output
    ) -> int:
        """Multiply-adds of a call: every output reads the whole kernel, also where it is outside of the box."""
        return math.prod(shape) * math.prod(self.kernel.shape[1:])

    def __repr__(self) -> str:
        options = ", lift=True" * self.lift + f", support={self.support!r}" * (self.support != "same")
        options += ", bias=False" * (self.bias is None)
        return f"LatticeConv({self.group!r}, {self.in_channels}, {self.out_channels}, {self.kernel_size}{options})"


def _read(text: str) -> tuple[int, Group | None]:
    """The dimension of the lattice, and the group of turns and mirrors if there is one."""
    match = re.fullmatch(r"Z(?:\^([123]))?(?::([CD][124]))?", text) if isinstance(text, str) else None
    dimension = int(match[1] or 1) if match else 0
    if match is None or (match[2] and dimension != 2):
        known = '"Z", "Z^2", "Z^3" and "Z^2:H" with H of C1, C2, C4, D1, D2, D4 are'
        raise GMError(f"{shown(text)} is no lattice; {known}")
    return dimension, parse(match[2]) if match[2] else None
