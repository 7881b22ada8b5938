"""Structured weights in a model: put in the place of layers and parameters, found by name, made dense again.

A plain Linear or Conv2d is replaced by a structured layer. Every other module keeps its class's behaviour, forward,
hooks, children and other parameters: only the parameter goes, and in its place the module gets a GMWeight as a child
and a subclass of its class, in which the parameter's name is a property that computes it. So it is with tied weights:
every module that holds one gets a GMWeight, all of them twins with the same stored tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .copies import duplicate, settled
from .errors import GMError
from .groups import Group
from .kinds import view_of
from .layers import GMConv2d, GMLayer, GMLinear, GMWeight, counterpart
from .optimizers import follow_, names_held, remember_groups
from .plain import is_plain, made_anew
from .readonly import check_assigned, check_registered, read_only
from .structure import Structure
from .surgery import find_weight, holders, module_at, site_name

CHILD = "structured_"  # and the name of the parameter: the child that holds the GMWeight
TIES = "_tied_weights_keys"  # where a model of transformers maps the tied parameters to what they are tied to
PATTERN = (f"({CHILD})?", r"\b")  # before and after the name of a computed one there, so that its parts are found


class _Attached:
    """Marks the subclasses made here."""

    _dense_class: type[nn.Module]  # what the module was
    _parameter_names: tuple[str, ...]  # that it had, in their order
    _attached_names: tuple[str, ...]  # those of them that are computed


_SUBCLASSES: dict[tuple[Any, ...], Any] = {}


def _subclass(dense: Any, names: tuple[str, ...], attached: tuple[str, ...]) -> Any:
    """The subclass in which some parameters are computed, the same for the same arguments, copied and pickled as such.

    A class made at run time cannot be found by its name, so an instance is pickled as what makes it.
    """
    if (dense, names, attached) in _SUBCLASSES:
        return _SUBCLASSES[dense, names, attached]

    def reduce(self: Any, protocol: Any) -> Any:
        found = dense.__reduce_ex__(self, protocol)
        return (_empty_instance, (dense, names, attached), *found[2:]) if isinstance(found, tuple) else found

    def deepcopy(self: Any, memo: dict[int, Any]) -> nn.Module:
        found = memo[id(self)] = _empty_instance(dense, names, attached)
        found.__setstate__(copy.deepcopy(vars(self), memo))
        return found

    def register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
        if name in attached:
            check_assigned(param, _maker(self._modules[CHILD + name]))
        else:
            check_registered(name, param)
        dense.register_parameter(self, name, param)

    members: dict[str, Any] = {key: _computed(CHILD + key) for key in attached}
    members |= {"_dense_class": dense, "_parameter_names": names, "_attached_names": attached}
    members |= {"__reduce_ex__": reduce, "register_parameter": register_parameter}
    if _copies_itself(dense):  # with a parameter where there is none now
        members["__deepcopy__"] = deepcopy
    if dense.__module__.startswith("torch."):  # by which torch.fx knows what it takes whole
        members["__module__"] = dense.__module__
    made = type(f"Structured{dense.__name__}", (dense, _Attached), members)
    _SUBCLASSES[dense, names, attached] = made
    return made


def _copies_itself(cls: type) -> bool:
    """Whether a class, not one of torch's own, says how it is copied."""
    return any("__deepcopy__" in vars(each) and not each.__module__.startswith("torch.") for each in cls.__mro__)


def _computed(child: str) -> property:
    """A parameter that a child computes, which can be assigned nothing but what it computed."""

    def get(module: nn.Module) -> Tensor:
        weight = getattr(module, child)
        return read_only(weight(), _maker(weight))

    return property(get, lambda module, value: check_assigned(value, _maker(module._modules[child])))


def _maker(weight: nn.Module | None) -> object:
    """What computes the parameters of all the modules that hold a weight or a twin of it."""
    return weight.original or weight if isinstance(weight, GMWeight) else weight


def _empty_instance(dense: Any, names: tuple[str, ...], attached: tuple[str, ...]) -> nn.Module:
    cls = _subclass(dense, names, attached)
    return cls.__new__(cls)


