"""The folder of a run: what is in it while the run lasts, what a failure takes back, and how a run goes on.

`args.yaml` comes first. `notes` holds what is known of the layers until the compressed network is written. A training
keeps in `start` the network that it starts from, and a checkpoint and a row of `summary.csv` for every epoch.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints import read_history
from ..errors import GMError
from ..files import usable
from .networks import is_main
from .settings import RECIPE, Settings, read_yaml, write_yaml

ARGS, BEFORE, SUMMARY = "args.yaml", "before.json", "summary.csv"
NOTES, START, MODEL = "notes", "start", "model"
REPORTS = ("report.json", "report.html")
PATHS = ("checkpoint", "compressed", "plan")  # kept as absolute paths, so that a run can be resumed from anywhere
MAY_CHANGE = ("data_dir", "workers")  # between a run and its continuation, at any time
WAIT = 0.5  # seconds between two looks at what another process writes


def absolute(settings: Settings) -> Settings:
    """The settings with absolute paths."""
    changes: dict[str, Any] = {name: getattr(settings, name) for name in PATHS}
    changes = {name: str(usable(value).resolve()) for name, value in changes.items() if value}
    if settings.images.data_dir:
        changes["images"] = replace(settings.images, data_dir=str(usable(settings.images.data_dir).resolve()))
    return replace(settings, **changes)


def resumed(given: Mapping[str, Any], folder: Path) -> Settings:
    """The settings that a run was begun with, and of those given now the ones that may change.

    The budget may until the network is compressed, the recipe of training until an epoch is complete.

    Raises:
        GMError: the folder holds no run, or another setting is given than it was begun with.
    """
    if not (folder / ARGS).is_file():
        raise GMError(f"{folder} holds no run to resume: it has no {ARGS}")
    old = Settings.read(read_yaml(folder / ARGS)).flat()
    new = absolute(Settings.read(given)).flat()
    may_change = {*MAY_CHANGE, *(["budget"] if (folder / NOTES).is_dir() else [])}
    may_change |= set() if read_history(folder) else set(RECIPE)
    for name in given:
        if name not in may_change and new[name] != old[name]:
            raise GMError(
                f"{folder} was begun with {name}={old[name]}, not {new[name]}; a resumed run keeps its settings, so "
                "leave this one out, or begin another run in another folder"
            )
    return Settings.read(old | {name: new[name] for name in given if name in may_change})


def check_new(folder: Path, *, besides: str = "") -> None:
    """Refuse a folder in which there is something else than what has this name.

    Raises:
        GMError: there is.
    """
    if folder.exists() and (not folder.is_dir() or any(each.name != besides for each in folder.iterdir())):
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


@contextmanager
def begun(folder: Path, settings: Settings | None, *, resume: bool) -> Iterator[None]:
    """A run in a folder, its settings there from the start, if given; where it fails, nothing useless stays behind.

    What a new run wrote is taken back when it ends with a GMError, unless another call can make use of it: of a
    complete epoch, or of work on the layers for a budget or a plan. Only the first process writes.
    """
    if not is_main():
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder)
    if settings is not None:
        write_yaml(folder / ARGS, settings)
    try:
        yield
    except GMError as problem:
        if not read_history(folder):
            if _holds_work(folder, settings):
                again = _going_on(folder, settings)
                raise GMError(f"{problem}; the work on the layers is kept in {folder}: {again}") from problem
            if not resume:
                _forget(folder, made)
        raise


def _going_on(folder: Path, settings: Settings | None) -> str:
    """How the work in a folder is gone on from."""
    if settings is None:
        return "the same call goes on from it, also with other budgets"
    other = "other settings of training" if (folder / START).is_dir() else "another budget"
    return f"--resume {folder} goes on from it, also with {other}"


def _holds_work(folder: Path, settings: Settings | None) -> bool:
    """Whether there is work on the layers that a call to come may go on from."""
    costly = settings is not None and settings.rank is None and settings.compressed is None
    return any((folder / NOTES).glob("*/*-*.json")) or (costly and (folder / START).is_dir())


def _forget(folder: Path, made: list[Path]) -> None:
    """Take back what a run wrote, and the folders made for it."""
    for name in (ARGS, BEFORE, SUMMARY, *REPORTS):
        (folder / name).unlink(missing_ok=True)
    for name in (NOTES, START, MODEL):
        shutil.rmtree(folder / name, ignore_errors=True)
    for each in made:
        if any(each.iterdir()):
            break
        each.rmdir()


def wait_for(path: Path) -> None:
    """Until the first process has written this; where it fails, the launcher ends all of them.

    By looking, since a barrier between processes would end long work at its time limit. On several machines the folder
    of the run must be the same for all.
    """
    while not path.exists():
        time.sleep(WAIT)
