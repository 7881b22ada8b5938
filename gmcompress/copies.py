"""Copies of models, with what their modules keep outside the registry of parameters, buffers and children."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial, update_wrapper
from types import CellType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import GMError, said

WRITTEN = "written_as_it_runs"  # set on the parameters of a copy into which its runs write


def duplicate(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy in which every object in `memo`, by id, stands for what the memo holds."""
    kept = (each for module in model.modules() for each in tree_leaves(vars(module)) if isinstance(each, Tensor))
    # pruning keeps one, computed anew at every call, in place of a parameter; others keep what they last computed
    known: dict[int, Any] = {id(each): each.detach().clone() for each in kept if each.grad_fn is not None}
    # some of which torch does not copy
    sparse = (each for each in parameters_of(model).values() if each.layout is not torch.strided)
    known |= {id(each): nn.Parameter(each.detach().clone(), each.requires_grad) for each in sparse} | memo
    try:
        with torch.no_grad():  # in which those of scripted modules, cloned whatever the memo holds, become leaves
            try:
                found = copy.deepcopy(model, leaves := dict(known))
            except Exception:
                found = copy.deepcopy(model, leaves := known | _uncopied(model))
    except RecursionError as problem:
        what = f"the modules of this {type(model).__name__} lie too deep in one another to be copied"
        raise GMError(f"{what}; give Python a higher limit: sys.setrecursionlimit(10_000)") from problem
    except Exception as problem:
        raise GMError(f"this {type(model).__name__} cannot be copied ({problem})") from problem
    _check_copied(model, found, memo)
    _complete(model, found, leaves)
    was_training = {name: module.training for name, module in model.named_modules()}
    for name, module in found.named_modules():
        set_mode(module, training=was_training.get(name, module.training))  # graph modules are in training once copied
        inside = (each for key, each in vars(module).items() if isinstance(each, dict) and key != "_modules")
        for held in (vars(module), *inside):  # but for its children: what was put in may hold what it stands for
            held.update({key: _followed(each, leaves) for key, each in held.items() if callable(each)})
    return found


def check_distinct(model: nn.Module) -> None:
    """Refuse a model of whose modules torch takes one for another, as those are that a class compares by value.

    Neither its parameters nor its modes would be those of all modules.

    Raises:
        GMError: naming the module, or the problem where torch cannot tell modules apart at all.
    """
    remedy = "a module class leaves __eq__ and __hash__ to nn.Module"
    try:
        known = {id(each) for each in model.modules()}
        hidden = [(name, each) for name, each in model.named_modules(remove_duplicate=False) if id(each) not in known]
    except Exception as problem:  # of an __eq__ without a __hash__, or that returns a tensor
        raise GMError(
            f"torch cannot list the modules of this {type(model).__name__} ({said(problem)}); {remedy}"
        ) from problem
    if hidden:
        name, kind = hidden[0][0], type(hidden[0][1]).__name__
        raise GMError(
            f"torch takes {name!r} ({kind}) for another module that is equal to it, and leaves it out; {remedy}"
        )