def dense_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, of one with structured weights attached that which it had before.

    >>> dense_class(attach_(nn.Embedding(8, 4), "weight", GMWeight((8, 4), "lowrank:1")))
    <class 'torch.nn.modules.sparse.Embedding'>
    """
    return module._dense_class if isinstance(module, _Attached) else type(module)


def attach_(module: nn.Module, key: str, weight: GMWeight) -> nn.Module:
    """Put a structured weight in the place of a parameter; returns the module.

    Raises:
        GMError: the module's class can have no subclass made at run time.

    >>> attach_(nn.Embedding(8, 4), "weight", GMWeight((8, 4), "lowrank:1"))
    StructuredEmbedding(
      8, 4
      (structured_weight): GMWeight((8, 4), 'lowrank:1')
    )
    """
    if CHILD + key in {*vars(module), *module._modules}:
        raise GMError(f"{type(module).__name__} has a {CHILD + key!r} of its own; exclude its {key}")
    names: tuple[str, ...] = tuple(module._parameters)
    attached: tuple[str, ...] = (key,)
    if isinstance(module, _Attached):
        names, attached = module._parameter_names, (*module._attached_names, key)
    dense = dense_class(module)
    try:
        _change_class(module, _subclass(dense, names, attached))
    except Exception as problem:  # of slots, of a metaclass, of an __init_subclass__
        raise GMError(f"{dense.__name__} cannot compute its {key}: {problem}; exclude it") from problem
    del module._parameters[key]
    module._modules[CHILD + key] = weight.train(module.training)
    return module


def _change_class(module: nn.Module, cls: type) -> None:
    """Make a module one of another class, past a `__setattr__` of its own, which may refuse."""
    object.__setattr__(module, "__class__", cls)


def _detach_(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the structured weight of that name, which `attach_` put there."""
    assert isinstance(module, _Attached)
    del module._modules[CHILD + key]
    held = {**module._parameters, key: parameter}
    dense: Any = module._dense_class
    names = module._parameter_names
    module._parameters.clear()  # the order of the parameters is that of an optimizer's state
    module._parameters.update({each: held.pop(each) for each in names if each in held} | held)
    left = tuple(each for each in module._attached_names if each != key)
    _change_class(module, _subclass(dense, names, left) if left else dense)


