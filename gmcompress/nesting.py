"""Nested inputs by name, the tensors and the settings in them, and back; objects in outputs laid open."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import GMError, shown
from .files import is_storable

ROOT = "input"
STEP = re.compile(r"([.,:])([^.,:]*)")  # a place in a list, in a tuple, a key of a mapping
SETTINGS = (bool, int, float, str, type(None))


def laid_open(outputs: Any, *, depth: int = 4) -> Any:
    """Nested outputs with the objects in them, such as dataclasses, as mappings of what they hold.

    >>> from types import SimpleNamespace
    >>> laid_open([1, SimpleNamespace(x=2.0)])
    [1, {'x': 2.0}]
    """

    def opened(each: Any) -> Any:
        closed = isinstance(each, Tensor | nn.Module) or callable(each) or not hasattr(each, "__dict__")
        return each if closed or not depth else {k: laid_open(v, depth=depth - 1) for k, v in vars(each).items()}

    return tree_map(opened, outputs)


def by_name(inputs: Any, *, name: str = ROOT) -> dict[str, Any]:
    """The leaves of nested lists, tuples and mappings by name: tensors, plain settings, and what holds nothing.

    Raises:
        GMError: there is something else in it, or a key that is no text.

    >>> by_name({"x": 1, "pair": (2.0, [None])})
    {'input:x': 1, 'input:pair,0000': 2.0, 'input:pair,0001.0000': None}
    """
    plain = isinstance(inputs, Tensor) and is_storable(inputs)
    if plain or type(inputs) in SETTINGS or (type(inputs) in (list, tuple, dict) and not inputs):
        return {name: inputs}
    if isinstance(inputs, Mapping):
        if unwanted := [key for key in inputs if not isinstance(key, str)]:
            raise GMError(f"example inputs to be saved have texts as keys, but {name} has {shown(unwanted[0])}")
        steps = {f":{quote(key, safe='').replace('.', '%2E')}": each for key, each in inputs.items()}
    elif type(inputs) in (list, tuple):
        mark = "." if isinstance(inputs, list) else ","
        steps = {f"{mark}{index:04d}": each for index, each in enumerate(inputs)}
    else:
        wanted = "example inputs to be saved are plain tensors, numbers, texts, and lists and mappings of these"
        found = f"{inputs.dtype}, {inputs.layout}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise GMError(f"{wanted}, but {name} is {found}")
    return {key: leaf for step, each in steps.items() for key, leaf in by_name(each, name=name + step).items()}


def nested(leaves: Mapping[str, Any]) -> Any:
    """What `by_name` took apart, from the names without the one given to it.

    Raises:
        GMError: the names are no such names.

    >>> nested(by_name({"x": 1, "pair": (2.0, [None])}, name=""))
    {'x': 1, 'pair': (2.0, [None])}
    """
    if list(leaves) == [""]:
        return leaves[""]
    inside: dict[tuple[str, str], dict[str, Any]] = {}
    for name, leaf in leaves.items():
        step = STEP.match(name)
        if step is None:
            raise GMError(f"{shown(name)} is no place in nested inputs")
        inside.setdefault((step[1], step[2]), {})[name[step.end() :]] = leaf
    marks = {mark for mark, _ in inside}
    if len(marks) != 1:
        raise GMError("nested inputs are a list, a tuple or a mapping at each place, and not several of these")
    values = [(step, nested(rest)) for (_, step), rest in inside.items()]
    if marks == {":"}:
        return {unquote(step): value for step, value in values}
    ordered = [value for _, value in sorted(values, key=lambda pair: pair[0])]
    return ordered if marks == {"."} else tuple(ordered)


def settings_text(leaves: Mapping[str, Any]) -> list[str]:
    """The names of tensors, and "name=value" of all else with the value as JSON, sorted.

    >>> settings_text({"input:x": Tensor([1.0]), "input:y": True, "input:z": []})
    ['input:x', 'input:y=true', 'input:z=[]']
    """
    return sorted(name if isinstance(each, Tensor) else f"{name}={json.dumps(each)}" for name, each in leaves.items())
