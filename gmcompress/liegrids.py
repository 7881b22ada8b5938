"""Lie groups of the plane by sampling: grids on H in G = R²⋊H, their logarithms, and the measure of a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GMError, nearest_names, shown

FACTORS = {"SE(2)": ("rotations",), "R^2:R+": ("scales",), "Sim(2)": ("rotations", "scales")}
FULL = 2 * math.pi


def taper(distance: Tensor) -> Tensor:
    """1 up to 0, (1 + cos πd)/2 between, and 0 from 1 on.

    >>> taper(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]))
    tensor([1.0000, 1.0000, 0.5000, 0.0000, 0.0000])
    """
    return (1 + (math.pi * distance.clamp(0, 1)).cos()) / 2


@dataclass(frozen=True)
class LieGrid:
    """A uniform grid on H, the rotations and dilations about a point: n angles of a full turn, m scales 1 to max_scale.

    `group` is "SE(2)", "R^2:R+" or "Sim(2)"; `samples` is n, m, or (n, m) in turn. An element is written as its
    logarithm (angle, logarithm of the scale), in radians counterclockwise with x to the right and y upwards; elements
    are numbered with the scale fastest. All samples have the same measure `cell`: SO(2) has measure 1 in all, and R⁺
    the Haar measure ds/s. An `offset` (2) is a logarithm that is added to all of them; it changes no measure.

    Raises:
        GMError: the group is none of these, or numbers that make no grid.
    Source: Knigge, Romero, Bekkers 2022, the section on the method, for grids and measures.

    >>> LieGrid("Sim(2)", (8, 3))
    LieGrid(group='Sim(2)', samples=(8, 3), max_scale=2.0)
    >>> LieGrid("SE(2)", 4).logarithms()[:, 0].div(math.pi).tolist()
    [0.0, 0.5, 1.0, 1.5]
    """

    group: str
    samples: int | tuple[int, int]
    max_scale: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.group, str) or self.group not in FACTORS:
            near = nearest_names(self.group, FACTORS) if isinstance(self.group, str) else ", ".join(FACTORS)
            raise GMError(f"{shown(self.group)} is no Lie group known here; there are {near}")
        given = (self.samples,) if isinstance(self.samples, int) else self.samples
        wanted = FACTORS[self.group]
        numbers = isinstance(given, tuple | list) and all(type(each) is int and each > 0 for each in given)
        if not numbers or len(given) != len(wanted):
            raise GMError(
                f"samples on {self.group} are {' and '.join(f'a number of {each}' for each in wanted)}, "
                f"{'a pair' if len(wanted) > 1 else 'an integer'} of at least 1, not {shown(self.samples)}"
            )
        if len(wanted) > 1:
            object.__setattr__(self, "samples", tuple(given))
        scale = self.max_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 < scale < math.inf:
            raise GMError(f"max_scale is a number above 1, not {shown(scale)}")

    # ------------------------------------------------------------------------------------------------------- numbers

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of angles and of scales, 1 where the group has none."""
        given = (self.samples,) if isinstance(self.samples, int) else self.samples
        named = dict(zip(FACTORS[self.group], given, strict=True))
        return named.get("rotations", 1), named.get("scales", 1)

    @property
    def rotates(self) -> bool:
        """Whether H has rotations."""
        return "rotations" in FACTORS[self.group]

    @property
    def dilates(self) -> bool:
        """Whether H has dilations."""
        return "scales" in FACTORS[self.group]

    @property
    def size(self) -> int:
        """The number of samples of H."""
        return math.prod(self.counts)

    @property
    def dimension(self) -> int:
        """The dimension of H."""
        return len(FACTORS[self.group])

    @property
    def steps(self) -> tuple[float, float]:
        """From one angle, and one logarithm of a scale, to the next; 0 where the group has none."""
        angles, scales = self.counts
        return (
            FULL / angles if self.rotates else 0.0,
            math.log(self.max_scale) / max(scales - 1, 1) if self.dilates else 0.0,
        )

    @property
    def cell(self) -> float:
        """The measure of one sample: 1/n of the turn times the step of the scales.

        >>> LieGrid("SE(2)", 8).cell, LieGrid("R^2:R+", 2, math.e).cell
        (0.125, 1.0)
        """
        angle, stretch = self.steps
        return (angle / FULL if angle else 1.0) * (stretch if stretch else 1.0)

    def largest(self, *, offset: bool = False) -> float:
        """The largest scale of the grid, or of all its random offsets."""
        if not self.dilates:
            return 1.0
        reached = self.max_scale if self.counts[1] > 1 else 1.0
        return reached * math.exp(self.steps[1] / 2) if offset else reached

    # ------------------------------------------------------------------------------------------------------ elements

    def draw(self, *, device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A random offset (2) of at most half a step each way, so that every h is sampled as often as any other.

        A sum over samples of a grid so moved, each times `cell`, has the integral over H as its mean.

        >>> LieGrid("SE(2)", 8).draw(generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2])
        """
        uniform = torch.rand(2, device=device, dtype=torch.float64, generator=generator)
        return (uniform - 0.5) * uniform.new_tensor(self.steps)

    def logarithms(
        self, offset: Tensor | None = None, *, device: torch.device | str | None = None
    ) -> Tensor:  # (size, 2), float64
        """The logarithms (angle, logarithm of the scale) of all samples."""
        (angles, scales), (turn, stretch) = self.counts, self.steps
        first, second = (torch.arange(each, device=device, dtype=torch.float64) for each in (angles, scales))
        found = torch.stack([turn * first.repeat_interleave(scales), stretch * second.repeat(angles)], 1)
        return found if offset is None else found + offset.to(found)

    def pull_back(
        self,
        points: Tensor,  # (points, 2), x and y
        offset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # (size, points, 2), (size)
        """The points h⁻¹·x for all samples h, and the factors |h|⁻¹ = 1/scale² by which h⁻¹ changes areas."""
        angle, stretch = self.logarithms(offset, device=points.device).unbind(1)
        cosine, sine, shrink = angle.cos()[:, None], angle.sin()[:, None], (-stretch).exp()
        x, y = points.to(angle).unbind(1)
        turned = torch.stack([cosine * x + sine * y, cosine * y - sine * x], 2)
        return turned * shrink[:, None, None], shrink.square()

    def between(
        self,
        source: Tensor | None = None,  # (2), the offset of the samples h̃
        target: Tensor | None = None,  # (2), that of the samples h
        *,
        reach: float = 2.0,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All logarithms v of h⁻¹·h̃, scaled to about -1 to 1, the share of each, and the measure of the sample h̃.

        Shapes are (targets, sources, logs, dimension), (targets, sources, logs) and (targets, sources). A function on
        the circle is the sum over the logarithms v of an angle, two of which are within a full turn, of share(v) =
        cos²(v/4) times a function on the line: smooth where one logarithm alone would have to jump. The measure is
        `cell` times `taper`(|v|/log reach) in the scale, zero where scales differ by a factor of `reach` or more.
        """
        apart = self.logarithms(source, device=device) - self.logarithms(target, device=device)[:, None]
        turn, stretch = apart.unbind(2)
        stretch = stretch / math.log(reach)
        columns = [stretch[..., None]] if self.dilates else []
        measure = self.cell * taper(stretch.abs())
        shares = torch.ones_like(turn)[..., None]
        if self.rotates:
            turn = turn.remainder(FULL)
            logs = torch.stack([turn, turn - FULL], 2)
            shares = (logs / 4).cos().square()
            columns = [logs / math.pi, *(each.expand_as(logs) for each in columns)]
        return torch.stack(columns, 3), shares, measure