def redirect_(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put other modules in the place of some, by id, wherever the parts of a model hold them.

    That is as children, in lists, tuples and mappings, in functions that close over them, in objects that hold such.
    What the new ones hold stays as it is, for it may be what they stand for.
    """
    _redirected(model, new, {id(each) for each in new.values()})


def _redirected(value: Any, new: Mapping[int, nn.Module], seen: set[int]) -> Any:
    """What is to be held in the place of a value: it itself, changed inside where that can be, or one made anew."""
    if id(value) in new:
        return new[id(value)]
    if id(value) in seen or isinstance(value, Tensor | type | ModuleType):
        return value
    seen.add(id(value))

    def followed(held: Any) -> Any:
        return _redirected(held, new, seen)

    if isinstance(value, dict | list):
        for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if (found := followed(each)) is not each:
                value[key] = found
    elif isinstance(value, tuple):
        items = [followed(each) for each in value]
        if any(item is not each for item, each in zip(items, value, strict=True)):
            make: Any = getattr(type(value), "_make", type(value))  # of a named tuple
            return make(items)
    elif isinstance(value, MethodType):
        owner = followed(value.__self__)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    elif isinstance(value, partial):
        followed(value.keywords)
        function, arguments = followed(value.func), followed(value.args)
        if function is not value.func or arguments is not value.args:
            return partial(function, *arguments, **value.keywords)
    elif isinstance(value, FunctionType):
        value.__defaults__ = followed(value.__defaults__)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # not yet filled
                cell.cell_contents = followed(cell.cell_contents)
    else:
        followed(attributes_of(value))
    return value


def _check_copied(model: nn.Module, found: nn.Module, memo: Mapping[int, Any]) -> None:
    """Refuse a copy that shares modules with what it was copied from, and so would change it."""
    given = {id(part) for each in memo.values() if isinstance(each, nn.Module) for part in each.modules()}
    old = {id(each): name for name, each in model.named_modules() if id(each) not in given}
    for each in found.modules():
        if id(each) in old:
            place, kind = old[id(each)] or "the model", type(each).__name__
            raise GMError(f"{place!r} ({kind}) is not copied by copy.deepcopy; give {kind} a __deepcopy__ that does")


def _complete(model: nn.Module, found: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy what torch's own leaves out: what was set on parameters, and slots of modules.

    `memo` is that of the copy.
    """
    parameters, modules = parameters_of(model, aliases=True), dict(model.named_modules())
    for name, new in parameters_of(found).items():
        if (old := parameters.get(name)) is not None and vars(old):
            vars(new).update({key: each for key, each in vars(old).items() if key not in vars(new)})
    for name, copied in found.named_modules():
        given = modules.get(name)
        if isinstance(copied, torch.jit.ScriptModule):
            for key, new in copied.named_parameters(recurse=False):
                old = parameters[f"{name}.{key}" if name else key]
                new.requires_grad_(memo.get(id(old), old).requires_grad)
        if given is not None and type(copied) is type(given):
            wanted = slots_of(given)
            for slot in wanted.keys() - slots_of(copied).keys():
                _member(type(copied), slot).__set__(copied, copy.deepcopy(wanted[slot], memo))


def _member(cls: type, slot: str) -> MemberDescriptorType:
    """What reads and writes a slot, whatever a subclass has under its name."""
    found = (vars(each).get(slot) for each in cls.__mro__)
    return next(each for each in found if isinstance(each, MemberDescriptorType))


def attributes_of(holder: Any) -> dict[str, Any] | None:
    """The `__dict__` of an object, None where it has none, past all that it may do when it is asked for an attribute.

    >>> from types import SimpleNamespace
    >>> attributes_of(SimpleNamespace(x=1)), attributes_of(1j)
    ({'x': 1}, None)
    """
    for cls in type(holder).__mro__:
        found = vars(cls).get("__dict__")
        if isinstance(found, GetSetDescriptorType | MemberDescriptorType):
            return found.__get__(holder)
    return None


def slots_of(holder: Any) -> dict[str, Any]:
    """What the slots of an object hold, as far as they hold something.

    >>> class Pair:
    ...     __slots__ = ("x", "y")
    >>> pair = Pair()
    >>> pair.x = 1
    >>> slots_of(pair)
    {'x': 1}
    """
    found = {}
    for cls in type(holder).__mro__:
        declared = vars(cls).get("__slots__", ())
        for slot in (declared,) if isinstance(declared, str) else declared:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{slot}" if private else slot
            member = vars(cls).get(name)  # not by the name, which a subclass may have given to a property
            if isinstance(member, MemberDescriptorType):
                with suppress(AttributeError):
                    found[name] = member.__get__(holder)
    return found


def _uncopied(model: nn.Module) -> dict[int, Any]:
    """What modules hold that cannot be copied, by id, such as locks, files and streams: a copy shares it.

    Some tensors, as those in compressed sparse rows, can be cloned all the same.
    """
    known = {id(each): each for each in (*model.modules(), *parameters_of(model).values())}
    found: dict[int, Any] = {}
    for module in model.modules():
        for each in tree_leaves([value for key, value in vars(module).items() if key != "_modules"]):
            try:
                copy.deepcopy(each, dict(known))
            except Exception:
                found[id(each)] = each.detach().clone() if isinstance(each, Tensor) else each
    return found


def parameters_of(model: nn.Module, *, aliases: bool = False) -> dict[str, nn.Parameter]:
    """All parameters by name, also of a model whose class gives out others, as those alone that are to be trained."""
    return dict(nn.Module.named_parameters(model, remove_duplicate=not aliases))


def device_of(model: nn.Module) -> torch.device | None:
    """Where the first parameter lies; None of a model that has none."""
    return next((each.device for each in parameters_of(model).values()), None)


def count_parameters(model: nn.Module) -> int:
    """The numbers in all parameters, tied ones counted once."""
    return sum(each.numel() for each in parameters_of(model).values())


def evaluating(model: nn.Module) -> nn.Module:
    """The model itself, put into evaluation mode.

    Where a class has a `train` of its own, that may return nothing, or be something else altogether.
    """
    return _in_mode(model, training=False)


def training(model: nn.Module) -> nn.Module:
    """The model itself, put into training mode, in the same way."""
    return _in_mode(model, training=True)


def _in_mode(model: nn.Module, *, training: bool) -> nn.Module:
    try:
        model.train() if training else model.eval()
    except Exception:
        for module in model.modules():
            set_mode(module, training=training)
    return model


def set_mode(module: nn.Module, *, training: bool) -> None:
    """Put one module, and none inside it, into training or evaluation mode."""
    try:
        module.training = training  # of a scripted module, this reaches its own code
    except Exception:  # of any kind: its class lets nothing be set
        vars(module)["training"] = training


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Every module is afterwards in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            set_mode(module, training=training)


def settled(model: nn.Module) -> nn.Module:
    """The model itself, with what a `train` of its own keeps of the weights in evaluation mode made anew."""
    return model if any(each.training for each in model.modules()) else evaluating(model)


@contextmanager
def asking_for_gradients(model: nn.Module) -> Iterator[None]:
    """The parameters of a model get gradients inside, whatever they do outside."""
    still = [each for each in parameters_of(model).values() if each.is_floating_point() and not each.requires_grad]
    for each in still:
        each.requires_grad_(True)
    try:
        yield
    finally:
        for each in still:
            each.requires_grad_(False)


def state_of(model: nn.Module) -> dict[str, Any]:
    """The tensors and other state of a model by name, whole even where its class has a `state_dict` of its own.

    Raises:
        GMError: a hook on the state fails.
    """
    try:
        return nn.Module.state_dict(model, keep_vars=True)
    except Exception as problem:
        raise GMError(f"this {type(model).__name__} cannot give its state_dict: {said(problem)}") from problem


def whole_state(model: nn.Module) -> dict[str, Any]:
    """All parameters by all their names, and buffers and other state as `state_of` has them.

    What code of the model's own makes of a parameter or buffer for its state, such as one of half precision, is left
    out for the tensor itself.

    Raises:
        GMError: as `state_of`.
    """
    state = state_of(model)
    buffers = {name: each for name, each in model.named_buffers(remove_duplicate=False) if name in state}
    held = {**parameters_of(model, aliases=True), **buffers}
    return {name: held.get(name, each) for name, each in state.items()} | held


def _followed(value: Any, copies: Mapping[int, Any]) -> Any:
    """A hook or other function that reaches parts of a model, as one that reaches their copies.

    A deep copy leaves functions as they are, with what they close over, so that a copied model would go on to call
    parts of the one it was copied from.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, weakref.ref):
        return weakref.ref(copies[id(value())]) if id(value()) in copies else value
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _followed(value.__self__, copies))
    if not isinstance(value, FunctionType):
        return value
    around = {**copies, id(value): value}  # which may close over itself
    cells, defaults = value.__closure__ or (), value.__defaults__ or ()
    new_cells = tuple(_followed_cell(each, around) for each in cells)
    new_defaults = tuple(_followed(each, around) for each in defaults)
    if all(new is old for new, old in zip(new_cells + new_defaults, cells + defaults, strict=True)):
        return value
    made = FunctionType(value.__code__, value.__globals__, value.__name__, new_defaults or None, new_cells or None)
    made.__kwdefaults__ = value.__kwdefaults__
    return update_wrapper(made, value)


def _followed_cell(cell: CellType, copies: Mapping[int, Any]) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # not yet filled
        return cell
    found = _followed(content, copies)
    return cell if found is content else CellType(found)
