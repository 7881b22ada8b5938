"""Convolution on the Lie groups SE(2), R²⋊R⁺ and Sim(2) by sampling, with kernels from small sinusoidal networks."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .errors import GMError, shown
from .liegrids import LieGrid, taper
from .siren import Siren
from .structure import check_kind, combine, separable_shapes

EDGE = 0.5  # of the radius, where a kernel begins to fade


class LieConv(nn.Module):
    """The convolution on G = R²⋊H by sampling: y[x, h] = b + Σ_c ∫∫ k_c(h⁻¹(x̃-x), h⁻¹h̃) f_c(x̃, h̃) dx̃ dh̃ / |h|.

    `group` is "SE(2)" (H the rotations), "R^2:R+" (dilations by 1 to `max_scale`) or "Sim(2)" (both); `samples` is the
    number of rotations, of scales, or (rotations, scales), as in `gmcompress.liegrids.LieGrid`. Signals are (batch,
    channels, samples, height, width), zero outside, and move by (g·f)(x, h) = f(g⁻¹x, g⁻¹h), with which the layer
    commutes up to its sampling: exactly for quarter turns about the middle where four divides the rotations; for
    dilations at scales a factor of `reach` away from the smallest and the largest, as beyond them nothing is sampled.
    `lift=True` reads images (batch, channels, height, width), and its kernels have no part in H.

    Kernels are a `Siren` of `hidden` wide, `layers` deep at frequency `omega`, on a disc that is `kernel_size` pixels
    across at scale 1, towards whose edge they fade, and s times that at scale s; in H they depend on the logarithm of
    h⁻¹h̃, and fade to zero where two scales differ by a factor of `reach`. None of it depends on the samples:
    `resampled` makes the same layer on others. `separable` is one of the kinds of `gmcompress.separation`, N being R²,
    a sum of `terms`; all but gseparable convolve in cheaper steps.

    `source` and `target` in a call are offsets of the grids of input and output, from `grid.draw()`, for training on
    random samples of H: what one layer has as target the next one has as source. `LieCNN` does that.

    Parameters: those of the sirens, `kernel`, or for a separable kind `outer` and `inner`; `mixing` (terms, o, i);
    `bias` (o).

    Raises:
        GMError: widths and sizes are no natural numbers, the kernel size is even, the group or the kind is unknown, or
            a lifting layer is to be separable.
    Source: Knigge, Romero, Bekkers 2022, the section on the method, and appendix C.2 for the kinds.

    >>> lift = LieConv("SE(2)", 3, 8, 5, samples=8, lift=True)
    >>> lift(torch.ones(2, 3, 9, 9)).shape
    torch.Size([2, 8, 8, 9, 9])
    >>> LieConv("Sim(2)", 8, 4, 5, samples=(8, 3), separable="separable")(torch.ones(2, 8, 24, 9, 9)).shape
    torch.Size([2, 4, 24, 9, 9])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        group: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        samples: int | tuple[int, int],
        max_scale: float = 2.0,
        reach: float = 2.0,
        lift: bool = False,
        separable: str | None = None,
        terms: int = 1,
        hidden: int = 32,
        layers: int = 2,
        omega: float = 10.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        named = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size}
        for name, value in (named | {"terms": terms, "hidden": hidden, "layers": layers}).items():
            if type(value) is not int or value < 1:
                raise GMError(f"{name} is an integer of at least 1, not {shown(value)}")
        if not kernel_size % 2:
            raise GMError(f"kernel_size is an odd number of pixels, so that a pixel is the middle, not {kernel_size}")
        for name, number, least in (("omega", omega, 0), ("reach", reach, 1)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not least < number < math.inf:
                raise GMError(f"{name} is a number above {least}, not {shown(number)}")
        self.grid = LieGrid(group, samples, max_scale)
        self.kind = check_kind("nonseparable" if separable is None else separable)
        if lift and self.kind != "nonseparable":
            raise GMError(f"a lifting layer has no part in H that could be {self.kind}; leave separable out")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.reach, self.lift, self.terms, self.hidden, self.layers, self.omega = (
            reach,
            lift,
            terms,
            hidden,
            layers,
            omega,
        )
        self._build({"device": device, "dtype": dtype})
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _build(self, made: dict[str, Any]) -> None:
        """The sirens and the mixing that the kind asks for; `channels` are the axes of their values."""
        o, i, h = self.out_channels, self.in_channels, 0 if self.lift else self.grid.dimension
        if self.kind == "nonseparable":
            self.channels: dict[str, tuple[int, ...]] = {"kernel": (1, o, i)}
        else:
            found = separable_shapes(self.kind, o, i, (1, 1), self.terms)  # with an axis for each of x and h
            axes = {"mixing": 0, "inner": 1, "outer": 2 if self.kind == "dseparable" else 1}
            self.channels = {name: shape[: len(shape) - axes[name]] for name, shape in found.items()}
        entry = 1 / math.sqrt(3 * self.in_channels * self.terms * self._area())  # the deviation in torch's own layers
        self.deviation = entry ** (1 / len(self.channels))
        inputs = {"kernel": 2 + h, "inner": h, "outer": 2 + h * (self.kind == "dseparable")}
        options = {"hidden": self.hidden, "layers": self.layers, "omega": self.omega, "std": self.deviation} | made
        for name, shape in self.channels.items():
            if name == "mixing":
                self.mixing = nn.Parameter(torch.empty(shape, **made))
            else:
                self.add_module(name, Siren(inputs[name], math.prod(shape), **options))

    def reset_parameters(self) -> None:
        """Draw a start: entries of the kernel in space have the variance of torch's own layers, the bias is zero."""
        for name in self.channels:
            if name == "mixing":
                nn.init.normal_(self.mixing, std=self.deviation)
            else:
                getattr(self, name).reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # ------------------------------------------------------------------------------------------------------- kernels

    def _side(self, target: Tensor | None = None) -> int:
        """The side of the box, in pixels, that holds the disc at the largest scale."""
        return 2 * math.ceil(self.kernel_size / 2 * self.grid.largest(offset=target is not None)) - 1

    def _area(self) -> float:
        """The number of pixels in the kernel at scale 1, those at the fading edge in part."""
        half = self.kernel_size / 2
        steps = torch.arange(self.kernel_size, device="cpu", dtype=torch.float64) - (self.kernel_size - 1) / 2
        return float(fading(torch.hypot(steps[:, None], steps) / half).square().sum())

    def _places(self, target: Tensor | None) -> tuple[Tensor, Tensor]:  # (targets, pixels, 2), (targets, pixels)
        """The coordinates h⁻¹·x of all pixels x of the box, in radii of the disc, and factors of the kernel there."""
        device = next(self.parameters()).device
        side = self._side(target)
        steps = torch.arange(side, device=device, dtype=torch.float64) - side // 2
        points = torch.stack([steps.repeat(side), -steps.repeat_interleave(side)], 1)  # rows downwards, y upwards
        pulled, change = self.grid.pull_back(points / (self.kernel_size / 2), target)
        return pulled, fading(pulled.norm(dim=2)) * change[:, None]

    def _sampled(self, source: Tensor | None, target: Tensor | None) -> dict[str, Tensor]:
        """The factors of the kernel with all measures: (terms, o, targets, i if any, sources if any, pixels if any)."""
        places, gain = self._places(target)
        if not self.lift:
            logs, shares, measure = self.grid.between(source, target, reach=self.reach, device=places.device)
        found = {}
        for name, shape in self.channels.items():
            if name == "mixing":
                found[name] = self.mixing[:, :, None].expand(-1, -1, self.grid.size, -1)
                continue
            siren = getattr(self, name)
            if self.lift:
                values, times = siren(places)[:, None], gain[:, None]
            elif name == "inner":
                values, times = siren(logs, shares), measure
            elif siren.sizes[0] == 2:
                values, times = siren(places), gain
            else:
                size = (*measure.shape, places.shape[1], shares.shape[2])  # targets, sources, pixels, logs
                both = [places[:, None, :, None].expand(*size, 2), logs[:, :, None].expand(*size, self.grid.dimension)]
                values = siren(torch.cat(both, 4), shares[:, :, None].expand(size))
                times = measure[:, :, None] * gain[:, None]
            values = (values * times.to(values)[..., None]).movedim(-1, 0).unflatten(0, shape)
            found[name] = values.movedim(len(shape), 2)
        return found

    def full_kernel(
        self, *, source: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:  # (o, targets, i, sources, side, side)
        """The kernel of the ordinary convolution that does the same, measures included; differentiable.

        A lifting layer has one source. As a weight of conv2d: `.flatten(2, 3).flatten(0, 1)`.

        >>> LieConv("SE(2)", 3, 5, 7, samples=4).full_kernel().shape
        torch.Size([5, 4, 3, 4, 7, 7])
        """
        return self._joined(self._sampled(source, target))

    def _joined(self, found: dict[str, Tensor]) -> Tensor:  # (o, targets, i, sources, side, side)
        if self.kind == "nonseparable":
            kernel = found["kernel"][0]
        else:  # one output for every pair of output and target
            if self.kind == "dseparable":
                found = found | {"outer": found["outer"].transpose(3, 4)}
            apart = {name: each.flatten(1, 2) for name, each in found.items()}
            kernel = combine(apart, self.kind).unflatten(0, (self.out_channels, -1)).transpose(3, 4)
        side = math.isqrt(kernel.shape[-1])
        return kernel.unflatten(-1, (side, side))

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        signal: Tensor,  # (batch, in_channels, samples, height, width), where lifting without samples
        *,
        source: Tensor | None = None,  # (2), the offset of the samples of the signal
        target: Tensor | None = None,  # (2), that of the samples of the result
    ) -> Tensor:  # (batch, out_channels, samples, height, width)
        """The signal on the group."""
        wanted = (self.in_channels,) if self.lift else (self.in_channels, self.grid.size)
        if signal.dim() != 3 + len(wanted) or tuple(signal.shape[1:-2]) != wanted:
            shape = ", ".join(map(str, wanted))
            raise GMError(f"a signal here has shape (batch, {shape}, height, width), not {tuple(signal.shape)}")
        if self.lift and source is not None:
            raise GMError("images have no samples, so a lifting layer has no source; give target alone")
        found = {name: each.to(signal.dtype) for name, each in self._sampled(source, target).items()}
        size = (self.terms * self.out_channels, self.grid.size)
        if self.kind in ("nonseparable", "gseparable"):
            kernel = self._joined(found).flatten(2, 3).flatten(0, 1)
            moved = _convolve(signal.flatten(1, -3), kernel).unflatten(1, (self.out_channels, -1))
        else:
            if "mixing" in found:
                flat = _convolve(signal.flatten(2, 3), self.mixing.to(signal.dtype).flatten(0, 1)[:, :, None, None])
                flat = flat.unflatten(2, signal.shape[2:4]).flatten(1, 2)
                groups = size[0]
            else:
                flat, groups = signal.flatten(1, 2), 1
            if "inner" in found:
                inner = found["inner"].flatten(0, 2).flatten(1)  # (terms·o·targets, i·sources or sources)
                flat, groups = _convolve(flat, inner[:, :, None, None], groups), math.prod(size)
            outer = found["outer"].flatten(0, 2)  # (terms·o·targets, sources if any, pixels)
            side = math.isqrt(outer.shape[-1])
            outer = outer.reshape(len(outer), -1, side, side)
            moved = _convolve(flat, outer, groups).unflatten(1, (self.terms, self.out_channels, -1)).sum(1)
        return moved if self.bias is None else moved + self.bias.to(moved)[:, None, None, None]

    # -------------------------------------------------------------------------------------------------- other layers

    def resampled(self, samples: int | tuple[int, int]) -> LieConv:
        """A copy, of the same parameters, on another number of samples.

        >>> LieConv("SE(2)", 1, 2, 5, samples=4).resampled(12).grid.size
        12
        """
        made = copy.deepcopy(self)
        made.grid = replace(self.grid, samples=samples)
        return made

    def __repr__(self) -> str:
        scales = self.grid.group != "SE(2)"
        every = {
            "max_scale": (self.grid.max_scale, 2.0 if scales else self.grid.max_scale),
            "reach": (self.reach, 2.0),
            "lift": (self.lift, False),
            "separable": (self.kind, "nonseparable"),
            "terms": (self.terms, 1),
            "hidden": (self.hidden, 32),
            "layers": (self.layers, 2),
            "omega": (self.omega, 10.0),
            "bias": (self.bias is not None, True),
        }
        options = "".join(f", {name}={value!r}" for name, (value, usual) in every.items() if value != usual)
        sizes = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, samples={self.grid.samples!r}"
        return f"LieConv({self.grid.group!r}, {sizes}{options})"


def fading(distance: Tensor) -> Tensor:
    """By the distance from the middle, in radii of the disc: 1 inside, from `EDGE` on a cosine, 0 outside.

    >>> fading(torch.tensor([0.0, EDGE, (1 + EDGE) / 2, 1.0, 2.0]))
    tensor([1.0000, 1.0000, 0.5000, 0.0000, 0.0000])
    """
    return taper((distance - EDGE) / (1 - EDGE))


def _convolve(signal: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:  # (batch, i, ...), (o, i/groups, side, side)
    return F.conv2d(signal, kernel, padding=kernel.shape[-1] // 2, groups=groups)
