"""Compress and train: from settings to a folder with the model, its report and everything that led there."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..data import make_loader, make_loaders
from ..errors import GMError
from ..files import read_json, write_json, write_text
from ..layers import GMLayer
from ..pipeline import compress, equivariance, tuned_result
from ..projection import relative_error
from ..reporting import Report, Result
from ..storage import describe_folder, load, save
from ..structure import distance
from ..surgery import get_modules
from ..tuning import fine_tune
from .networks import (
    Progress,
    accuracy,
    build,
    compressed_folder,
    example_inputs,
    find_device,
    is_main,
    model_options,
    silent,
    with_inherited,
)
from .settings import Settings, read_yaml, setting_defaults, write_yaml

ARGS, BEFORE, SUMMARY, MODEL = "args.yaml", "before.json", "summary.csv", "model"
REPORTS = ("report.json", "report.html")
PATHS = ("checkpoint", "compressed")  # kept as absolute paths, so that a run can be resumed from anywhere
MAY_CHANGE = ("data_dir", "workers")  # between a run and its continuation; all else belongs to the recipe


def compress_run(settings: Mapping[str, Any], folder: str | Path, *, progress: Progress = silent) -> Report:
    """Compress a trained network without training; the folder gets args.yaml, model/, report.json and report.html.

    With images (data_dir or dataset), the accuracy before and after is measured.

    Raises:
        GMError: the folder holds something already, or a setting, weights or images cannot be used; nothing is written.
    """
    chosen, place = _absolute(Settings.read(settings)), Path(folder)
    _check_new(place)
    dense = build(chosen).to(find_device(chosen.device))
    has_images = bool(chosen.images.data_dir or chosen.images.dataset)
    loader = make_loader(chosen.images, dense) if has_images else None
    result = _compressed(chosen, dense, progress)
    measured = {} if loader is None else _both(result, loader, progress)
    report = replace(result.report, accuracy=measured, settings=shown_settings("compress", chosen))
    make_folder(place)
    write_yaml(place / ARGS, chosen)
    write_results(replace(result, report=report), place, chosen)
    return report


def train_run(
    settings: Mapping[str, Any], folder: str | Path, *, resume: bool = False, progress: Progress = silent
) -> Report:
    """Compress a trained network, fine-tune it with the dense one as its teacher, and report.

    The folder gets args.yaml at once, before.json (accuracies before the training), a checkpoint and a row of
    summary.csv after every epoch, and at the end model/, report.json and report.html. `resume` goes on from the last
    complete epoch of that folder, with its settings, to the same result as without interruption; of `settings` only
    `data_dir` and `workers` may then differ (another number of workers draws other augmentations).

    Raises:
        GMError: the folder holds something already, or nothing to resume; settings, weights or images cannot be used;
            the training diverges.
    """
    place = Path(folder)
    chosen = _resumed(settings, place) if resume else _absolute(Settings.read(with_inherited(dict(settings))))
    if not resume and is_main():
        _check_new(place)
    recipe = chosen.recipe()
    dense = build(chosen).to(find_device(chosen.device))
    training, validation = make_loaders(chosen.images, dense)
    result = _compressed(chosen, dense, progress)
    if is_main():
        make_folder(place)
        write_yaml(place / ARGS, chosen)
    try:
        measured = _measured_before(result, validation, place, progress)
        tuned, history = fine_tune(
            result.model,
            training,
            recipe,
            teacher=result.teacher,
            evaluate=lambda model: _columns(model, validation, progress),
            folder=place,
            resume=resume,
            progress=_Follower(place, recipe.epochs, progress),
        )
    except GMError:
        _forget_start(place)
        raise
    last = history[-1]["top1"] if history else accuracy(tuned, validation, progress=progress).top1
    final = with_ranks(tuned_result(result, tuned, history), progress)
    report = replace(final.report, accuracy=measured | {"tuned": last}, settings=shown_settings("train", chosen))
    if is_main():
        write_summary(place / SUMMARY, history)
        write_results(replace(final, report=report), place, chosen)
    return report


def shown_settings(command: str, settings: Settings) -> dict[str, Any]:
    """What a report says about its making: the command, the settings that are not the defaults, the versions."""
    defaults = setting_defaults()
    chosen = {name: value for name, value in settings.flat().items() if value != defaults[name]}
    versions = {name: version(name) for name in ("gmcompress", "torch", "timm")}
    return {"command": command, "seed": settings.seed, **chosen, **versions}


def with_ranks(result: Result, progress: Progress) -> Result:
    """The result, both displacement ranks of every compressed layer in its report."""
    progress("measuring displacement ranks", 0, 1, "")
    names = ("displacement_rank", "generator_displacement_rank")
    found = {each["layer"]: {name: each[name] for name in names} for each in equivariance(result)}
    rows = tuple(dict(row) | found[row["layer"]] for row in result.report.layers)
    progress("measuring displacement ranks", 1, 1, "")
    return replace(result, report=replace(result.report, layers=rows))


def write_results(result: Result, folder: Path, settings: Settings) -> None:
    """The model, from whose folder `load` rebuilds it, and the report as JSON and HTML."""
    named = settings.model and ":" not in settings.model  # other sources than timm's registry have to be built again
    source = f"timm:{settings.model}" if named else None
    save(result, folder / MODEL, source=source, source_options=model_options(settings) if named else None)
    for name in REPORTS:
        result.report.save(folder / name)


def write_summary(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One row per epoch as CSV, the file replaced as a whole."""
    if history:
        page = io.StringIO()
        writer = csv.DictWriter(page, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(path, page.getvalue())


class _Follower:
    """What fine_tune calls after every step: it keeps summary.csv up to the last complete epoch, and tells progress.

    `epochs` is 0 where minutes were given and the end is not known.
    """

    def __init__(self, folder: Path, epochs: int, progress: Progress) -> None:
        self.folder, self.epochs, self.progress = folder, epochs, progress
        self.total, self.first, self.begun = 0.0, -1, 0.0

    def __call__(self, epoch: int, step: int, steps: int, loss: float) -> None:
        if epoch < 0:
            self.progress("trying learning rates", step, steps, f"loss {loss:.3f}")
            return
        if step == 1:
            self.total = 0.0
            if is_main():
                write_summary(self.folder / SUMMARY, read_history(self.folder))
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


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of the epochs that a folder's newest checkpoint has behind it."""
    found = sorted(folder.glob("checkpoint-*/checkpoint.json"))
    return read_json(found[-1])["history"] if found else []


def _columns(model: nn.Module, loader: DataLoader, progress: Progress) -> dict[str, float]:
    found = accuracy(model, loader, progress=progress)
    return {"top1": found.top1, "top5": found.top5}


def _compressed(settings: Settings, dense: nn.Module, progress: Progress) -> Result:
    """The dense network compressed as asked for, or as it stands in a folder."""
    inputs = example_inputs(settings.images, dense)

    def told(layer: str, done: int, of: int) -> None:
        progress("compressing", done + 1, of, layer)

    if settings.compressed is None:
        return compress(dense, inputs=inputs, progress=told, **settings.compression())
    folder = compressed_folder(settings.compressed)
    plan = describe_folder(folder)["plan"]
    if plan is None:
        raise GMError(f"{folder} was saved without its plan: save the Result of compress, not only its model")
    small = load(folder, dense)
    result = compress(dense, plan=plan, inputs=inputs, progress=told)
    rows = []
    for row in result.report.layers:
        old = get_modules(dense, [row["layer"]])[row["layer"]].get_parameter("weight").detach()
        layer = get_modules(small, [row["layer"]])[row["layer"]]
        assert isinstance(layer, GMLayer)
        weight = layer.weight.detach()
        away = None if layer.structure.group is None else distance(weight, layer.structure, relative=True)
        rows.append(dict(row) | {"relative_error": relative_error(weight, old), "distance_compressed": away})
    return replace(result, model=small, report=replace(result.report, layers=tuple(rows)))


def _both(result: Result, loader: DataLoader, progress: Progress) -> dict[str, float]:
    """Top-1 accuracy of the dense and of the compressed network, before any training."""
    assert result.teacher is not None
    models = {"dense": result.teacher, "compressed": result.model}
    return {
        name: accuracy(model, loader, progress=progress, what=f"validating the {name} network").top1
        for name, model in models.items()
    }


def _measured_before(result: Result, loader: DataLoader, folder: Path, progress: Progress) -> dict[str, float]:
    """The accuracies before the training, measured once and kept for when the run is resumed."""
    path = folder / BEFORE
    if path.is_file():
        return read_json(path)["accuracy"]
    found = _both(result, loader, progress)
    if is_main():
        write_json(path, {"accuracy": found})
    return found


def _absolute(settings: Settings) -> Settings:
    changes: dict[str, Any] = {name: getattr(settings, name) for name in PATHS}
    changes = {name: str(Path(value).resolve()) for name, value in changes.items() if value}
    if settings.images.data_dir:
        changes["images"] = replace(settings.images, data_dir=str(Path(settings.images.data_dir).resolve()))
    return replace(settings, **changes)


def _resumed(given: Mapping[str, Any], folder: Path) -> Settings:
    """The settings that a run was begun with, and of those given now the few that may change."""
    if not (folder / ARGS).is_file():
        raise GMError(f"{folder} holds no run to resume: it has no {ARGS}")
    old = Settings.read(read_yaml(folder / ARGS)).flat()
    new = _absolute(Settings.read(given)).flat()
    for name in given:
        if name not in MAY_CHANGE and new[name] != old[name]:
            raise GMError(
                f"{folder} was begun with {name}={old[name]}, not {new[name]}; a resumed run keeps its settings, so "
                "leave this one out, or begin another run in another folder"
            )
    return Settings.read(old | {name: new[name] for name in MAY_CHANGE if name in given})


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GMError(f"{folder} exists and is not empty; give another output, or resume the run that it holds")


def make_folder(folder: Path) -> None:
    """Make a folder, unless it is there.

    Raises:
        GMError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise GMError(f"cannot create {folder}: {problem.strerror}") from None


def _forget_start(folder: Path) -> None:
    """Take back what a run wrote that failed in its first epoch."""
    if is_main() and not read_history(folder):
        for name in (ARGS, BEFORE):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
