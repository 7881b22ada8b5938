"""Doctor: from the name of a network to what can be done with it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..doctor import Examination, examine
from ..errors import GMError, nearest_names
from ..forward import Inputs
from .networks import Progress, build, example_inputs, find_device, silent
from .settings import Settings

SCHEMES = ("timm", "hf_hub", "hf-hub", "local_dir", "local-dir")  # what timm itself writes before a colon


def doctor_run(settings: Mapping[str, Any], *, progress: Progress = silent) -> Examination:
    """Examine the network named by `model`: one of timm's, or package.module:function, which builds an nn.Module.

    Without `pretrained` or `checkpoint` the weights of timm's networks are random, and their inputs are those that
    they are made for. A function may return the module alone, or with inputs for it: (module, inputs).

    Raises:
        GMError: there is no such network, it cannot be built, or it cannot be examined.

    >>> doctor_run({"model": "test_vit", "group": "C8"}).works
    True
    """
    chosen = Settings.read(settings)
    name, device = chosen.model, find_device(chosen.device)
    progress("examining", 0, 1, name)
    place, colon, _ = name.rpartition(":")
    if colon and place.split(":")[0] not in SCHEMES:
        if chosen.pretrained or chosen.checkpoint or chosen.num_classes or chosen.in_chans or chosen.model_kwargs:
            raise GMError(f"{name} is built by its own function and comes with its weights; give no options of timm's")
        model, inputs = _built_by(name)
    else:
        model = build(chosen, trained=chosen.pretrained or bool(chosen.checkpoint)).to(device)
        inputs = example_inputs(chosen.images, model)
    found = examine(model, inputs, chosen.group)
    progress("examining", 1, 1, name)
    return found


def _built_by(name: str) -> tuple[nn.Module, Inputs | None]:
    """What the function package.module:function gives; modules are looked for in the working folder too.

    Raises:
        GMError: nothing else is imported where that module is missing; no such function; it fails, or gives no module.
    """
    place, _, function = name.rpartition(":")
    if not all(each.isidentifier() for each in (*place.split("."), function)):
        raise GMError(f"a network is the name of a timm model, or package.module:function, not {name!r}")
    with _working_folder():
        try:
            module = importlib.import_module(place)
        except Exception as problem:  # an import runs whatever the module holds
            raise GMError(f"cannot import {place}: {type(problem).__name__}: {problem}") from problem
        if function not in vars(module):
            public = [each for each in vars(module) if callable(vars(module)[each])]
            raise GMError(f"{place} has no {function!r}; the nearest are {nearest_names(function, public)}")
        make = vars(module)[function]
        if not callable(make):
            raise GMError(f"{function!r} of {place} is no function but {type(make).__name__}")
        try:
            made = make()
        except Exception as problem:
            raise GMError(f"{name}() fails: {type(problem).__name__}: {problem}") from problem
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise GMError(f"{name} gave {type(model).__name__}; it has to return a torch.nn.Module, or one and its inputs")
    return model, inputs


@contextmanager
def _working_folder() -> Iterator[None]:
    """The working folder among those that modules are imported from, as where Python itself is started there."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