def attached(model: nn.Module) -> dict[str, tuple[GMWeight, list[tuple[nn.Module, str]]]]:
    """The attached weights by name, that of the first module to hold each, and all modules and names under which."""
    names: dict[tuple[int, ...], str] = {}
    found: dict[str, tuple[GMWeight, list[tuple[nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        for key in module._attached_names if isinstance(module, _Attached) else ():
            weight = module._modules.get(CHILD + key)
            if isinstance(weight, GMWeight):
                name = names.setdefault(weight.identity, site_name(path, key))
                found.setdefault(name, (weight, []))[1].append((module, key))
    return found


def structured(model: nn.Module) -> dict[str, GMLayer]:
    """All structured weights of a model by name, in the order of definition, tied ones once.

    >>> structured(nn.Sequential(nn.ReLU(), attach_(nn.Embedding(8, 4), "weight", GMWeight((8, 4), "lowrank:1"))))
    {'1': GMWeight((8, 4), 'lowrank:1')}
    """
    held = attached(model)
    names = {id(weight): name for name, (weight, _) in held.items()}
    twins = {id(getattr(module, CHILD + key)) for _, places in held.values() for module, key in places} - names.keys()
    layers = {path: each for path, each in model.named_modules() if isinstance(each, GMLayer) and id(each) not in twins}
    return {names.get(id(each), path): each for path, each in layers.items()}


def is_replaced(model: nn.Module, name: str) -> bool:
    """Whether the module of a weight is replaced by a structured layer; else the weight is attached to it.

    A plain Linear or Conv2d is, unless the new layer would lose something: hooks, children, buffers, further
    parameters, their order, objects set on it or under names that the new layer uses, a setting, shape or dtype that it
    was not made with, or that a parameter is shared.
    """
    module, _ = find_weight(model, name)
    kind: Any = type(module)
    if not is_plain(model, name) or list(module._parameters) != ["weight", "bias"]:
        return False
    if module._buffers or module._modules or any(each for name, each in vars(module).items() if name.endswith("hooks")):
        return False
    made = made_anew(module)
    assert made is not None, "a plain layer is as it was made"
    extra = {name: each for name, each in vars(module).items() if name not in vars(made)}  # the new layer gets these
    known = all(isinstance(each, str | int | float | None) for each in extra.values())
    return known and _names_used(kind).isdisjoint(extra)


@cache
def _names_used(cls: Any) -> frozenset[str]:
    """The names under which the counterpart of a Linear or Conv2d keeps something."""
    made = cls(1, 1, device="meta") if cls is nn.Linear else cls(1, 1, 1, device="meta")
    return frozenset(dir(counterpart(made, "C1")))


def empty(model: nn.Module, name: str, structure: Structure | Group | str, *, replaced: bool | None = None) -> GMLayer:
    """An empty structured layer or weight for a dense weight, with its device, dtype and frozen flags.

    `replaced` says which, by default what `is_replaced` does.

    Raises:
        GMError: there is no such weight or no structured layer for it, or the structure does not fit.

    >>> empty(nn.Sequential(nn.Linear(8, 4), nn.Embedding(8, 4)), "1", "C4")
    GMWeight((8, 4), 'C4')
    """
    module, key = find_weight(model, name)
    if is_replaced(model, name) if replaced is None else replaced:
        return counterpart(module, structure)
    parameter = None if parametrize.is_parametrized(module) else module._parameters.get(key)
    view = None if parameter is None else view_of(module, key, parameter)
    if parameter is None or view is None:
        raise GMError(
            f"there is no structured layer for {key} of {type(module).__name__}; gmcompress.register says of a class "
            "of yours which parameters are matrices"
        )
    return GMWeight.like(parameter, view, structure, zero_row=_zero_row(module, parameter))


def _zero_row(module: nn.Module, parameter: Tensor) -> int | None:
    """The row of an embedding for its padding, where it is zero, as it is unless other weights were loaded."""
    row = module.padding_idx if isinstance(module, nn.Embedding) else None
    return None if row is None or parameter[row].any() else row


def exchange(model: nn.Module, layers: Mapping[str, nn.Module], *, inplace: bool = False) -> nn.Module:
    """The model with these layers and structured weights in the places named; the rest is copied.

    With inplace=True the old modules become the new layers: who holds one, in a list or a closure, then runs these.

    Raises:
        GMError: a name does not exist, or the model cannot be copied.

    >>> exchange(nn.Embedding(8, 4), {"": GMWeight((8, 4), "C4")})
    StructuredEmbedding(
      8, 4
      (structured_weight): GMWeight((8, 4), 'C4')
    )
    """
    weights: dict[int, GMWeight] = {}
    modules: list[tuple[nn.Module, nn.Module]] = []
    memo: dict[int, Any] = {}
    for name, layer in layers.items():
        module, key = find_weight(model, name)
        if isinstance(layer, GMWeight):
            parameter = module._parameters[key]
            weights[id(parameter)] = layer
            memo[id(parameter)] = parameter  # which the copy loses at once
        else:
            modules.append((module, layer))
            memo[id(module)] = layer
    trained = names_held(model)
    changed = model if inplace else duplicate(model, memo)
    for module, layer in modules if inplace else []:
        _change_class(module, type(layer))
        object.__setattr__(module, "__dict__", vars(layer))  # one and the same, whichever of the two is changed
    for held in holders(changed):
        for each in held:
            weight = weights.get(id(each.parameter))
            if weight is not None:
                attach_(each.module, each.key, weight if each is held[0] else weight.twin())
    _follow_ties_(changed)
    follow_(changed, trained, lambda name: _stored_at(changed, name), inplace=inplace)
    return changed


def _stored_at(model: nn.Module, name: str) -> list[nn.Parameter]:
    """What of a model's parameters a dense one of this name is by now: itself, or all parts of its structure."""
    path, _, key = name.rpartition(".")
    holder = module_at(model, path)
    assert holder is not None, "a structured layer has the place of the dense one"
    layer = holder if isinstance(holder, GMLayer) and key == "weight" else holder._modules.get(CHILD + key)
    if isinstance(layer, GMLayer):
        return [layer.get_parameter(part) for part in layer.parts()]
    found = holder._parameters.get(key)
    return list(holder.parameters(recurse=False)) if found is None else [found]  # of a separable kernel in its place


def _follow_ties_(model: nn.Module) -> None:
    """Where a model declares its tied parameters by name, name the parts of those that are computed now, and no others.

    Such a declaration is what transformers ties weights by, and what it saves once.
    """
    for module in model.modules():
        declared = vars(module).get(TIES, getattr(type(module), TIES, None))
        if isinstance(declared, dict):
            found = {_tied_name(module, target): _tied_name(module, source) for target, source in declared.items()}
            if found != declared:
                vars(module)[TIES] = found


def _tied_name(module: nn.Module, declared: str) -> str:
    """The name of a parameter of a module, as a pattern where it is computed."""
    before, after = PATTERN
    name = declared.replace(before, "").removesuffix(after)
    path, _, key = name.rpartition(".")
    holder = module_at(module, path)
    computed = isinstance(holder, _Attached) and key in holder._attached_names
    return f"{path}.{before}{key}{after}".removeprefix(".") if computed else name


def densify(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """A copy of the model with plain torch layers of the same function in place of the structured ones, or of some.

    Raises:
        GMError: the model cannot be copied.

    >>> densify(nn.Sequential(GMLinear(64, 64, "C8xC8"), attach_(nn.Embedding(8, 4), "weight", GMWeight((8, 4), "C4"))))
    Sequential(
      (0): Linear(in_features=64, out_features=64, bias=True)
      (1): Embedding(8, 4)
    )
    """
    found = structured(model)
    chosen = found if names is None else {name: found[name] for name in names}
    layers = [each for each in chosen.values() if isinstance(each, GMLinear | GMConv2d)]
    memo: dict[int, Any] = {id(each): each.dense() for each in layers}
    trained = names_held(model)
    dense = duplicate(model, memo)
    for name, (weight, places) in attached(dense).items():
        if name in chosen:
            parameter = nn.Parameter(weight().detach().clone(), requires_grad=weight.trains)
            for module, key in places:
                _detach_(module, key, parameter)
    _follow_ties_(dense)
    follow_(dense, trained, lambda name: _dense_at(dense, name), inplace=False)
    return settled(dense)


def _dense_at(model: nn.Module, name: str) -> list[nn.Parameter]:
    """What of a model's parameters a stored one of this name is by now: itself, or the weight that it was a part of."""
    path, _, key = name.rpartition(".")
    owner, _, child = path.rpartition(".")
    module = module_at(model, path)
    if module is None:  # it was that of a weight attached
        return [model.get_submodule(owner).get_parameter(child.removeprefix(CHILD))]
    found = module._parameters.get(key)
    return [module.get_parameter("weight") if found is None else found]


def remember(model: nn.Module) -> Callable[[], None]:
    """What puts all modules of a model back as they are now: classes, parameters and children, not their values."""
    ours = (each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule))  # others cannot change
    kept = [
        (each, type(each), vars(each), dict(vars(each)), each._parameters.copy(), each._modules.copy()) for each in ours
    ]

    put_groups_back = remember_groups(model)

    def put_back() -> None:
        put_groups_back()
        for module, cls, attributes, held, parameters, children in kept:
            _change_class(module, cls)
            object.__setattr__(module, "__dict__", attributes)
            attributes.clear()
            attributes.update(held)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._modules.clear()
            module._modules.update(children)

    return put_back


def set_bias(model: nn.Module, name: str, bias: Tensor) -> None:
    """Give the module of a weight another bias, as a new parameter."""
    module, _ = find_weight(model, name)
    old = module.get_parameter("bias")
    module._parameters["bias"] = nn.Parameter(bias.to(old), requires_grad=old.requires_grad)
