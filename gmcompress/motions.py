"""Rotations and dilations of images about their middle, and of signals on SE(2), for the equivariance error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import GMError, shown
from .liegrids import FACTORS, FULL

ANGLES = tuple(FULL * each / 24 for each in range(1, 24))
RATIOS = (2**-0.5, 2**-0.25, 2**0.25, 2**0.5)

Motion = tuple[float, float]  # angle, ratio


def move(
    images: Tensor,  # (batch, channels, height, width)
    angle: float = 0.0,
    ratio: float = 1.0,
) -> Tensor:  # of the same shape
    """The images turned counterclockwise by an angle in radians and enlarged by a ratio: (g·f)(x) = f(g⁻¹x).

    By cubic splines in float64, on the CPU and without gradients; exact for quarter turns of squares. What comes from
    outside is zero.

    >>> image = torch.arange(9.0).reshape(1, 1, 3, 3)
    >>> bool((move(image, math.pi / 2) - image.rot90(1, [2, 3])).abs().max() < 1e-5)
    True
    """
    from scipy.ndimage import affine_transform

    cosine, sine = math.cos(angle) / ratio, math.sin(angle) / ratio
    inverse = np.array([[cosine, sine], [-sine, cosine]])  # on (row, column), rows downwards
    middle = (np.array(images.shape[-2:]) - 1) / 2
    flat = images.detach().double().cpu().flatten(0, 1).numpy()
    offset = middle - inverse @ middle
    found = [affine_transform(each, inverse, offset, order=3, mode="grid-constant") for each in flat]
    return torch.from_numpy(np.reshape(found, images.shape)).to(images)


def disc(images: Tensor, ratio: float = 1.0) -> Tensor:  # (height, width)
    """1 on the pixels of an image that a motion of this ratio fills from inside the largest disc in it, 0 elsewhere."""
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(each, device=images.device) - (each - 1) / 2 for each in (height, width))
    reach = (min(height, width) / 2 - 1.5) * min(1.0, ratio)  # at the border splines know less
    return (torch.hypot(rows[:, None], columns) <= reach).to(images.dtype)


def motions(group: str, elements: Iterable[Any] | None = None) -> list[tuple[Any, Motion]]:
    """Elements of H, by default a choice of them, each with its angle and its ratio.

    An element is an angle in radians on SE(2), a ratio on R^2:R+, and a pair (angle, ratio) on Sim(2).

    Raises:
        GMError: there is no element, or one is no such number.
    """
    turns, scales = ("rotations" in FACTORS[group], "scales" in FACTORS[group])
    if elements is None:
        usual: Sequence[Any] = ANGLES if turns else RATIOS
        elements = usual if not (turns and scales) else [(angle, ratio) for angle in ANGLES[2::3] for ratio in RATIOS]
    found = []
    for each in elements:
        pair = tuple(each) if turns and scales and isinstance(each, tuple | list) else (each,)
        if not turns:
            pair = (0.0, *pair)
        elif not scales:
            pair = (*pair, 1.0)
        numbers = all(isinstance(number, int | float) and math.isfinite(number) for number in pair)
        if len(pair) != 2 or not numbers or pair[1] <= 0:
            wanted = {"SE(2)": "angles in radians", "R^2:R+": "ratios above 0", "Sim(2)": "pairs (angle, ratio)"}[group]
            raise GMError(f"elements on {group} are {wanted}, not {shown(each)}")
        found.append((each, (float(pair[0]), float(pair[1]))))
    if not found:
        raise GMError(f"elements of {group} to try are needed, but there are none")
    return found


def move_signal(group: str, signal: Tensor, motion: Motion) -> Tensor:
    """The action on images (batch, channels, height, width), or on signals (batch, channels, samples, height, width).

    Raises:
        GMError: a signal on another group than SE(2), or an angle that is no multiple of its step.
    """
    angle, ratio = motion
    if signal.dim() == 4:
        return move(signal, angle, ratio)
    if group != "SE(2)":
        raise GMError(f"outputs on samples of {group} cannot be moved, as some leave the grid; pool them with LiePool")
    samples = signal.shape[2]
    steps = angle * samples / FULL
    if abs(steps - round(steps)) > 1e-6:
        raise GMError(f"outputs on {samples} rotations move by multiples of 2π/{samples}, not by {angle:g}; pool them")
    return move(signal.flatten(1, 2), angle).reshape(signal.shape).roll(round(steps), 2)
