"""Convolution between homogeneous spaces: from signals on the cosets G/H to signals on the cosets G/K."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .errors import GMError, shown
from .groups import Group, as_given, cosets, embed, factor_generators, word_lengths
from .groups import group as parse
from .groups.group import Indices
from .linalg import usual_strides
from .stencils import multiply_labelled
from .structure import Structure


class HomogeneousConv(nn.Module):
    """The linear maps from G/H to G/K that commute with G: out[o, yK] = b_o + Σ_c Σ_xH k[o, c, y⁻¹x] in[c, xH].

    `source` is H and `target` is K, each a subgroup as in `embed`, () being the trivial one with G/1 = G. The kernel is
    constant on double cosets K·u·H, so it has one entry for each that holds an element of word length at most `radius`
    (of all, where None) in `generators`, by default those of the factors. Points are numbered, and moved by G, as in
    `groups.cosets(group, generators of the subgroup)`. H = K = 1 is `GroupConv`, which is the faster one.

    Parameters: `kernel` (o, i, double cosets), `bias` (o).

    Raises:
        GMError: widths or radius are no natural numbers, or a subgroup is not there.
    Source: GM paper, section on homogeneous spaces.

    >>> layer = HomogeneousConv("D4", 3, 5, source=[1], target=())  # from the corners of a square to its symmetries
    >>> layer(torch.ones(2, 3, 4)).shape, layer.kernel.shape
    (torch.Size([2, 5, 8]), torch.Size([5, 3, 4]))
    >>> layer
    HomogeneousConv('D4', 3, 5, source=(1,), target=())
    """

    labels: Tensor

    def __init__(
        self,
        group: Group | str,
        in_channels: int,
        out_channels: int,
        *,
        source: str | Iterable[int],
        target: str | Iterable[int],
        radius: int | None = None,
        generators: Iterable[int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("in_channels", in_channels, 1), ("out_channels", out_channels, 1)):
            if not isinstance(value, int) or value < least:
                raise GMError(f"{name} is an integer of at least {least}, not {shown(value)}")
        if radius is not None and (not isinstance(radius, int) or radius < 0):
            raise GMError(f"a radius is an integer of at least 0, not {shown(radius)}")
        self.group = parse(group)
        self.in_channels, self.out_channels, self.radius = in_channels, out_channels, radius
        self.generators = None if generators is None else tuple(generators)
        self.source, self.target = as_given(source), as_given(target)
        self.columns, self.rows = (
            cosets(self.group, embed(self.group, each)[1].tolist()) for each in (self.source, self.target)
        )
        labels, self._taps = self._label()
        self.register_buffer("labels", torch.tensor(labels, device=device), persistent=False)
        self.kernel = nn.Parameter(torch.empty(out_channels, in_channels, self._taps, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def _label(self) -> tuple[Indices, int]:  # (|G/K|, |G/H|)
        """The double coset K·y⁻¹x·H of every pair of points, and how many are near enough; all others are one label."""
        labels = Structure(self.group, self.rows, self.columns).labels
        metric = factor_generators(self.group) if self.generators is None else self.generators
        lengths = word_lengths(self.group, metric)
        # the point xH is read by K itself, row 0, with the double coset of x
        points = self.columns.action[:, 0]
        nearest = np.full(int(labels.max()) + 1, self.group.order)
        reached = lengths >= 0
        np.minimum.at(nearest, labels[0, points[reached]], lengths[reached])
        kept = np.flatnonzero(nearest <= (self.group.order if self.radius is None else self.radius))
        number = np.full(len(nearest), len(kept), dtype=np.int64)
        number[kept] = np.arange(len(kept))
        return number[labels], len(kept)

    def reset_parameters(self) -> None:
        """Draw a start: the variance of torch's own layers, by the number of points that an output reads."""
        reads = int((self.labels[0] < self._taps).sum())
        bound = 1 / math.sqrt(self.in_channels * reads)
        for each in self.parameters():
            nn.init.uniform_(each, -bound, bound)

    def forward(self, signal: Tensor) -> Tensor:  # (batch, in_channels, |G/H|) -> (batch, out_channels, |G/K|)
        """The signal on G/K."""
        if signal.dim() != 3 or tuple(signal.shape[1:]) != (self.in_channels, self.columns.size):
            wanted = f"(batch, {self.in_channels}, {self.columns.size})"
            raise GMError(f"a signal here has shape {wanted}, but this one has {tuple(signal.shape)}")
        found = multiply_labelled(signal, usual_strides(self.kernel), self.labels)
        return found if self.bias is None else found + self.bias.to(found)[:, None]

    def multiply_adds(
        self,
        shape: Sequence[int],  # of an output
    ) -> int:
        """Multiply-adds of a call: every output reads every input."""
        return math.prod(shape) * self.in_channels * self.columns.size

    def __repr__(self) -> str:
        options = f", source={self.source!r}, target={self.target!r}"
        options += "" if self.radius is None else f", radius={self.radius}"
        options += "" if self.generators is None else f", generators={self.generators!r}"
        options += ", bias=False" * (self.bias is None)
        group = repr(self.group.name) if self.group.name else repr(self.group)
        return f"HomogeneousConv({group}, {self.in_channels}, {self.out_channels}{options})"
