"""The recipe: everything that a fine-tuning depends on besides model, teacher and data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attaching import structured
from ..errors import GMError, nearest_names, shown

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SGD_KIN = ("sgd", "nesterov", "momentum")
SGD_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
OTHER_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TRIAL_STEPS = 5, 40  # at least, at most, where the recipe does not say
TRIAL_SHARE = 0.05  # of all steps, between these two
LONGEST_WARMUP = 0.5  # of all steps
FEATURES = 300.0  # weight of the outputs of the blocks, where the recipe does not say


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; everything that the result depends on, besides model, teacher and data.

    The length is a number of `epochs`, or of `minutes`: after a few timed steps, taken back, the number of steps is
    chosen that fits into what the rest has left of them (recalibration, trial and timing count; `evaluate` and
    checkpoints come on top), at least 1, and the run ends with the last of them, in the middle of an epoch or not.
    With neither, BatchNorm statistics are re-estimated and nothing is trained.

    The loss is `distillation` × T² × KL(teacher ‖ student) at `temperature` T, plus `task` × cross-entropy with the
    labels, or the loss that the model has itself where it takes `labels` beside other inputs by name. T is found from
    the teacher's first answers where it is None: see `temperature_of`. Outputs that are no logits of classes have the
    relative squared error in place of both. To this comes `features` × the relative squared error of the outputs of
    `blocks`, meaned over these modules, a weight that falls in a line to zero over the run: what blocks put out says
    more of every example than the logits do, and brings a compressed network near its teacher sooner. Without names the
    blocks are found: the modules with structured layers directly inside the outermost nn.Sequential and nn.ModuleList,
    such as layer1.0 or blocks.0, whose outputs have the teacher's shapes. `features` None is FEATURES = 300 where there
    is a teacher with such blocks, else 0.

    `optimizer` is a name that timm knows; "auto" is AdamW, for networks with BatchNorm and without structured layers
    SGD with Nesterov momentum. The rate warms up over `warmup` epochs (at most half of the run) and follows a cosine to
    zero. Where `lr` is None, its peak is found by a trial of `trial_lrs` (by default 0.001, 0.003, 0.01, 0.03 and 0.1
    for SGD and its kin, 1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003 and 0.01 for others), of each for `trial_steps` steps: by
    default 5 % of all steps, between 5 and 40, and not more than the run has; they come on top of the epochs.

    `weight_decay` acts on matrices and kernels, not on biases and norms. With `decay="weight"` a structured layer is
    decayed as a dense one is, by its computed weight: with SGD and its kin by the gradient of weight_decay/2 × ‖W‖²,
    added every 4th step, 4 times as large; with others decoupled, the weight shrinking by 1 − rate × weight_decay at
    every step. With "factors" its stored tensors are decayed like any others. `anneal` is the share of the steps
    over which the part of the teacher's weights that the structures leave out fades away, by a cosine from 1 to 0; it
    reaches the layers whose forward is called, not what reads their weight.

    `recalibrate` re-estimates BatchNorm statistics on the training data first: "auto" keeps them if the distillation
    loss on these batches falls by it. `ema` is the decay of an exponential moving average of the weights, which then
    is the result. `amp` is "bf16", "fp16" or "no", None meaning bf16 on CUDA and no on the CPU.

    >>> Recipe(epochs=10, trial_lrs=(0.01, 0.1)).trial_lrs
    (0.01, 0.1)
    """

    epochs: int = 0
    minutes: float | None = None
    lr: float | None = None
    trial_lrs: tuple[float, ...] = ()
    trial_steps: int | None = None
    optimizer: str = "auto"
    weight_decay: float = 5e-4
    decay: str = "weight"
    momentum: float = 0.9
    warmup: float = 0.2
    temperature: float | None = None
    distillation: float = 0.9
    task: float = 0.1
    features: float | None = None
    blocks: tuple[str, ...] = ()
    anneal: float = 0.0
    recalibrate: bool | str = "auto"
    recalibration_batches: int = 40
    clip: float | None = 5.0
    ema: float | None = None
    amp: str | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("trial_lrs", "blocks"):
            object.__setattr__(self, key, _several(key, getattr(self, key)))
        for key in ("temperature", "recalibration_batches", "lr", "clip", "minutes", "trial_steps"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise GMError(f"{key} must be positive, not {value!r}")
        for key in ("epochs", "weight_decay", "momentum", "warmup", "distillation", "task", "features", "anneal"):
            value = getattr(self, key)
            if not (value is None and key == "features") and not value >= 0:
                raise GMError(f"{key} must be at least 0, not {value!r}")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 63):
            raise GMError(f"seed must be a whole number from 0 to 2^63 - 1, not {shown(self.seed)}")
        self._check_choices()
        if self.minutes is not None and self.epochs:
            raise GMError(f"a run lasts epochs or minutes, not both: {self.epochs!r} and {self.minutes!r} were given")
        if any(not (isinstance(rate, int | float) and 0 < rate < math.inf) for rate in self.trial_lrs):
            raise GMError(f"trial_lrs must be positive numbers, not {self.trial_lrs!r}")
        if self.blocks and self.features == 0:
            raise GMError(f"blocks {self.blocks!r} are compared only where features, the weight of it, is above 0")

    def _check_choices(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            raise GMError(f"ema is a decay between 0 and 1, not {self.ema!r}")
        if self.anneal > 1:
            raise GMError(f"anneal is a share of the steps, at most 1, not {self.anneal!r}")
        if self.decay not in ("weight", "factors"):
            raise GMError(f'decay is "weight" or "factors", not {self.decay!r}')
        if self.recalibrate not in (True, False, "auto"):
            raise GMError(f'recalibrate is True, False or "auto", not {self.recalibrate!r}')
        if self.amp not in (None, "no", "bf16", "fp16"):
            raise GMError(f'amp is "no", "bf16" or "fp16", not {self.amp!r}')
        if self.optimizer != "auto":
            from timm.optim import list_optimizers

            if self.optimizer not in (known := list_optimizers()):
                near = nearest_names(self.optimizer, known)
                raise GMError(f"timm knows no optimizer {self.optimizer!r}; the nearest are {near}")


def _several(key: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise GMError(f"{key} is a sequence, such as (a, b), not {value!r}")
    return tuple(value)


def optimizer_name(model: nn.Module, recipe: Recipe) -> str:
    """The optimizer, as timm calls it.

    >>> optimizer_name(nn.Linear(2, 2), Recipe())
    'adamw'
    """
    if recipe.optimizer != "auto":
        return recipe.optimizer
    plain = not structured(model) and any(isinstance(each, BATCH_NORMS) for each in model.modules())
    return "nesterov" if plain else "adamw"


def rates_to_try(optimizer: str, recipe: Recipe) -> tuple[float, ...]:
    """The learning rates of the trial, smallest first.

    >>> rates_to_try("adamw", Recipe())
    (1e-05, 3e-05, 0.0001, 0.0003, 0.001, 0.003, 0.01)
    """
    ladder = SGD_RATES if any(each in optimizer for each in SGD_KIN) else OTHER_RATES
    return tuple(sorted(set(recipe.trial_lrs or ladder)))


def trial_length(steps: int, recipe: Recipe) -> int:
    """Steps of the trial of one learning rate, for a run of so many.

    >>> [trial_length(steps, Recipe()) for steps in (3, 50, 400, 10_000)]
    [3, 5, 20, 40]
    """
    if recipe.trial_steps is not None:
        return recipe.trial_steps
    least, most = TRIAL_STEPS
    return min(steps, max(least, min(most, round(TRIAL_SHARE * steps))))


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    warmup: float,  # share of the steps
) -> float:
    """The rate of one step: from peak/25 up in a line over the warm-up, then peak/2 × (1 + cos(π step/steps)).

    >>> [round(learning_rate(step, steps=10, peak=1.0, warmup=0.2), 3) for step in (0, 1, 2, 5, 9)]
    [0.04, 0.52, 0.905, 0.5, 0.024]
    """
    rising = min(warmup, LONGEST_WARMUP) * steps
    if step < rising:
        return peak / 25 + step * (peak - peak / 25) / rising
    return peak / 2 * (1 + math.cos(math.pi * min(step / steps, 1.0)))  # a loader may give more than its length
