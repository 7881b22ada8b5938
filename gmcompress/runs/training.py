"""Train: from settings to a folder with the tuned model, its report and everything that led there."""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..checkpoints import read_history
from ..data import make_loaders
from ..files import new_folder, read_json, usable, write_json, write_text
from ..pipeline import equivariance, tuned_result
from ..reporting import Report, Result
from ..storage import load
from ..tuning import fine_tune
from .compressing import both_accuracies, compressed, read_report, shown_settings, write_model, write_reports
from .folders import (
    ARGS,
    BEFORE,
    MODEL,
    NOTES,
    REPORTS,
    START,
    SUMMARY,
    absolute,
    begun,
    check_new,
    resumed,
    wait_for,
)
from .networks import Progress, accuracy, build, example_inputs, find_device, is_main, silent, with_inherited
from .settings import Settings, write_yaml


def train_run(
    settings: Mapping[str, Any], folder: str | Path, *, resume: bool = False, progress: Progress = silent
) -> Report:
    """Compress a trained network, fine-tune it with the dense one as its teacher, and report.

    The folder gets args.yaml at once, what is done on the layers while they are compressed (`compress_run`), start/
    with the network that the training starts from, before.json (accuracies before the training), a checkpoint and a
    row of summary.csv after every epoch, and at the end model/, report.json and report.html. `resume` goes on from the
    last complete epoch of that folder, or else from what is done on the layers, with its settings, to the same result
    as without interruption; of `settings` only `data_dir` and `workers` may then differ (another number of workers
    draws other augmentations), before the first complete epoch also those of training. Of several processes the first
    one compresses, and all start from what it wrote; the folder must be the same for all of them.

    Raises:
        GMError: the folder holds something already, or nothing to resume; settings, weights or images cannot be used;
            the training diverges. Where it does so in a new folder, nothing stays but what `resume` can go on from.
    """
    place = usable(folder)
    chosen = resumed(settings, place) if resume else absolute(Settings.read(with_inherited(dict(settings))))
    if not resume and is_main():
        check_new(place)
    recipe = chosen.recipe()
    dense = build(chosen).to(find_device(chosen.device))
    training, validation = make_loaders(chosen.images, dense)
    with begun(place, chosen, resume=resume):
        result = _started(chosen, dense, place, progress)
        measured = _measured_before(result, validation, place, progress)
        tuned, history = fine_tune(
            result.model,
            training,
            recipe,
            teacher=result.teacher,
            evaluate=lambda model: _columns(model, validation, progress),
            folder=place,
            resume=resume,
            progress=_Follower(recipe.epochs, progress),
            each_epoch=_summary(place, resume=resume),
        )
    last = history[-1]["top1"] if history else accuracy(tuned, validation, progress=progress).top1
    final = with_ranks(tuned_result(result, tuned, history), progress)
    about = {**shown_settings("train", chosen), **result.report.settings}
    report = replace(final.report, accuracy=measured | {"tuned": last}, settings=about)
    if is_main():
        write_summary(place / SUMMARY, history)
        write_model(replace(final, report=report), place, chosen)
        write_reports(report, place)
    return report


def _started(settings: Settings, dense: nn.Module, place: Path, progress: Progress) -> Result:
    """The network that a training starts from: made by the first process, then read, by all and when resumed."""
    start = place / START
    if not is_main():
        wait_for(start)
    if not start.is_dir():
        result = compressed(settings, dense, place / NOTES, progress)
        with new_folder(start) as beside:
            write_model(result, beside, settings)
            result.report.save(beside / REPORTS[0])
            write_yaml(beside / ARGS, settings)
    if is_main():
        shutil.rmtree(place / NOTES, ignore_errors=True)
    report = read_report(start)
    inputs = example_inputs(settings.images, dense)
    return Result(load(start / MODEL, dense), report.plan, report, teacher=dense, inputs=inputs)


def with_ranks(result: Result, progress: Progress) -> Result:
    """The result, both displacement ranks of every compressed layer in its report."""
    progress("measuring displacement ranks", 0, 1, "")
    names = ("displacement_rank", "generator_displacement_rank")
    found = {each["layer"]: {name: each[name] for name in names} for each in equivariance(result)}
    rows = tuple(dict(row) | found[row["layer"]] for row in result.report.layers)
    progress("measuring displacement ranks", 1, 1, "")
    return replace(result, report=replace(result.report, layers=rows))


def write_summary(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One row per epoch as CSV, the file replaced as a whole."""
    if history:
        page = io.StringIO()
        writer = csv.DictWriter(page, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(path, page.getvalue())


def _summary(folder: Path, *, resume: bool) -> Callable[[Mapping[str, Any]], None]:
    """What fine_tune calls after every epoch: it keeps summary.csv, with the epochs before a resumption."""
    rows: list[Mapping[str, Any]] = [*read_history(folder)] if resume else []

    def add(row: Mapping[str, Any]) -> None:
        rows.append(row)
        if is_main():
            write_summary(folder / SUMMARY, rows)

    return add


class _Follower:
    """What fine_tune calls after every step, to tell progress; `epochs` is 0 where minutes were given instead."""

    def __init__(self, epochs: int, progress: Progress) -> None:
        self.epochs, self.progress = epochs, progress
        self.total, self.first, self.begun = 0.0, -1, 0.0

    def __call__(self, epoch: int, step: int, steps: int, loss: float) -> None:
        if epoch < 0:
            self.progress("trying learning rates", step, steps, f"loss {loss:.3f}")
            return
        if step == 1:
            self.total = 0.0
        if self.first < 0:
            self.first, self.begun = epoch, time.monotonic()
        self.total += loss
        note = f"loss {self.total / step:.3f}" + self._left((epoch - self.first) * steps + step - 1, steps)
        of = f" of {self.epochs}" if self.epochs else ""
        self.progress(f"epoch {epoch + 1}{of}", step, steps, note)

    def _left(self, done: int, steps: int) -> str:
        """How long the epochs to come will take, judged by those since the start or resumption."""
        left = (self.epochs - self.first) * steps - 1 - done
        if not (self.epochs and done and left):
            return ""
        seconds = round((time.monotonic() - self.begun) / done * left)
        return f", {timedelta(seconds=seconds)} left in all"


def _columns(model: nn.Module, loader: DataLoader, progress: Progress) -> dict[str, float]:
    found = accuracy(model, loader, progress=progress)
    return {"top1": found.top1, "top5": found.top5}


def _measured_before(result: Result, loader: DataLoader, folder: Path, progress: Progress) -> dict[str, float]:
    """The accuracies before the training, measured once and kept for when the run is resumed."""
    path = folder / BEFORE
    if path.is_file():
        return read_json(path)["accuracy"]
    found = both_accuracies(result, loader, progress)
    if is_main():
        write_json(path, {"accuracy": found})
    return found
