"""What is decided before the first step: how many steps fit into the time, and the learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice, pairwise
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..copies import training
from ..errors import GMError
from .recipe import BATCH_NORMS, LONGEST_WARMUP, trial_length
from .running import Progress, Run, seed_all

HELD = 8  # batches at most, and at most a quarter of the loader, on which the rates are judged
HELD_BYTES = 1 << 30  # of the batches that the trial keeps
GOOD = 0.5  # of the best fall of the loss may be missing after the few steps of a larger rate,
SETTLED = 0.07  # or as much of the loss: the many steps of a whole run win it back
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
    """Train with some rates for a few steps each and judge them by the loss on batches that were held out.

    All start from the same weights, see the same batches and follow the schedule of the whole run in miniature. The
    batches are taken from the loader once and kept (the first 8 of them, or a quarter of the loader, to judge on); in a
    loader with fewer than needed, or where they pass 1 GiB, they recur. A long run bears a larger rate than a short
    one, as it has the time to settle: the one chosen is the largest that still lowers the loss half as much as the best
    does, or ends with at most 7 % more of it. It is lowered from that at the start, with BatchNorm from that after as
    many steps at rate zero, in which its statistics alone move. From the middle of the ladder the rates climb as long
    as they are borne; where the first step up is not, they descend as long as the loss falls. Where batches recur in so
    short a trial, a whole run sees them so often that it learns them by heart, the more so at a large rate: there the
    one chosen is the best.

    Raises:
        GMError: the loss is finite at none of the rates.
    """
    start, length = time.perf_counter(), trial_length(steps, run.recipe)
    seed_all(run.recipe.seed, 0, 1)
    held, trained = _held_batches(run, length)
    moving = any(isinstance(each, BATCH_NORMS) for each in run.plain.modules())
    warmup, total = min(run.warmup(steps), LONGEST_WARMUP), (moving + len(run.rates)) * length
    found: dict[float, float] = {}
    slack = 1.0 if length + len(held) <= run.steps else 0.0
    with run.taken_back() as undo:

        def judged() -> float:
            run.annealing.set(1.0)
            loss = run.mean(run.loss_on(held, features=1.0) / len(held))
            undo()
            return loss if math.isfinite(loss) else math.inf

        def loss_after(rate: float, number: int) -> float:
            seed_all(run.recipe.seed, 0, 2)
            training(run.model)
            for at, batch in enumerate(islice(cycle(trained), length)):
                loss = run.step(batch, at=at, of=length, peak=rate, warmup=warmup)
                if progress is not None:
                    progress(-1, number * length + at + 1, total, loss)
            return judged()

        before = loss_after(0.0, 0) if moving else judged()
        for number, rate in enumerate(climb(run.rates, found, before, slack=slack), start=moving):
            found[rate] = loss_after(rate, number)
    best = chosen(found, before, slack=slack)
    if progress is not None and len(found) < len(run.rates):  # the rest is not tried
        progress(-1, total, total, found[best])
    if math.isinf(found[best]):
        tried = ", ".join(map(str, sorted(found)))
        raise GMError(f"the loss is not finite at any of the learning rates tried, {tried}; give a smaller lr")
    losses = {str(rate): None if math.isinf(found[rate]) else found[rate] for rate in sorted(found)}
    seconds = time.perf_counter() - start
    return {"lr": best, "losses": losses, "start": before, "steps": length, "seconds": seconds}


def chosen(losses: Mapping[float, float], start: float, *, slack: float = 1.0) -> float:
    """The largest rate that a long run bears; the best where none lowers the loss, and where there is no slack.

    >>> chosen({0.1: 7.0, 0.2: 5.0, 0.4: 6.0, 0.8: 8.0}, start=8.0)
    0.4
    """
    best = min(losses, key=lambda rate: (losses[rate], rate))
    return max([best, *(rate for rate in losses if _bearable(losses[rate], losses[best], start, slack))])


def _bearable(loss: float, best: float, start: float, slack: float) -> bool:
    gain = start - best if math.isfinite(start) else 0.0
    return best < start and math.isfinite(loss) and loss - best <= slack * max(GOOD * gain, SETTLED * best)


def climb(
    rates: Sequence[float],  # smallest first
    losses: Mapping[float, float],  # by rate, as far as they are known
    start: float,  # the loss at rate zero
    *,
    slack: float = 1.0,  # as in `chosen`
) -> Iterator[float]:
    """The rates to try; the caller puts the loss of each into `losses` before it asks for the next.

    >>> losses = {}
    >>> for rate in climb([1.0, 2.0, 3.0, 4.0, 5.0], losses, start=2.0):
    ...     losses[rate] = abs(rate - 2.2)
    >>> list(losses)
    [3.0, 4.0, 2.0, 1.0]
    """
    middle = len(rates) // 2
    yield rates[middle]
    for below, rate in pairwise(rates[middle:]):
        if not _bearable(losses[below], min(losses.values()), start, slack):
            break
        yield rate
    if chosen(losses, start, slack=slack) > rates[middle]:
        return
    for rate in rates[:middle][::-1]:
        best = min(losses.values())
        yield rate
        if not losses[rate] < best:
            return


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
        training(run.model)
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
