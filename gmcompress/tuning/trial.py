"""What is decided before the first step: how many steps fit into the time, and the learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import cycle, islice
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import GMError
from .recipe import LONGEST_WARMUP, trial_length
from .running import Progress, Run, seed_all

HELD = 8  # batches at most, and at most a quarter of the loader, on which the rates are judged
HELD_BYTES = 1 << 30  # of the batches that the trial keeps
CLEARLY = 1.5  # times the best loss: a rate as bad as this ends the climb
FIRST_TIMED = 2  # steps before it start workers and caches
TIMED_SHARE = 0.02  # of the minutes, spent on timing
TIMED_STEPS = 8  # at least, where the loader has them


def decide(run: Run, *, begun: float, progress: Progress | None) -> dict[str, Any]:
    """The number of steps, the peak of the learning rate, and the trial that found it, else None; all as JSON has it.

    Raises:
        GMError: the loss is finite at none of the rates.
    """
    recipe = run.recipe
    each = None if recipe.minutes is None else time_steps(run, recipe.minutes * 60)

    def fitting() -> int:
        if recipe.minutes is None or each is None:
            return recipe.epochs * run.steps
        return max(1, int(run.mean(begun + recipe.minutes * 60 - time.perf_counter()) / each))

    steps, trial = fitting(), None
    if recipe.lr is None and steps:
        trial = try_rates(run, steps, progress=progress)
        steps = fitting()  # the trial took some of the time
    return {"steps": steps, "lr": recipe.lr if trial is None else trial["lr"], "trial": trial}


def try_rates(run: Run, steps: int, *, progress: Progress | None) -> dict[str, Any]:
    """Train with each rate for a few steps and judge it by the loss on batches that were held out.

    All start from the same weights, see the same batches and follow the schedule of the whole run in miniature. The
    batches are taken from the loader once and kept (the first 8 of them, or a quarter of the loader, to judge on); in a
    loader with fewer than needed, or where they pass 1 GiB, they recur. The rates climb until one is clearly worse than
    the best, 1.5 times its loss; of equal ones the smaller is chosen.

    Raises:
        GMError: the loss is finite at none of the rates.
    """
    start, length = time.perf_counter(), trial_length(steps, run.recipe)
    seed_all(run.recipe.seed, 0, 1)
    held, trained = _held_batches(run, length)
    warmup = min(run.warmup(steps), LONGEST_WARMUP)
    found: dict[float, float] = {}
    with run.taken_back() as undo:
        for number, rate in enumerate(run.rates):
            seed_all(run.recipe.seed, 0, 2)
            run.model.train()
            for at, batch in enumerate(islice(cycle(trained), length)):
                loss = run.step(batch, at=at, of=length, peak=rate, warmup=warmup)
                if progress is not None:
                    progress(-1, number * length + at + 1, len(run.rates) * length, loss)
            run.annealing.set(1.0)
            judged = run.mean(run.loss_on(held) / len(held))
            found[rate] = judged if math.isfinite(judged) else math.inf
            undo()
            if found[rate] > CLEARLY * min(found.values()):
                break
    best = min(found, key=lambda rate: (found[rate], rate))
    if progress is not None and len(found) < len(run.rates):  # the rest is not tried
        progress(-1, len(run.rates) * length, len(run.rates) * length, found[best])
    if math.isinf(found[best]):
        tried = ", ".join(map(str, found))
        raise GMError(f"the loss is not finite at any of the learning rates tried, {tried}; give a smaller lr")
    losses = {str(rate): None if math.isinf(loss) else loss for rate, loss in found.items()}
    return {"lr": best, "losses": losses, "steps": length, "seconds": time.perf_counter() - start}


def _held_batches(run: Run, length: int) -> tuple[list[Any], list[Any]]:
    """Batches to judge on and others to train on, as far as there are others."""
    from accelerate.utils import send_to_device

    judged = max(1, min(HELD, run.steps // 4))
    kept: list[Any] = []
    size = 0
    for batch in islice(run.loader, judged + length):
        kept.append(send_to_device(batch, "cpu"))
        size += _bytes(batch)
        if size > HELD_BYTES and len(kept) > 1:
            break
    if not kept:
        raise GMError("the loader is empty: it gave no batch")
    judged = min(judged, max(1, len(kept) // 2))
    return kept[:judged], kept[judged:] or kept


def _bytes(batch: Any) -> int:
    return sum(each.nbytes for each in tree_leaves(batch) if isinstance(each, Tensor))


def time_steps(run: Run, budget: float) -> float:
    """Seconds per step, loading included, by the mean over real steps at the start of the warm-up, all taken back.

    At least 8 steps, and 2 % of the budget in seconds, but not more than one pass; the first 2 are not counted.
    """
    seed_all(run.recipe.seed, 0, 3)
    start = time.perf_counter()
    marks = [start]
    with run.taken_back():
        run.model.train()
        for at, batch in enumerate(run.loader):
            peak = run.recipe.lr or run.rates[0]
            run.step(batch, at=at, of=run.steps, peak=peak / 25, warmup=0.0)
            marks.append(time.perf_counter())
            enough = (
                run.mean(marks[-1] - start) >= TIMED_SHARE * budget
            )  # the same in all processes, which step together
            if at + 1 >= TIMED_STEPS and enough:
                break
    return run.mean(_mean_gap(marks))


def _mean_gap(marks: Iterable[float]) -> float:
    """The mean distance of these times, without the first two where there are more."""
    times = list(marks)
    counted = times[FIRST_TIMED:] if len(times) > FIRST_TIMED + 1 else times
    return max((counted[-1] - counted[0]) / max(len(counted) - 1, 1), 1e-6)
