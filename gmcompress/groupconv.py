"""Group convolution between signals on a group, with small kernels, strides and learned departures from symmetry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .errors import GMError, shown
from .groups import Group, as_given, ball, embed, factor_generators, word_lengths
from .groups import group as parse
from .groups.group import Indices
from .linalg import usual_strides
from .separation import Factors, grid_of, separate, tap_grid
from .sharing import SharingModule, shared_tensor
from .signals import flat_signal, shaped_signal
from .stencils import Stencil, depthwise, find_stencil, multiply
from .structure import check_kind, combine, separable_shapes

RESIDUALS = ("displacement", "row", "diagonal")


class GroupConv(SharingModule):
    """The convolution of signals on a group by a kernel on a ball: y[o, h] = b_o + Σ_c Σ_u k[o, c, u] x[c, h·u].

    Signals are (batch, channels, n), or (batch, channels, *axes) with an axis for each factor of a product; they move
    by (g·x)[y] = x[g⁻¹y], and at rank 0 the layer commutes with that. u runs over the elements of word length at most
    `radius` (over all of G where None) in `generators`, by default those of the factors. `stride` is a subgroup H, as
    in `embed`: outputs live on H, `out_group`, and the layer commutes with H.

    `rank` adds Σ_k gates[o, k, h] · (filters[o, k] ⋆ x)[o, h], a residual of displacement rank r in every output
    channel, zero at the start. `residual` narrows it: "row" frees the filter at the r positions nearest to the identity
    (no gates), "diagonal" lets the values at the r nearest taps vary with the position (filters have one tap each).

    `separable` is one of the kinds of `gmcompress.separation` on the factorisation `factors`, a sum of `terms`; taps
    are then all products of the ball's parts, and all but gseparable convolve in two cheaper steps.

    Parameters: `kernel` (o, i, taps), or for a separable kind `mixing`, `outer`, `inner`; `gates` (o, r, m) and
    `filters` (o, r, i, taps); `bias` (o). Buffers are recomputed, not saved.

    Raises:
        GMError: widths, rank or radius are no natural numbers, the subgroup is not there, or the kind is unknown.
    Source: GM paper, sections on group convolution, strides and approximate equivariance; Knigge et al. 2022.

    >>> layer = GroupConv("C8xC8", 3, 5, radius=1, stride="C4xC4", rank=1)
    >>> layer
    GroupConv('C8xC8', 3, 5, radius=1, stride='C4xC4', rank=1)
    >>> layer(torch.ones(2, 3, 8, 8)).shape, layer.out_group
    (torch.Size([2, 5, 4, 4]), group('C4xC4'))
    >>> layer.kernel.shape, layer.gates.shape, layer.filters.shape
    (torch.Size([5, 3, 5]), torch.Size([5, 1, 16]), torch.Size([5, 1, 3, 5]))
    """

    PARTS: Final = ("kernel", "mixing", "outer", "inner", "gates", "filters")
    SHARED = ("_main", "_inner", "_outer", "_rows", "_reads")  # index arrays
    kernel: Tensor  # of these, only those that the options ask for
    mixing: Tensor
    outer: Tensor
    inner: Tensor
    gates: Tensor
    filters: Tensor

    def __init__(
        self,
        group: Group | str,
        in_channels: int,
        out_channels: int,
        *,
        radius: int | None = None,
        generators: Iterable[int] | None = None,
        stride: str | Iterable[int] | None = None,
        rank: int = 0,
        residual: str = "displacement",
        separable: str | None = None,
        factors: Factors | None = None,
        terms: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group = parse(group)
        self.in_channels = _natural("in_channels", in_channels, 1)
        self.out_channels = _natural("out_channels", out_channels, 1)
        self.radius, self.rank, self.terms = radius, _natural("rank", rank, 0), _natural("terms", terms, 1)
        self.generators = None if generators is None else tuple(generators)
        self.stride = None if stride is None else as_given(stride)
        self.residual = residual
        self.kind = check_kind("nonseparable" if separable is None else separable)
        self.factors = factors
        self.out_group, members = (
            (self.group, np.arange(self.group.order)) if self.stride is None else embed(self.group, self.stride)
        )
        self._place(members)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        wanted = self._shapes()
        for part in self.PARTS:
            stored = nn.Parameter(torch.empty(wanted[part], **made)) if part in wanted else None
            self.register_parameter(part, stored)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **made)) if bias else None)
        self._choose_methods()
        self.share_(torch.get_default_device() if device is None else device)
        self.reset_parameters()

    # ------------------------------------------------------------------------------------------------- what it reads

    def _place(self, members: Indices) -> None:
        """Taps, free rows and free diagonals, all by word length."""
        if self.residual not in RESIDUALS:
            raise GMError(f"residual is one of {', '.join(RESIDUALS)}, not {shown(self.residual)}")
        metric = factor_generators(self.group) if self.generators is None else self.generators
        whole = self.radius is None
        taps = np.arange(self.group.order) if whole else ball(self.group, self.radius, metric)  # type: ignore[arg-type]
        self.grid: tuple[Indices, Indices] | None = None
        if self.kind not in ("nonseparable", "dseparable"):
            self.grid = grid_of(self.group, taps, self.factors)
            taps = self.group.table[np.ix_(*self.grid)].ravel()
        self.stencil = find_stencil(self.group, members, taps)
        lengths = word_lengths(self.group, metric)
        lengths[lengths < 0] = self.group.order
        if self.residual == "diagonal":  # places among the taps
            self._freed = np.lexsort((taps, lengths[taps]))[: self.rank]
        else:  # positions of the output
            self._freed = np.lexsort((members, lengths[members]))[: self.rank]
        most = {"row": len(members), "diagonal": len(taps)}.get(self.residual, self.rank)
        if self.rank > most:
            raise GMError(f"{self.residual!r} has rank at most {most} on {self.group} here, not {self.rank}")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        o, i, taps = self.out_channels, self.in_channels, len(self.stencil.taps)
        if self.kind == "nonseparable":
            found: dict[str, tuple[int, ...]] = {"kernel": (o, i, taps)}
        else:
            sizes = (taps, 1) if self.grid is None else (len(self.grid[0]), len(self.grid[1]))
            found = separable_shapes(self.kind, o, i, sizes, self.terms)
        if self.rank:
            if self.residual != "row":
                found["gates"] = (o, self.rank, len(self.stencil.members))
            found["filters"] = (o, self.rank, i, *(() if self.residual == "diagonal" else (taps,)))
        return found

    def _stencils(self) -> dict[str, Stencil]:
        """What the forward pass multiplies by, step by step: the factors of a kernel, or where cheaper the kernel."""
        found = {}
        if self.kind == "dseparable":
            found["outer"] = self.stencil
        elif self.kind in ("separable", "dgseparable"):
            assert self.grid is not None
            found["inner"] = find_stencil(self.group, np.arange(self.group.order), self.grid[1])
            found["outer"] = find_stencil(self.group, self.stencil.members, self.grid[0])
        if found and min(self.stencil.costs(self.out_channels, self.in_channels).values()) < self._cost_apart(found):
            found = {}
        if not found or (self.rank and self.residual == "displacement"):
            found["main"] = self.stencil
        return found

    def _cost_apart(self, steps: dict[str, Stencil]) -> float:
        """Time for one example of a separable product by its factors, as `Stencil.costs` counts it."""
        own = self.terms * self.out_channels
        mixing = own * self.in_channels * self.group.order
        if self.kind == "separable":
            return min(steps["inner"].costs(own, self.in_channels).values()) + steps["outer"].depthwise_cost(own)
        return mixing + sum(each.depthwise_cost(own) for each in steps.values())

    def _choose_methods(self) -> None:
        """The way to multiply of every step, by cost."""
        self._steps = self._stencils()
        self.methods: dict[str, str] = {}
        for step, stencil in self._steps.items():
            if step == "outer" or (step == "inner" and self.kind == "dgseparable"):  # channel by channel
                self.methods[step] = "circular" if stencil.box else "taps"
            else:
                together = self.terms if step == "inner" else 1 + self.rank * (self.residual == "displacement")
                self.methods[step] = stencil.method(together * self.out_channels, self.in_channels)

    def share_(self, device: torch.device | str | None = None) -> None:
        """Take the index arrays that all layers which read alike share on a device, by default where the kernel is."""
        device = next(iter(self.parts().values())).device if device is None else device
        for step, stencil in self._steps.items():
            self.register_buffer(f"_{step}", stencil.tensor(self.methods[step], device), persistent=False)
        if self.rank and self.residual != "displacement":
            row, freed, reads = self.residual == "row", self._freed, self.stencil.reads
            tables: dict[str, Callable[[], Indices]] = {"_rows": lambda: freed} if row else {}
            tables["_reads"] = lambda: reads[:, freed] if row else reads[freed]  # (taps, r) or (r, m)
            for name, make in tables.items():
                key = (self.stencil, self.residual, name, freed.tobytes())
                table = shared_tensor(key, make, dtype=torch.int64, device=device)
                self.register_buffer(name, table, persistent=False)

    # ------------------------------------------------------------------------------------------------------ weights

    def reset_parameters(self) -> None:
        """Draw a start: entries of the kernel have the variance of torch's own layers, residuals zero but trainable."""
        bound = 1 / math.sqrt(self.in_channels * len(self.stencil.taps))
        named = self.parts()
        own = [each for name, each in named.items() if name not in ("gates", "filters")]
        for tensor in own:
            if self.kind == "nonseparable":
                nn.init.uniform_(tensor, -bound, bound)
            else:  # so that a sum of products of that many factors has variance bound²/3
                nn.init.normal_(tensor, std=(bound / math.sqrt(3 * self.terms)) ** (1 / len(own)))
        if "gates" in named:
            nn.init.uniform_(named["gates"], -math.sqrt(3), math.sqrt(3))
        if "filters" in named:
            nn.init.zeros_(named["filters"])
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by name, without the bias."""
        named = {part: getattr(self, part) for part in self.PARTS}
        return {part: tensor for part, tensor in named.items() if tensor is not None}

    def _operand(self, part: str) -> Tensor:
        """A stored tensor as products take it."""
        return usual_strides(getattr(self, part))

    @property
    def tap_grid(self) -> str:
        """How the taps lie on the grid of two subgroups, those of `factors` or those that the group names.

        >>> GroupConv("C8xC8", 1, 1, radius=1).tap_grid
        '3x3<0-3,6>'
        """
        return str(tap_grid(self.group, self.stencil.taps, self.factors))

    def full_kernel(self) -> Tensor:  # (o, i, taps)
        """The kernel on all taps that the stored tensors stand for, without the residual; differentiable."""
        own = {name: self._operand(name) for name in self.parts() if name not in ("gates", "filters")}
        return combine(own, self.kind).flatten(2)

    def full_residual(self) -> tuple[Tensor, Tensor]:  # (o, r, m), (o, r, i·taps)
        """Gates and filters of the residual on all positions and taps, whichever kind it is of.

        Raises:
            GMError: the layer has rank 0.
        """
        if not self.rank:
            raise GMError("this layer has rank 0, and so no residual")
        o, r, m = self.out_channels, self.rank, len(self.stencil.members)
        filters, gates = self.filters, self.gates
        freed = torch.as_tensor(self._freed, device=filters.device)
        if self.residual == "row":
            gates = F.one_hot(freed, m).to(filters).expand(o, r, m)
        elif self.residual == "diagonal":
            filters = filters[..., None] * F.one_hot(freed, len(self.stencil.taps)).to(filters)[:, None]
        return gates, filters.flatten(2)

    @property
    def weight(self) -> Tensor:  # (o·m, i·n)
        """The dense matrix of the layer, of rows (channel, position), differentiable; for small groups."""
        kernel = self.full_kernel()
        labels = torch.as_tensor(self.stencil.labels, device=kernel.device)
        (o, i, _), (m, n) = kernel.shape, labels.shape
        rows = kernel[:, None].expand(o, m, i, -1)
        if self.rank:
            gates, filters = self.full_residual()
            rows = rows + (gates.transpose(1, 2) @ filters).reshape(o, m, i, -1)
        return F.pad(rows, (0, 1)).gather(3, labels[None, :, None].expand(o, m, i, n)).reshape(o * m, i * n)

    @torch.no_grad()
    def distance(self, *, relative: bool = False) -> float:
        """d(W), of the layer's weight to the nearest one that commutes with the subgroup, as `gmcompress.distance`.

        W = 1 kᵀ + Σ a bᵀ in group diagonals, so d² = Σ_o tr(A Aᵀ B Bᵀ) with the gates A centred over the positions.
        """
        kernel = self.full_kernel().double().flatten(1)  # (o, i·taps)
        m = len(self.stencil.members)
        if not self.rank:
            return 0.0
        gates, filters = (each.double() for each in self.full_residual())
        mean = gates.mean(2, keepdim=True)
        centred = gates - mean
        apart = float(((centred @ centred.mT) * (filters @ filters.mT)).sum())
        shared = m * float((kernel + (mean * filters).sum(1)).square().sum())
        scale = apart + shared if relative else 1.0
        return math.sqrt(max(apart, 0.0) / max(scale, torch.finfo(torch.float64).tiny))

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(
        self, signal: Tensor
    ) -> Tensor:  # (batch, in_channels, n or *axes) -> (batch, out_channels, m or *axes)
        """The convolution, on `out_group`."""
        flat = flat_signal(signal, self.group, self.in_channels)
        if self.kind == "nonseparable" and self.rank and self.residual == "displacement":
            found = self._gated(flat, torch.cat([self._operand("kernel")[:, None], self._operand("filters")], 1))
        else:
            found = self._equivariant(flat)
            if self.rank:
                found = found + self._departure(flat)
        if self.bias is not None:
            found = found + self.bias.to(found)[:, None]
        return shaped_signal(found, self.out_group, signal)

    def _multiply(self, step: str, flat: Tensor, kernel: Tensor) -> Tensor:
        table = self.get_buffer(f"_{step}")
        return multiply(flat, kernel, self._steps[step], method=self.methods[step], table=table)

    def _depthwise(self, step: str, flat: Tensor, kernel: Tensor) -> Tensor:
        return depthwise(flat, kernel.flatten(0, 1).flatten(1), self._steps[step], table=self.get_buffer(f"_{step}"))

    def _equivariant(self, flat: Tensor) -> Tensor:  # (batch, i, n) -> (batch, o, m)
        """The part without a residual; a separable one mixes channels once and then convolves each by itself."""
        if "outer" not in self._steps:
            return self._multiply("main", flat, self.full_kernel())
        if self.kind == "separable":
            found = self._multiply("inner", flat, self._operand("inner").flatten(0, 1))
        else:
            found = self._operand("mixing").flatten(0, 1) @ flat
        if self.kind == "dgseparable":
            found = self._depthwise("inner", found, self._operand("inner"))
        found = self._depthwise("outer", found, self._operand("outer"))
        return found.unflatten(1, (self.terms, self.out_channels)).sum(1)

    def _gated(self, flat: Tensor, filters: Tensor) -> Tensor:  # filters: (o, 1 + r, i, taps) or (o, r, i, taps)
        """Σ_k gates_k ⊙ (filters_k ⋆ x); the first filter has no gate where there is one more than gates."""
        products = self._multiply("main", flat, filters.flatten(0, 1)).unflatten(1, filters.shape[:2])
        gates = self._operand("gates").to(products)  # under autocast they differ
        if filters.shape[1] > self.rank:
            return products[:, :, 0] + (gates * products[:, :, 1:]).sum(2)
        return (gates * products).sum(2)

    def _departure(self, flat: Tensor) -> Tensor:  # (batch, i, n) -> (batch, o, m)
        """The residual alone."""
        if self.residual == "displacement":
            return self._gated(flat, self._operand("filters"))
        reads = self.get_buffer("_reads")
        if self.residual == "row":
            values = torch.einsum("bitk,okit->bok", flat[:, :, reads], self._operand("filters"))
            empty = values.new_zeros(flat.shape[0], self.out_channels, len(self.stencil.members))
            return empty.index_copy(2, self.get_buffer("_rows"), values)
        mixed = (self._operand("filters").flatten(0, 1) @ flat).unflatten(1, (self.out_channels, self.rank))
        return (self._operand("gates").to(mixed) * mixed.gather(3, reads.expand(*mixed.shape[:2], *reads.shape))).sum(2)

    def multiply_adds(
        self,
        shape: Sequence[int],  # of an output
    ) -> int:
        """Multiply-adds of a call in matrix products and convolutions; gates, entry by entry, are none of them."""
        batch, o, i, r, terms = shape[0], self.out_channels, self.in_channels, self.rank, self.terms
        n, taps = self.group.order, len(self.stencil.taps)

        def product(step: str, channels: int) -> int:
            return self._steps[step].multiply_adds(self.methods[step], channels, i, batch)

        joined = self.kind == "nonseparable" and self.residual == "displacement"
        if "outer" not in self._steps:
            total = product("main", o * (1 + r * joined))
            # the kernel is a sum over terms of products
            total += o * i * taps * terms if self.kind != "nonseparable" and terms > 1 else 0
        else:
            total = product("inner", terms * o) if self.kind == "separable" else terms * o * i * batch * n
            for step in ("inner", "outer") if self.kind == "dgseparable" else ("outer",):
                total += self._steps[step].depthwise_multiply_adds(terms * o, batch)
        if not r or joined:
            return total
        if self.residual == "displacement":
            return total + product("main", o * r)
        return total + o * r * i * batch * (taps if self.residual == "row" else n)

    # ------------------------------------------------------------------------------------------------- other layers

    def like(self, kind: str, *, factors: Factors | None = None, terms: int = 1) -> GroupConv:
        """A layer of another kind of kernel and else as this one, its numbers drawn anew.

        Raises:
            GMError: the kind is unknown, or the group has no such factors.

        >>> GroupConv("D4", 3, 5).like("separable", terms=2)
        GroupConv('D4', 3, 5, separable='separable', terms=2)
        """
        options = self._options() | {"separable": kind, "factors": factors, "terms": terms}
        made = GroupConv(self.group, self.in_channels, self.out_channels, **options)
        return made.to(next(iter(self.parts().values()))).train(self.training)

    @torch.no_grad()
    def separated(self, kind: str, *, factors: Factors | None = None, terms: int = 1) -> GroupConv:
        """The layer of a separable kind whose kernel is nearest to this one's; residual and bias are taken along.

        Raises:
            GMError: the kind is unknown, or the group has no such factors.

        >>> GroupConv("D4", 3, 5).separated("separable").outer.shape
        torch.Size([1, 5, 4])
        """
        kernel, made = self.full_kernel(), self.like(kind, factors=factors, terms=terms)
        number = {int(tap): place for place, tap in enumerate(made.stencil.taps)}
        at = torch.tensor([number[int(tap)] for tap in self.stencil.taps], device=kernel.device)

        def moved(values: Tensor) -> Tensor:
            return values.new_zeros(*values.shape[:-1], len(number)).index_copy(values.dim() - 1, at, values)

        sizes = (len(number), 1) if made.grid is None else (len(made.grid[0]), len(made.grid[1]))
        tensors = separate(moved(kernel).unflatten(2, sizes), kind, terms=terms)
        if kind == "nonseparable":
            tensors = {"kernel": tensors["kernel"].flatten(2)}
        given = {name: getattr(self, name) for name in ("gates", "filters", "bias") if getattr(self, name) is not None}
        if self.rank and self.residual != "diagonal":
            given["filters"] = moved(self.filters)
        for name, tensor in (tensors | given).items():
            made.get_parameter(name).copy_(tensor)
        return made

    def _options(self) -> dict[str, Any]:
        every = {
            "radius": (self.radius, None),
            "generators": (self.generators, None),
            "stride": (self.stride, None),
            "rank": (self.rank, 0),
            "residual": (self.residual, "displacement"),
            "separable": (self.kind, "nonseparable"),
            "factors": (self.factors, None),
            "terms": (self.terms, 1),
            "bias": (self.bias is not None, True),
        }
        return {name: value for name, (value, usual) in every.items() if value != usual}

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._options().items())
        group = repr(self.group.name) if self.group.name else repr(self.group)
        return f"GroupConv({group}, {self.in_channels}, {self.out_channels}{options})"


def _natural(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise GMError(f"{name} is an integer of at least {least}, not {shown(value)}")
    return value
