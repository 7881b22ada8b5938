"""load_shards(): a user's model with structured layers, filled from compressed shards a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..attaching import CHILD, empty, exchange, structured
from ..copies import evaluating
from ..errors import GMError, nearest_names
from ..files import usable
from ..kinds import view_of
from ..layers import GMLayer
from ..structure import Structure
from ..surgery import check_model, find_weight
from .description import Shards, check_files, describe_shards
from .source import Entry, read_entries

HOW = "compress again, with transposed= naming just the weights that lie as inputs × outputs"
Place = tuple[nn.Module, str]  # a module, and the name under which it holds a tensor


def load_shards(folder: str | Path, model: nn.Module, *, device: torch.device | str | None = None) -> nn.Module:
    """The compressed model in a folder of `compress_shards`, in evaluation mode, on a copy of an uncompressed `model`.

    The model may be on the meta device, so that its dense weights never take memory; only the tensors that files hold
    are then created, on `device` (by default the CPU; else where the model has them). Build it such that what files
    do not hold is real: `with accelerate.init_empty_weights():` leaves buffers alone.

    Raises:
        GMError: a file is missing, changed or foreign, the model is another one, or something in it stays on meta.
    """
    place = usable(folder)
    found = describe_shards(place)
    check_files(place, found.files)
    entries = read_entries([place / name for name in found.files])
    check_model(model, meta=True)
    try:
        made = {name: _layer(model, name, text, found) for name, text in found.layers.items()}
        small = exchange(model, made)
    except GMError as problem:
        raise GMError(f"{place} was compressed from another model: {problem}") from None
    names = _names(small, found)
    places = _places(small)
    _check_names(names, places, {each.name for each in entries}, place)
    filled: dict[int, str] = {}
    for entry, tensor in _tensors(entries):
        _fill(places[names.get(entry.name, entry.name)], tensor, entry, device, filled)
    _check_real(small)
    return evaluating(small if device is None else small.to(device))


def _layer(model: nn.Module, name: str, text: str, found: Shards) -> GMLayer:
    """The empty structured layer for a weight, which must be the matrix that was compressed, and lie in the same way.

    Raises:
        GMError: it has another shape or order of axes, or there is no such weight.
    """
    module, key = find_weight(model, name)
    parameter = module._parameters.get(key)
    view = None if parameter is None else view_of(module, key, parameter)
    if parameter is None or view is None:
        raise GMError(f"{key} of {name!r}, a {type(module).__name__}, is not known to be a matrix")
    shape, turned = tuple(found.shapes[name]), name in found.transposed
    what, ways = type(module).__name__, ("outputs × inputs", "inputs × outputs")
    if (view.letters[0] == "i") != turned:
        held, taken = ways if turned else ways[::-1]
        raise GMError(f"{name!r} is a {what}, which holds its weight as {held}, and was compressed as {taken}: {HOW}")
    if view.matrix_shape != shape:
        raise GMError(f"{name!r} has shape {shape} there, {view.matrix_shape} in the model")
    return empty(model, name, text)


def _names(small: nn.Module, found: Shards) -> dict[str, str]:
    """The names in the model of the stored parts, where those are others than in the files."""
    layers, paths = structured(small), {id(each): path for path, each in small.named_modules()}
    known = {}
    for name in found.layers:
        module, key = find_weight(small, name)
        layer = layers[name] if name in layers else module._modules[CHILD + key]  # a tie, named as the first
        path = paths[id(layer)]
        for part in Structure.parse(found.layers[name]).shapes(found.shapes[name]):
            known[f"{name}.{part}" if name else part] = f"{path}.{part}" if path else part
    return known


def _places(small: nn.Module) -> dict[str, list[Place]]:
    """All places that hold the tensor of each name in the model's state, tied ones under each of their names."""
    every: dict[int, list[Place]] = {}
    named: dict[str, int] = {}
    for path, module in small.named_modules(remove_duplicate=False):
        kept = {key: each for key, each in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for key, each in {**module._parameters, **kept}.items():
            if each is not None:
                named[f"{path}.{key}" if path else key] = id(each)
                held = every.setdefault(id(each), [])
                if (module, key) not in held:
                    held.append((module, key))
    return {name: every[key] for name, key in named.items()}


def _check_names(names: dict[str, str], places: dict[str, list[Place]], stored: set[str], folder: Path) -> None:
    """Refuse tensors that the model has not, and such as neither the files nor a tie gives it.

    Raises:
        GMError: naming one.
    """
    inside = {names.get(each, each) for each in stored}
    foreign = sorted(each for each in inside if each not in places)
    if foreign:
        near = nearest_names(foreign[0], places)
        said = f"it holds {foreign[0]!r}, which the model has not; near: {near}"
        raise GMError(f"{folder} was compressed from another model: {said}")
    given = {id(places[each]) for each in inside}
    missing = sorted(each for each in places if id(places[each]) not in given)
    if missing:
        raise GMError(f"{folder} was compressed from another model: it lacks {missing[0]!r}")


def _tensors(entries: Iterable[Entry]) -> Iterable[tuple[Entry, Tensor]]:
    for entry in entries:
        try:
            with safe_open(entry.file, framework="pt") as file:
                yield entry, file.get_tensor(entry.name)
        except (OSError, SafetensorError) as problem:
            raise GMError(f"{entry.file} is no complete safetensors file: {problem}") from None


@torch.no_grad()
def _fill(
    places: list[Place], tensor: Tensor, entry: Entry, device: torch.device | str | None, filled: dict[int, str]
) -> None:
    """Put a tensor in all the places that share it.

    Raises:
        GMError: it has another shape or kind, or is another than the one that was put there under another name.
    """
    module, key = places[0]
    old = getattr(module, key)
    if id(places) in filled:
        if not torch.equal(old.cpu(), tensor):
            raise GMError(
                f"{filled[id(places)]!r} and {entry.name!r} are tied in the model, and differ in {entry.file}"
            )
        return
    if tensor.shape != old.shape:
        shapes = f"{tuple(tensor.shape)} there, {tuple(old.shape)} in the model"
        raise GMError(f"{entry.file} was compressed from another model: {entry.name!r} has shape {shapes}")
    if tensor.dtype != old.dtype and not (tensor.is_floating_point() and old.is_floating_point()):
        raise GMError(f"{entry.file}: {entry.name!r} is of {tensor.dtype}, but in the model of {old.dtype}")
    wanted = device if device is not None else "cpu" if old.is_meta else old.device
    new = tensor.to(wanted, copy=True)
    held = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for each, name in places:
        setattr(each, name, held)
    filled[id(places)] = entry.name


@torch.no_grad()
def _check_real(small: nn.Module) -> None:
    """Give the structured layers tables on the device that they now are on, and refuse what stays on meta.

    Raises:
        GMError: naming a tensor that is.
    """
    for layer in small.modules():
        if isinstance(layer, GMLayer):
            layer.share_()
    for name, each in [*small.named_parameters(), *small.named_buffers()]:
        if each.is_meta:
            raise GMError(
                f"{name!r} is in no file and on meta, where it has no values; build the model with "
                "accelerate.init_empty_weights(), which leaves buffers real, or give it real ones"
            )
