"""Small sinusoidal networks from coordinates to the values of a kernel."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Siren(nn.Module):
    """Kernel values at coordinates: sin(ω₀(W·x + b)) in every hidden layer, and an affine map behind the last.

    Hidden weights start as in Sitzmann et al.: U(±1/inputs) in the first layer, U(±√(6/width)/ω₀) in the others, with
    biases as in torch.nn.Linear; the last layer starts so that values have the standard deviation `std`. A larger
    `omega` means kernels of higher frequencies. Values are computed in float32, or float64 where the parameters are,
    under autocast too: at frequency ω₀ coordinates do not bear rounding.

    Parameters: `weight0` (hidden, inputs), `bias0` (hidden), ... to the last, (outputs, hidden) and (outputs).

    Source: Sitzmann, Martel, Bergman, Lindell, Wetzstein 2020, section 3.2 and supplement 1.5.

    >>> Siren(2, 6, hidden=16)(torch.zeros(5, 2)).shape
    torch.Size([5, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: int = 32,
        layers: int = 2,
        omega: float = 10.0,
        std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sizes = (inputs, *(hidden,) * layers, outputs)
        self.omega, self.std = float(omega), std
        for number, (columns, rows) in enumerate(pairwise(self.sizes)):
            for name, shape in ((f"weight{number}", (rows, columns)), (f"bias{number}", (rows,))):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a start."""
        last = len(self.sizes) - 2
        for number, columns in enumerate(self.sizes[:-1]):
            bound = 1 / columns if number == 0 else math.sqrt(6 / columns) / self.omega
            if number == last:  # a sine of many phases has the mean square 1/2
                bound = self.std * math.sqrt(6 / columns)
            nn.init.uniform_(getattr(self, f"weight{number}"), -bound, bound)
            edge = 0 if number == last else 1 / math.sqrt(columns)
            nn.init.uniform_(getattr(self, f"bias{number}"), -edge, edge)

    def _affine(self, number: int, found: Tensor) -> Tensor:
        """The affine map of one layer, in the dtype of what it is applied to."""
        weight, bias = getattr(self, f"weight{number}"), getattr(self, f"bias{number}")
        return F.linear(found, weight.to(found), bias.to(found))

    def forward(
        self,
        coordinates: Tensor,  # (*, inputs), or (*, several, inputs)
        shares: Tensor | None = None,  # (*, several), of sum 1
    ) -> Tensor:  # (*, outputs)
        """The values, or their sums over several coordinates by their shares."""
        kind = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        place = coordinates.device.type  # there is no autocast on the meta device
        with torch.autocast(place, enabled=False) if torch.amp.is_autocast_available(place) else nullcontext():
            found = coordinates.to(kind)
            for number in range(len(self.sizes) - 2):
                found = (self.omega * self._affine(number, found)).sin()
            if shares is not None:  # before the last affine map, which keeps sums of shares
                found = (shares.to(kind)[..., None] * found).sum(-2)
            return self._affine(len(self.sizes) - 2, found)

    def __repr__(self) -> str:
        inputs, *hidden, outputs = self.sizes
        return f"Siren({inputs}, {outputs}, hidden={hidden[0]}, layers={len(hidden)}, omega={self.omega:g})"
