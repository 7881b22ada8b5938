"""fine_tune(): from a model, a loader and a recipe to a better model, with checkpoints on the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import load_checkpoint, save_checkpoint
from ..copies import duplicate
from ..errors import GMError
from ..files import usable
from ..streams import own_random_numbers
from ..surgery import check_model
from .factors import balance_
from .recipe import Recipe
from .running import Progress, Run, seed_all
from .trial import decide

Evaluate = Callable[[nn.Module], Mapping[str, float]]
EachEpoch = Callable[[dict[str, Any]], None]  # the row of history of an epoch


@own_random_numbers()
@torch.inference_mode(False)  # a caller may have turned gradients off
def fine_tune(
    model: nn.Module,
    loader: Iterable[Any],
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    each_epoch: EachEpoch | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A fine-tuned copy of the model, in evaluation mode, and one row of history per epoch.

    A batch is (inputs, labels), inputs alone, or a mapping with or without "labels"; inputs beside labels may be
    several tensors, or a mapping, and several that the model needs may stand there without brackets. Outputs are
    logits where the model calls them so, where labels are integers, or else where a classifier is the last layer to
    run. Without labels the loss is distillation alone, without a teacher it is the task alone. Every epoch draws
    its random numbers from (seed, epoch), so that with a `folder` of checkpoints, written after each epoch,
    `resume=True` with the same model and teacher goes on exactly where the last complete epoch ended.
    `evaluate(model)` returns further columns of the history, such as an accuracy. Where the learning rate was
    tried, the first row has a column `trial`: JSON with the rate chosen, the loss of each (null where it was not
    finite), the steps of each and the seconds of all. `progress(epoch, step, steps, loss)` is called after every
    step, in the trial with -1 as the epoch, and `each_epoch(row)` with the row of history of every epoch as soon as
    its checkpoint is written. Runs through accelerate: on the CPU, one GPU, or several when launched by `accelerate
    launch`, where each process calls both; there parameters may lack a gradient in later batches only if some do in
    the first one.

    Raises:
        GMError: an empty loader, a teacher with other outputs, neither teacher nor labels, a loss that is not finite,
            blocks or layers without their like in the teacher, or a checkpoint of another model or recipe.

    >>> tuned, history = fine_tune(nn.Linear(2, 2), [torch.ones(4, 2)], Recipe(epochs=1), teacher=nn.Linear(2, 2))
    >>> list(history[0])
    ['epoch', 'loss', 'lr', 'seconds', 'trial']
    """
    begun = time.perf_counter()
    check_model(model)
    student = duplicate(model, {})
    balance_(student)
    run = Run(student, teacher, loader, recipe)
    folder = None if folder is None else usable(folder)
    history: list[dict[str, Any]] = []
    decided: dict[str, Any] = {}
    if resume:
        if folder is None:
            raise GMError("resume=True needs the folder of the checkpoints")
        history, decided = load_checkpoint(folder, run.state(), asdict(recipe))
    if history:
        run.recipe = replace(recipe, temperature=decided["temperature"])
    else:
        decided = _begin(run, begun, progress)
    for epoch in range(len(history), math.ceil(decided["steps"] / run.steps)):
        seed_all(recipe.seed, epoch + 1)
        row = run.epoch(epoch, steps=decided["steps"], peak=decided["lr"], progress=progress)
        if epoch == 0 and decided["trial"] is not None:
            row["trial"] = json.dumps(decided["trial"])
        if evaluate is not None:
            row.update(evaluate(run.result()))
        history.append(row)
        if folder is not None and run.accelerator.is_main_process:
            save_checkpoint(folder, run.state(), history, asdict(recipe), decided=decided)
        if each_epoch is not None:
            each_epoch(dict(row))
        run.accelerator.wait_for_everyone()
    return run.finish(), history


def _begin(run: Run, begun: float, progress: Progress | None) -> dict[str, Any]:
    """Recalibrate, and decide what has to be known before the first step."""
    seed_all(run.recipe.seed, 0, 4)
    run.recipe = replace(run.recipe, temperature=run.temperature())
    seed_all(run.recipe.seed, 0)
    run.annealing.set(0.0)
    run.recalibrate()
    return decide(run, begun=begun, progress=progress) | {"temperature": run.recipe.temperature}
