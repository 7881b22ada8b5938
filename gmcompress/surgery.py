"""Trace and replace: which modules hold weights, in which order they run, and how one is put in another's place.

Knows modules, names and call sites, and no mathematics. Networks are analysed by running or tracing them and changed by
module name, never by position in a graph.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .errors import GMError, nearest_names

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]

WRAPPERS = {
    "DistributedDataParallel": ".module",
    "DataParallel": ".module",
    "FullyShardedDataParallel": ".module",
    "OptimizedModule": "._orig_mod",
    "AveragedModel": ".module",
    "ModelEma": ".ema",
    "ModelEmaV2": ".module",
    "ModelEmaV3": ".module",
}


@dataclass(frozen=True)
class Site:
    """One module that holds a weight matrix: the facts from which a plan is made.

    `shape` is (rows, columns, *taps); in a grouped convolution the columns are those of one of its `conv_groups`.
    `calls` counts runs in one forward pass, None where that is unknown. `role` is "stem", "classifier" or "".
    `obstacle` says why the module cannot be replaced, "" where it can.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    conv_groups: int
    parameters: int
    calls: int | None
    role: str
    obstacle: str


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be analysed as a plain module.

    Raises:
        GMError: not a module; wrapped by DDP, FSDP, torch.compile or an EMA; scripted; or its weights are on meta.
    """
    if not isinstance(model, nn.Module):
        raise GMError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        attribute = WRAPPERS.get(type(module).__name__)
        if attribute:
            where = f"its part {name!r}" if name else "the model"
            raise GMError(f"{where} is wrapped in {type(module).__name__}; unwrap it first: pass model{attribute}")
        if isinstance(module, torch.jit.ScriptModule):
            raise GMError(
                f"the model holds a scripted module ({name or 'the root'}); pass the nn.Module it was made from"
            )
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise GMError(f"{name!r} is sharded (DTensor); gather the model's full parameters first")
        if parameter.is_meta:
            raise GMError(f"{name!r} is on the meta device and holds no values; load the weights first")


def shell(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the same memory, so that running it leaves the caller's modules alone.

    Its parameters need no gradient, without which torch's FlopCounterMode fails on parameters passed as arguments.

    Raises:
        GMError: the model cannot be copied.
    """
    kept = [each for each in model.parameters() if not isinstance(each, nn.parameter.UninitializedParameter)]
    return duplicate(model, {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in kept}).eval()


