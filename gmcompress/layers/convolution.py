"""The structured counterpart of `nn.Conv2d`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ..errors import GMError
from ..factored import Window
from ..groups import Group
from ..products import conv2d, why_slow
from ..structure import Structure
from .base import GMLayer, filled


class GMConv2d(GMLayer, nn.Conv2d):  # type: ignore[misc]
    """A convolution whose channel matrices, one for each tap, are made of group matrices; drop-in for `nn.Conv2d`.

    The group acts on the channels; the taps are carried along, or acted upon where the structure says so, as in
    "C4[G,G,grid3x3]". In a grouped convolution the columns are the input channels of one convolution group.

    Raises:
        GMError: out_channels/groups or in_channels/groups is not a multiple of the order of the group.

    >>> layer = GMConv2d(8, 16, 3, "C4", padding=1)
    >>> layer
    GMConv2d(8, 16, (3, 3), 'C4', stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, bias=True)
    >>> layer(torch.ones(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        structure: Structure | Group | str,
        *,
        rank: int = 0,
        residual: str = "displacement",
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Conv2d checks these arguments and works out the padding; on meta it costs no memory
        twin = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        found = Structure.parse(structure, rank=rank, residual=residual)
        if found.rows is not None and out_channels // groups % found.rows.size:
            raise GMError(
                f"{found} needs output channels in each of the {groups} convolution groups divisible by "
                f"{found.rows.size}, not {out_channels // groups}"
            )
        super().__init__(found, tuple(twin.weight.shape), bias=bias, device=device, dtype=dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = twin.kernel_size
        self.stride = twin.stride
        self.padding = twin.padding
        self.dilation = twin.dilation
        self.groups = groups
        self.padding_mode = twin.padding_mode
        self.transposed = False
        self.output_padding = (0, 0)
        self._reversed_padding_repeated_twice = twin._reversed_padding_repeated_twice

    def _options(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        options: dict[str, Any] = {name: getattr(self, name) for name in names} | {"bias": self.bias is not None}
        return options | ({"padding_mode": self.padding_mode} if self.padding_mode != "zeros" else {})

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        widths = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}"
        return f"GMConv2d({widths}, {str(self.structure)!r}, {options})"

    def forward(self, input: Tensor) -> Tensor:  # (batch, in_channels, height, width)
        """The convolution of `nn.Conv2d` with the computed weight."""
        ready, padding = self._ready(input), self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        if ready is None:
            return F.conv2d(input, self._dense(), self.bias, self.stride, padding, self.dilation, self.groups)
        if isinstance(padding, str):
            input = F.pad(input, self._beforehand)
        found = conv2d(input, ready, self.structure, self.bias, window=self.window, layout=self.layout)
        last = not (input.is_contiguous() or is_functorch_wrapped_tensor(input))  # which knows of no memory format
        last = last and input.is_contiguous(memory_format=torch.channels_last)
        return found.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)  # as torch does

    @property
    def _beforehand(self) -> Sequence[int]:
        """What this layer pads itself: left, right, top, bottom."""
        if self.padding_mode != "zeros":
            return self._reversed_padding_repeated_twice
        if self.padding != "same":
            return (0, 0, 0, 0)
        wide, high = (
            apart * (taps - 1) for apart, taps in zip(self.window.dilation[::-1], self.weight_shape[:1:-1], strict=True)
        )
        return (wide // 2, wide - wide // 2, high // 2, high - high // 2)

    @property
    def window(self) -> Window:
        """How the convolution moves over an input that is padded already where this layer pads it beforehand."""
        beforehand = self.padding_mode != "zeros" or isinstance(self.padding, str)
        return Window(*map(_pair, (self.stride, (0, 0) if beforehand else self.padding, self.dilation)))

    def _moves(self, given: Tensor) -> tuple[tuple[int, ...], Window, int] | None:
        if given.dim() not in (3, 4) or not given.numel() or given.shape[-3] != self.in_channels:
            return None
        try:
            window, (left, right, top, bottom) = self.window, self._beforehand
        except (TypeError, ValueError):  # settings that torch may refuse, and says why
            return None
        height, width = given.shape[-2] + top + bottom, given.shape[-1] + left + right
        taps = self.weight_shape[2:]
        if min(window.size(0, height, taps[0]), window.size(1, width, taps[1])) < 1:
            return None
        if self.padding == "same" and max(window.stride) > 1:
            return None
        return (given.numel() // prod(given.shape[-3:]), height, width), window, self.groups

    def why_slow(self) -> str | None:
        """Why there is no fast product, None where there is one."""
        return why_slow(self.structure, self.groups)

    def dense(self) -> nn.Conv2d:
        """The `nn.Conv2d` with the same function."""
        widths: tuple[Any, ...] = (self.in_channels, self.out_channels, self.kernel_size)
        empty = nn.Conv2d(*widths, **(self._options() | {"device": "meta"}))
        return filled(empty, self)  # type: ignore[return-value]


def _pair(value: Any) -> tuple[int, int]:
    """What is set for both axes, or for each, as torch reads what was set on a layer after it was made."""
    vertical, horizontal = 2 * [value] if isinstance(value, int) else 2 * [*value] if len(value) == 1 else value
    return int(vertical), int(horizontal)
