"""Nested inputs copied, and by name, the tensors and the settings in them, and back; objects in outputs laid open."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Signature, signature
from io import IOBase
from itertools import islice
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .copies import attributes_of, slots_of
from .errors import GMError, shown
from .files import is_storable

ROOT = "input"
STEP = re.compile(r"([.,:])([^.,:]*)")  # a place in a list, in a tuple, a key of a mapping
LONGEST = 1000  # of what an iterator may give without end
SETTINGS = (bool, int, float, str, type(None))


def laid_open(outputs: Any, *, depth: int = 4) -> Any:
    """Nested outputs with the objects in them, such as dataclasses, as mappings of what they hold.

    >>> from types import SimpleNamespace
    >>> laid_open([1, SimpleNamespace(x=2.0)])
    [1, {'x': 2.0}]
    """

    def opened(each: Any) -> Any:
        if not depth or _is_closed(each):
            return each
        return {k: laid_open(v, depth=depth - 1) for k, v in _held(each).items()}

    return tree_map(opened, outputs)


def _is_closed(each: Any) -> bool:
    """Whether it is something else than an object that holds values, such as a dataclass, in slots or not."""
    if isinstance(each, Tensor | nn.Module | ModuleType) or callable(each):
        return True
    return attributes_of(each) is None and not slots_of(each)


def _held(each: Any) -> dict[str, Any]:
    return slots_of(each) | (attributes_of(each) or {})


def describe(inputs: Any) -> str:
    """The shapes of example inputs, for messages and reports.

    >>> describe({"x": torch.zeros(1, 3)})
    '{x: (1, 3)}'
    """
    if isinstance(inputs, Tensor):
        return f"nested {describe(inputs.unbind())}" if is_ragged(inputs) else str(tuple(inputs.shape))
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in inputs.items()) + "}"
    if isinstance(inputs, list | tuple):
        return "[" + ", ".join(map(describe, inputs)) + "]"
    return type(inputs).__name__


def is_plain(tensor: Tensor) -> bool:
    """Whether it is neither sparse nor nested, and so has strides."""
    return tensor.layout is torch.strided and not tensor.is_nested


def is_ragged(tensor: Tensor) -> bool:
    """Whether it is a nested tensor that has no shape, as those of the older of torch's two kinds."""
    return tensor.is_nested and tensor.layout is torch.strided


def floating(outputs: Any) -> list[Tensor]:
    """The tensors of floating point in what a module returns, but for sparse and nested ones."""
    found = (each for each in tree_leaves(laid_open(outputs)) if isinstance(each, Tensor) and each.is_floating_point())
    return [each for each in found if is_plain(each)]


def drawn(outputs: Any) -> Any:
    """Nested outputs with what every iterator in them gives, up to LONGEST, as a list: a model may still run in it.

    >>> drawn({"tokens": (each for each in "ab")})
    {'tokens': ['a', 'b']}
    """
    if not any(map(_is_iterator, tree_leaves(outputs))):
        return outputs
    return tree_map(lambda each: drawn(list(islice(each, LONGEST))) if _is_iterator(each) else each, outputs)


def _is_iterator(each: Any) -> bool:
    return isinstance(each, Iterator) and not isinstance(each, nn.Module | IOBase)


def own_copy(given: Any) -> Any:
    """A copy of arguments that a module may change in place, objects such as caches too; what is one thing stays one.

    Objects that hold modules, or that cannot be copied, are shared.

    >>> x = Tensor([1.0])
    >>> first, second = own_copy([x, x])
    >>> first is second, first is x
    (True, False)
    """
    copies: dict[int, Any] = {}

    def copied(each: Any) -> Any:
        if id(each) in copies:
            return copies[id(each)]
        if isinstance(each, Tensor):
            copies[id(each)] = each.detach().clone().requires_grad_(each.requires_grad)
            return copies[id(each)]
        if _is_closed(each) or any(isinstance(leaf, nn.Module) for leaf in tree_leaves(laid_open(each))):
            return each
        try:
            return copy.deepcopy(each, copies)
        except Exception:  # of any kind, from what it holds
            return each

    return tree_map(copied, given)


def arguments_of(function: Callable[..., Any], inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments by position and by name: inputs are one tensor, or a sequence or mapping of all of them.

    >>> arguments_of(lambda x, y: x, [1, 2]), arguments_of(lambda x, y: x, {"x": 1, "y": 2})
    (([1, 2], {}), ([], {'x': 1, 'y': 2}))
    """
    if is_one_argument(function, inputs):
        return [dict(inputs)], {}
    if isinstance(inputs, Mapping):
        return [], dict(inputs)
    return (list(inputs) if isinstance(inputs, list | tuple) else [inputs]), {}


def is_one_argument(function: Callable[..., Any], inputs: Any) -> bool:
    """Whether a mapping has other names than the arguments of a function, which takes one: a whole batch, say.

    >>> is_one_argument(lambda batch: batch, {"x": 1}), is_one_argument(lambda x: x, {"x": 1})
    (True, False)
    """
    if not isinstance(inputs, Mapping):
        return False
    try:
        form = signature(function)
    except (TypeError, ValueError):  # of functions that are not written in Python
        return False
    return not _binds(form, **inputs) and _binds(form, inputs)


def why_one_argument(function: Callable[..., Any], inputs: Any) -> str:
    """Why a mapping is one argument, for messages; "" where it is not.

    >>> why_one_argument(lambda x: x, {"x": 1, "index": 2}), why_one_argument(lambda x, index: x, {"x": 1, "index": 2})
    (" as one argument, since it takes no 'index'", '')
    """
    if not is_one_argument(function, inputs):
        return ""
    known = signature(function).parameters
    unknown = [repr(name) for name in inputs if name not in known]
    takes = f"takes no {', '.join(unknown)}" if len(unknown) < len(inputs) else "has none of these names"
    return f" as one argument, since it {takes}"


def takes_all(form: Signature, given: Sequence[Any]) -> bool:
    """Whether a function of this form takes all of several arguments, and not the first one alone.

    >>> takes_all(signature(lambda x, y: x), [1, 2]), takes_all(signature(lambda x, y=0: x), [1, 2])
    (True, False)
    """
    return _binds(form, *given) and not _binds(form, *given[:1])


def _binds(form: Signature, /, *given: Any, **named: Any) -> bool:
    try:
        form.bind(*given, **named)
    except TypeError:
        return False
    return True


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