def duplicate(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy in which every object in `memo`, by id, stands for what the memo holds."""
    try:
        return copy.deepcopy(model, memo)
    except Exception as problem:
        raise GMError(
            f"this {type(model).__name__} cannot be copied ({problem}); inplace=True works without"
        ) from problem


def call(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass: a tensor is the only argument, a sequence the positional ones, a mapping the named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


def describe(inputs: Any) -> str:
    """The shapes of example inputs, for messages and reports.

    >>> describe({"x": torch.zeros(1, 3)})
    '{x: (1, 3)}'
    """
    if isinstance(inputs, Tensor):
        return str(tuple(inputs.shape))
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in inputs.items()) + "}"
    if isinstance(inputs, list | tuple):
        return "[" + ", ".join(map(describe, inputs)) + "]"
    return type(inputs).__name__


def run(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass without gradients, its failure told as an error about the inputs.

    Raises:
        GMError: the model does not accept the inputs.
    """
    try:
        with torch.no_grad():
            return call(model, inputs)
    except Exception as problem:
        what = f"{type(model).__name__} does not run on inputs of shape {describe(inputs)}"
        said = str(problem).strip().split("\n")[0]
        raise GMError(f"{what}: {type(problem).__name__}: {said}") from problem


def trace(model: nn.Module, inputs: Inputs | None = None) -> tuple[Site, ...]:
    """The sites of a model in the order in which they run: by example inputs, else by torch.fx, else as defined.

    Raises:
        GMError: the model is wrapped or on meta, or does not run on the inputs.

    >>> [(site.name, site.role) for site in trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))]
    [('0', ''), ('2', 'classifier')]
    """
    check_model(model)
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    holders = {name: module for name, module in model.named_modules() if weight_of(module) is not None}
    calls = _calls_by_run(model, inputs) if inputs is not None else _calls_by_fx(model)
    order = {name: at for at, name in enumerate(calls)} if calls is not None else {}
    ordered = sorted(holders, key=lambda name: order.get(name, len(order)))  # stable: what never runs comes last
    ran = ordered if calls is None else [name for name in ordered if name in calls]
    roles = _roles(model, ran, holders)
    shared = _shared_weights(model)
    return tuple(
        Site(
            name=name,
            aliases=tuple(alias for alias in names[id(holders[name])] if alias != name),
            kind=kind_of(type(holders[name])),
            shape=tuple(weight_of(holders[name]).shape),  # type: ignore[union-attr]
            conv_groups=getattr(holders[name], "groups", 1),
            parameters=sum(each.numel() for each in holders[name].parameters(recurse=False)),
            calls=None if calls is None else calls.get(name, 0),
            role=roles.get(name, ""),
            obstacle=_obstacle(holders[name], name, shared),
        )
        for name in ordered
    )


def kind_of(cls: type[nn.Module]) -> str:
    """The full name of a module class: 'torch.nn.modules.linear.Linear'."""
    return f"{cls.__module__}.{cls.__qualname__}"


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight matrix of a module, a parametrized one included; None where it holds none."""
    found = getattr(module, "weight", None) if parametrize.is_parametrized(module) else module._parameters.get("weight")
    if isinstance(found, nn.parameter.UninitializedParameter) or not isinstance(found, Tensor):
        return None
    return found if found.dim() >= 2 else None


def _calls_by_run(model: nn.Module, inputs: Inputs) -> Counter[str]:
    """How often each module runs, in order of first call, seen by hooks on a shell of the model."""
    calls: Counter[str] = Counter()
    watched = shell(model)
    for name, module in watched.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.update([name]))
    run(watched, inputs)
    return calls


class _Tracer(fx.Tracer):
    """torch.fx as torchvision and timm use it: what timm marks as untraceable stays a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        from timm.models import is_notrace_module

        return is_notrace_module(type(m)) or super().is_leaf_module(m, module_qualified_name)


def _calls_by_fx(model: nn.Module) -> Counter[str] | None:
    """How often each leaf module is called in the graph that torch.fx sees, or None where it cannot trace."""
    from timm.models import get_notrace_functions

    try:
        graph = _Tracer(autowrap_functions=tuple(get_notrace_functions())).trace(shell(model))
    except Exception:  # control flow, unusual arguments: the caller goes on from the modules alone
        return None
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def _roles(model: nn.Module, ran: Sequence[str], holders: Mapping[str, nn.Module]) -> dict[str, str]:
    """The stem is the convolution that runs first; the classifier is what timm says, else the last layer, if linear."""
    if len(ran) < 2:
        return {}
    roles = {}
    if isinstance(holders[ran[0]], nn.Conv1d | nn.Conv2d | nn.Conv3d):
        roles[ran[0]] = "stem"
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, Mapping) else None
    if named:
        heads = [named] if isinstance(named, str) else list(named)
        roles.update({name: "classifier" for name in ran if name in heads})
    elif isinstance(holders[ran[-1]], nn.Linear):
        roles[ran[-1]] = "classifier"
    return roles


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """For every parameter, by id, the full names under which distinct modules hold it."""
    found: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return found


def _obstacle(module: nn.Module, name: str, shared: Mapping[int, Sequence[str]]) -> str:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    extra = sorted(set(module._parameters) - {"weight", "bias"})
    if extra:
        return f"it holds further parameters: {', '.join(extra)}"
    for key, parameter in module._parameters.items():
        own = f"{name}.{key}" if name else key
        others = [each for each in shared.get(id(parameter), ()) if each != own]
        if others:
            return f"its {key} is shared with {others[0]}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it carries hooks, which a new layer would lose"
    if "forward" in vars(module):
        return "its forward has been replaced on the instance"
    weight = module._parameters["weight"]
    if weight is not None and not weight.is_floating_point():
        return f"its weight is of type {weight.dtype}"
    return ""


def get_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of these names.

    Raises:
        GMError: there is no module of a name.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in known:
            raise GMError(f"the model has no module {name!r}; the nearest are {nearest_names(name, known)}")
    return {name: known[name] for name in names}


def replace(model: nn.Module, modules: Mapping[str, nn.Module], *, inplace: bool = False) -> nn.Module:
    """The model with other modules in the places named, wherever in it the old ones were reached; the rest is copied.

    Raises:
        GMError: a name does not exist, the model cannot be copied, or inplace=True would have to replace the root.

    >>> replace(nn.Sequential(nn.Linear(2, 2)), {"0": nn.Identity()})
    Sequential(
      (0): Identity()
    )
    """
    old = get_modules(model, modules)
    if not inplace:
        return duplicate(model, {id(old[name]): new for name, new in modules.items()})
    if any(each is model for each in old.values()):
        raise GMError(
            "the model itself is the layer to be replaced, which inplace=True cannot do; use the result's model"
        )
    new_by_id = {id(old[name]): new for name, new in modules.items()}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in new_by_id:
                parent._modules[key] = new_by_id[id(child)]
    return model
