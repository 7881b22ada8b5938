"""Checkpoints of a training: tensors as safetensors, everything else as JSON, each complete or not there at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GMError, shown
from .files import file_digest, new_folder, read_json, read_tensors, sealed, unsealed, write_json, write_tensors

PATTERN = re.compile(r"checkpoint-([0-9]{4,9})")


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    history: list[dict[str, Any]],
    recipe: Mapping[str, Any],
    *,
    decided: Mapping[str, Any],
) -> None:
    """Write `folder/checkpoint-<epochs done>` and remove the ones before it.

    `state` holds modules, optimizers and gradient scalers by name; `decided` what was found out before the first step
    and must not be found out again, such as a learning rate.
    """
    place = folder / f"checkpoint-{len(history):04d}"
    numbers: dict[str, Any] = {"history": history, "recipe": dict(recipe), "decided": dict(decided)}
    digests: dict[str, str] = {}
    with new_folder(place) as beside:
        for name, part in state.items():
            tensors, numbers[name] = _taken_apart(part)
            write_tensors(beside / f"{name}.safetensors", tensors)
            digests[name] = file_digest(beside / f"{name}.safetensors")
        write_json(beside / "checkpoint.json", sealed(numbers | {"digests": digests}))
    unfinished = folder.glob(".checkpoint-*")  # of a run that was killed while it wrote
    for old in [*_checkpoints(folder), *unfinished]:
        if old != place:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, state: Mapping[str, Any], recipe: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Load the newest checkpoint into `state`; its history and what had been decided, both empty where there is none.

    Raises:
        GMError: the checkpoint is damaged, of another model, or was written with another recipe.
    """
    found = _checkpoints(folder)
    if not found:
        return [], {}
    place = found[-1]
    numbers = _numbers(place)
    for key in state:
        if key not in numbers:
            raise GMError(f"{place / 'checkpoint.json'} has no {key!r}, which this training needs")
    old, recipe = numbers["recipe"], json.loads(json.dumps(recipe))  # in which tuples are lists
    different = [key for key in {**recipe, **old} if recipe.get(key) != old.get(key)]
    if different:
        shown = ", ".join(f"{key}: {old.get(key)!r} there, {recipe.get(key)!r} here" for key in sorted(different))
        raise GMError(f"{place} was written with another recipe ({shown}); resume with the same one")
    for name, part in state.items():
        path = place / f"{name}.safetensors"
        if file_digest(path) != numbers["digests"].get(name):
            raise GMError(f"{path} was changed, truncated or replaced after it was written")
        tensors = read_tensors(path)
        try:
            _put_together(part, tensors, numbers[name])
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as problem:
            said = str(problem).strip().split("\n")[0]
            raise GMError(f"{place / name}.safetensors does not fit this training: {said}") from None
    return list(numbers["history"]), dict(numbers["decided"])


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of the epochs that a folder's newest checkpoint has behind it; none where there is no checkpoint.

    Raises:
        GMError: the checkpoint is damaged.
    """
    found = _checkpoints(folder)
    return _numbers(found[-1])["history"] if found else []


def _numbers(place: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, of the kinds that every checkpoint has."""
    path = place / "checkpoint.json"
    numbers = unsealed(read_json(path), path)
    for key, kind in (("history", list), ("recipe", dict), ("decided", dict), ("digests", dict)):
        if not isinstance(numbers.get(key), kind):
            raise GMError(f"{path}: {key!r} must be of type {kind.__name__}, not {shown(numbers.get(key))}")
    if not all(isinstance(row, dict) for row in numbers["history"]):
        raise GMError(f"{path}: 'history' must hold an object for each epoch")
    return numbers


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    numbered = [(int(match[1]), each) for each in folder.iterdir() if (match := PATTERN.fullmatch(each.name))]
    return [each for _, each in sorted(numbered)]


def _taken_apart(part: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a module or optimizer by name, and its numbers as JSON."""
    if isinstance(part, nn.Module):
        return {name: each.clone() for name, each in part.state_dict().items()}, None
    content = part.state_dict()
    if not isinstance(part, torch.optim.Optimizer):
        return {}, content
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in content["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.clone()
            else:
                numbers[f"{index}.{key}"] = value
    return tensors, json.loads(json.dumps({"numbers": numbers, "groups": content["param_groups"]}))


def _put_together(part: Any, tensors: dict[str, Tensor], numbers: Any) -> None:
    if isinstance(part, nn.Module):
        part.load_state_dict(tensors)
        return
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(numbers)
        return
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *numbers["numbers"].items()]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in numbers["groups"]
    ]
    part.load_state_dict({"state": state, "param_groups": groups})
