"""Training and judging for the benchmark of dynamics: simulations, AdamW on short forecasts, errors of longer ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from dynamics_models import SEEN, Forecaster
from smoke import plumes
from table_training import rate
from torch import Tensor, nn

from gmcompress import GMError

FIRST, SPLIT, LAST = 12, 36, 60  # steps from which, and up to which, there is learned; up to which there is judged
JUDGED = ("future", "domain")


class DivergenceError(GMError):
    """A loss is no longer a number: the rate was too large."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; everything that the result depends on, besides network, data and seed.

    A step of training forecasts `unrolled` states from `SEEN`, at random times of random simulations, and the loss is
    the mean square of the error in units of `Forecaster.change`. The rate rises over the share `warmup` of the steps
    and falls by a cosine to zero; the gradient is cut to a norm of `clip`.
    """

    steps: int = 300
    rates: tuple[float, ...] = (1e-2, 2e-2, 4e-2)  # to choose from
    trial: float = 0.2  # of the steps, to choose a rate
    batch_size: int = 8
    unrolled: int = 1
    weight_decay: float = 1e-4
    warmup: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Data:
    """States (simulations, steps, fields, side, side) by use, and in how far the symmetry is imperfect.

    `learned` run to LAST, of which networks learn from FIRST to SPLIT. *Future* is SPLIT to LAST of the same; *Domain*
    other simulations from FIRST to SPLIT, whose inflows are in a quarter of the torus where those learned from have
    none. `held_out` are simulations like those learned from, over the same steps, by which a rate is chosen.
    """

    learned: Tensor
    domain: Tensor
    held_out: Tensor
    imperfection: float

    @classmethod
    def made(cls, learned: int, judged: int, *, imperfection: float = 0.5) -> Data:
        """As many simulations to learn from, and of each kind to judge by; always the same ones."""
        return cls(
            plumes(learned, LAST, elsewhere=False, imperfection=imperfection, seed=0),
            plumes(judged, SPLIT, elsewhere=True, imperfection=imperfection, seed=1)[:, FIRST:],
            plumes(judged, SPLIT, elsewhere=False, imperfection=imperfection, seed=2)[:, FIRST:],
            imperfection,
        )

    @property
    def training(self) -> Tensor:
        """What is learned from."""
        return self.learned[:, FIRST:SPLIT]

    @property
    def future(self) -> Tensor:
        """What comes after it, with the last states seen in training to start from."""
        return self.learned[:, SPLIT - SEEN :]

    def to(self, device: torch.device) -> Data:
        """The same on another device."""
        return Data(*(each.to(device) for each in (self.learned, self.domain, self.held_out)), self.imperfection)


def windows(states: Tensor, length: int, every: int) -> Tensor:  # -> (windows, length, fields, side, side)
    """All stretches of this many steps, beginning every so many.

    >>> windows(torch.arange(7).reshape(1, 7, 1, 1, 1), 3, 2).flatten(1)
    tensor([[0, 1, 2],
            [2, 3, 4],
            [4, 5, 6]])
    """
    if states.shape[1] < length:
        raise GMError(f"{states.shape[1]} steps are too few for forecasts over {length - SEEN}")
    return states.unfold(1, length, every).movedim(-1, 2).flatten(0, 1)


def train(
    model: Forecaster,
    states: Tensor,
    recipe: Recipe,
    lr: float,
    *,
    seed: int,
    steps: int,
    progress: Callable[[int, float], Any] = lambda _step, _loss: None,
) -> tuple[float, float]:
    """Trains where it lies; returns the mean loss of the last tenth of the steps, and the seconds.

    Raises:
        DivergenceError: the loss is no longer a number.
    """
    begun, found = time.perf_counter(), []
    every = windows(states, SEEN + recipe.unrolled, 1)
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: rate(done, steps, recipe.warmup))
    for done in range(steps):
        chosen = every[torch.randint(len(every), (recipe.batch_size,), generator=draw).to(every.device)]
        error = (model(chosen[:, :SEEN], recipe.unrolled) - chosen[:, SEEN:]) / model.change
        loss = error.square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        schedule.step()
        if done % 20 == 0:
            progress(done, float(loss.detach()))
        if done >= steps - max(1, steps // 10):
            found.append(float(loss.detach()))
    mean = sum(found) / len(found)
    if not math.isfinite(mean):
        raise DivergenceError(f"the loss is no number after {steps} steps; take smaller rates than {lr}")
    return mean, time.perf_counter() - begun


@torch.no_grad()
def errors(
    forecast: Callable[[Tensor, int], Tensor],
    states: Tensor,  # (simulations, steps, fields, side, side)
    horizon: int,
) -> dict[str, float]:
    """Root mean square errors of forecasts over as many steps, all steps of all windows together, by field.

    The velocity's are of its components, in cells per step.
    """
    every = windows(states, SEEN + horizon, 4)
    apart = [forecast(part[:, :SEEN], horizon) - part[:, SEEN:] for part in every.split(32)]
    square = torch.cat(apart).double().square()
    return {"density": float(square[:, :, 0].mean().sqrt()), "velocity": float(square[:, :, 1:].mean().sqrt())}


def unchanged(history: Tensor, steps: int) -> Tensor:
    """The forecast that nothing changes, beside which the others are to be read."""
    return history[:, -1:].expand(-1, steps, -1, -1, -1)


def judged(forecast: Callable[[Tensor, int], Tensor], data: Data, horizon: int) -> dict[str, dict[str, float]]:
    """The errors of *Future* and *Domain*."""
    return {name: errors(forecast, getattr(data, name), horizon) for name in JUDGED}
