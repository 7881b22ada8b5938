"""Smoke on a torus: an incompressible flow with buoyancy and two inflows, many simulations at once.

Lengths are cells and times steps. A velocity has the components (along rows, along columns); rows count downwards.
Source: Stam 1999, "Stable fluids": advection backwards along the flow, forces, projection; bilinear interpolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gmcompress import GMError

SIDE = 32
RADIUS = 2.5  # of an inflow
KEPT = 0.97  # of the smoke and of the flow, at every step
BUOYANCY = 0.06  # acceleration of smoke of density 1
INFLOW = 0.25  # density that the middle of an inflow of strength 1 brings at every step


@dataclass(frozen=True)
class Setup:
    """What drives each simulation: smoke that comes in at every step, and the acceleration of smoke of density 1."""

    inflow: Tensor  # (simulations, side, side)
    buoyancy: Tensor  # (simulations, 2, side, side)


def advected(
    fields: Tensor,  # (simulations, channels, side, side)
    velocity: Tensor,  # (simulations, 2, side, side)
) -> Tensor:  # as fields
    """What the flow carries to each cell in one step: the fields where the cell's content was, bilinearly.

    >>> row = torch.arange(4.0).repeat(1, 1, 4, 1)
    >>> advected(row, torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4))[0, 0, 0]
    tensor([3., 0., 1., 2.])
    """
    side = fields.shape[-1]
    places = torch.arange(side, dtype=velocity.dtype, device=velocity.device)
    origin = torch.stack(torch.meshgrid(places, places, indexing="ij")) - velocity
    corner = origin.floor()
    share = origin - corner
    flat, found = fields.flatten(2), torch.zeros_like(fields)
    for down in (0, 1):
        for right in (0, 1):
            row, column = ((corner[:, axis].long() + step) % side for axis, step in ((0, down), (1, right)))
            weight = (share[:, 0] if down else 1 - share[:, 0]) * (share[:, 1] if right else 1 - share[:, 1])
            at = (row * side + column).flatten(1)[:, None].expand(-1, fields.shape[1], -1)
            found = found + weight[:, None] * flat.gather(2, at).view_as(fields)
    return found


def divergence(velocity: Tensor) -> Tensor:  # (simulations, 2, side, side) -> (simulations, side, side)
    """By central differences."""
    return sum((velocity[:, axis].roll(-1, axis + 1) - velocity[:, axis].roll(1, axis + 1)) / 2 for axis in (0, 1))


def projected(velocity: Tensor) -> Tensor:  # (simulations, 2, side, side) -> same
    """The nearest flow without divergence and without a mean, by Fourier transforms.

    Central differences multiply a wave of frequency k by i·sin(2πk / side).
    """
    side = velocity.shape[-1]
    waves = (2 * math.pi * torch.fft.fftfreq(side, dtype=torch.float64)).sin()
    waves[waves.abs() < 1e-12] = 0  # the alternating wave
    symbol = torch.stack(torch.meshgrid(waves, waves[: side // 2 + 1], indexing="ij")).to(velocity)
    square = symbol.square().sum(0)
    spectrum = torch.fft.rfft2(velocity)
    along = (symbol * spectrum).sum(1, keepdim=True) / torch.where(square > 0, square, 1)
    spectrum = spectrum - symbol * along
    spectrum[..., 0, 0] = 0
    return torch.fft.irfft2(spectrum, s=(side, side))


def step(state: Tensor, setup: Setup) -> Tensor:  # (simulations, 3, side, side) -> same
    """The density and the velocity one step later: carried by the flow, then inflow, buoyancy and projection."""
    carried = KEPT * advected(state, state[:, 1:])
    density = carried[:, :1] + setup.inflow[:, None]
    return torch.cat([density, projected(carried[:, 1:] + density * setup.buoyancy)], 1)


def simulated(setup: Setup, steps: int) -> Tensor:  # (simulations, steps, 3, side, side)
    """The states after each step, from rest without smoke."""
    count, side = len(setup.inflow), setup.inflow.shape[-1]
    state, found = setup.inflow.new_zeros(count, 3, side, side), []
    for _ in range(steps):
        state = step(state, setup)
        found.append(state)
    return torch.stack(found, 1)


def discs(
    places: Tensor,  # (simulations, inflows, 2), in cells
    strengths: Tensor,  # (simulations, inflows)
    side: int = SIDE,
) -> Tensor:  # (simulations, side, side)
    """The sum of round inflows with soft edges, on the torus."""
    cells = torch.arange(side, dtype=places.dtype)
    apart = (cells - places[..., None] + side / 2).remainder(side) - side / 2  # (simulations, inflows, 2, side)
    square = apart[:, :, 0, :, None].square() + apart[:, :, 1, None, :].square()
    return (strengths[..., None, None] * torch.sigmoid(2 * (RADIUS - square.sqrt()))).sum(1)


def upward(imperfection: float, side: int = SIDE) -> Tensor:  # (2, side, side)
    """Buoyancy that is larger by this share in the right half than on average, and smaller in the left half."""
    share = torch.where(torch.arange(side) < side // 2, 1 - imperfection, 1 + imperfection)
    return BUOYANCY * torch.stack([-share.expand(side, side), torch.zeros(side, side)])


def plumes(count: int, steps: int, *, elsewhere: bool, imperfection: float, seed: int) -> Tensor:
    """States (simulations, steps, 3, side, side) with two inflows each, at random places and of random strengths.

    The places are in three of the quarters of the torus, or where `elsewhere` in the fourth, the lower right one.

    Raises:
        GMError: there is no simulation to make.
    """
    if count < 1 or steps < 1:
        raise GMError(f"at least one simulation of one step is needed, not {count} of {steps}")
    generator = Generator().manual_seed(seed)
    half = SIDE / 2
    within = half * torch.rand(count, 2, 2, generator=generator)
    quarter = torch.randint(0, 3, (count, 2), generator=generator)
    if elsewhere:
        quarter = torch.full_like(quarter, 3)
    places = within + half * torch.stack([quarter // 2, quarter % 2], 2)
    strengths = INFLOW * (0.7 + 0.6 * torch.rand(count, 2, generator=generator))
    buoyancy = upward(imperfection).expand(count, -1, -1, -1)
    return simulated(Setup(discs(places, strengths), buoyancy), steps)
