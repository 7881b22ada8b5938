"""The structured counterpart of `nn.Linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..groups import Group
from ..products import linear
from ..shortcut import Shortcut
from ..structure import Structure
from .base import GMLayer, filled


class GMLinear(GMLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer whose weight is made of group matrices; drop-in for `nn.Linear`.

    `structure` is a string such as "C8xC8+displacement:2" or "adapted:8:4x4", a Group or a Structure; `rank` and
    `residual` add a residual to it. The layer stores `structure.parameters((out_features, in_features))` numbers and
    the bias.

    Raises:
        GMError: a width is not a multiple of the order of the group.

    >>> layer = GMLinear(8, 16, "C4", rank=1)
    >>> layer
    GMLinear(8, 16, 'C4+displacement:1', bias=True)
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: Structure | Group | str,
        *,
        rank: int = 0,
        residual: str = "displacement",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        found = Structure.parse(structure, rank=rank, residual=residual)
        super().__init__(found, (out_features, in_features), bias=bias, device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features

    def __repr__(self) -> str:
        bias = self.bias is not None
        return f"GMLinear({self.in_features}, {self.out_features}, {str(self.structure)!r}, bias={bias})"

    def forward(self, input: Tensor) -> Tensor:  # (*batch, in_features) -> (*batch, out_features)
        """x W(kernel, ...)ᵀ + bias."""
        if not torch.compiler.is_compiling() and (found := self._shortened(input)) is not None:
            return found
        ready = self._ready(input)
        if ready is not None:
            found = linear(input, ready, self.structure, self.bias, layout=self.layout)
            return found.contiguous()  # as torch's own, so that it can be viewed
        return F.linear(input, self._dense(), self.bias)

    def _shortened(self, given: Tensor) -> Tensor | None:
        """The outputs on the shortest way, where there is one for this input."""
        shortcut, own = self._shortcut, self._parameters
        if shortcut is None or self.training:
            return None
        if shortcut.is_outdated(own):
            self._kept()
            shortcut = self._shortcut
            if shortcut is None or shortcut.is_outdated(own):  # the layer has other tensors for this call
                return None
        bias = own.get("bias")
        return shortcut.product(given, self.bias if bias is None else bias)

    def _shorten(self) -> Shortcut:
        return Shortcut(self.parts(), self._held() | self._taken(), self.structure, self.in_features)

    def _moves(self, given: Tensor) -> tuple[tuple[int, ...], None, int] | None:
        if not given.dim() or not given.numel() or given.shape[-1] != self.in_features:
            return None
        return (given.numel() // self.in_features,), None, 1

    def dense(self) -> nn.Linear:
        """The `nn.Linear` with the same function."""
        empty = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return filled(empty, self)  # type: ignore[return-value]
