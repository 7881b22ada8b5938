"""Trace and replace: which modules hold weights, in which order they run, and how one is put in another's place.

Knows modules, names and call sites, and no mathematics. Networks are analysed by running or tracing them and changed by
name, never by position in a graph. A weight has the name of its module where it is the parameter `weight`, and that of
the parameter otherwise: "head", "attention.in_proj_weight".
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .copies import check_distinct, duplicate, parameters_of, redirect_
from .errors import GMError, nearest_names
from .forward import Inputs, run_seeded, shell
from .kinds import check_registered, kind_of, rows_in_groups, taps_of, view_of
from .sharing import SharingModule
from .streams import seeded

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
HARMLESS = ("DataParallel", "OptimizedModule")  # around a part of a model
HOOKED = "_hf_hook"  # where accelerate keeps the hook that its forward of a module runs
UNHOOK = " by accelerate; accelerate.hooks.remove_hook_from_module(model, recurse=True) takes that back"

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TIED_HEAD = "output embedding"  # the role of an embedding that is the output head too


@dataclass(frozen=True)
class Site:
    """One weight matrix, with all the modules that hold it: the facts from which a plan is made.

    `shape` is (rows, columns, *taps); in a grouped convolution the columns are those of one of its `conv_groups`.
    `calls` counts runs in one forward pass, None where that is unknown. `role` is "stem", "classifier", "output
    embedding" (tied to an embedding) or "". `obstacle` says why it cannot be compressed, "" where it can; the shape is
    then that of the parameter. `aliases` are its other names, of tied weights those of all modules that hold them.
    `taps` says how the taps lie on a grid of two subgroups, where the module knows.
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
    taps: str = ""


@dataclass(frozen=True)
class Holder:
    """A module, its first name, and the name under which it holds a parameter, which may be computed."""

    path: str
    module: nn.Module
    key: str
    parameter: Tensor

    @property
    def name(self) -> str:
        """The name of the weight held."""
        return site_name(self.path, self.key)


def site_name(path: str, key: str) -> str:
    """The name of a weight: that of its module, or, where it is not called `weight`, its own.

    >>> site_name("attention", "in_proj_weight"), site_name("", "weight")
    ('attention.in_proj_weight', '')
    """
    return path if key == "weight" else f"{path}.{key}" if path else key


def check_model(model: nn.Module, *, meta: bool = False) -> None:
    """Refuse what cannot be analysed as a plain module; `meta` allows weights on meta.

    Raises:
        GMError: not a module, or modules that torch cannot tell apart; wrapped by DDP, FSDP, torch.compile or an EMA;
            scripted; or its weights are on meta or not yet initialised.
    """
    if not isinstance(model, nn.Module):
        raise GMError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    check_distinct(model)
    for name, module in model.named_modules():
        wrapper = type(module).__name__
        if wrapper in WRAPPERS and (not name or wrapper not in HARMLESS):
            where = f"its part {name!r}" if name else "the model"
            unwrapped = f"put its {WRAPPERS[wrapper]} in its place" if name else f"pass model{WRAPPERS[wrapper]}"
            raise GMError(f"{where} is wrapped in {wrapper}; unwrap it first: {unwrapped}")
    if isinstance(model, torch.jit.ScriptModule):
        raise GMError("the model is scripted; pass the nn.Module it was made from")
    for name, parameter in parameters_of(model).items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise GMError(f"{name!r} is not initialised yet; run the model once before")
        if type(parameter.data).__name__ == "DTensor":
            raise GMError(f"{name!r} is sharded (DTensor); gather the model's full parameters first")
        if parameter.is_meta and not meta:
            hooked = any(HOOKED in vars(each) for each in model.modules())
            remedy = f", put elsewhere{UNHOOK}" if hooked else "; load the weights first"
            raise GMError(f"{name!r} is on the meta device and holds no values{remedy}")


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
    found = holders(model)
    calls = _calls_by_run(model, inputs) if inputs is not None else _calls_by_fx(model)
    order = {name: at for at, name in enumerate(calls)} if calls is not None else {}
    plain = {each.path for held in found for each in held if each.key == "weight"}
    defined = {name: each for name, each in model.named_modules() if name in plain or _is_structured(each)}
    roles = _roles(model, defined, calls)
    sites = [_site(each, names, calls, roles) for each in found]
    first = [min(order.get(each.path, len(order)) for each in held) for held in found]
    return tuple(site for _, site in sorted(zip(first, sites, strict=True), key=lambda pair: pair[0]))  # stable


def holders(model: nn.Module) -> list[list[Holder]]:
    """For every parameter of at least two axes, in the order of definition, all the modules that hold it.

    Those not known as matrices are left out where all axes but one have size 1: they are vectors.

    Raises:
        GMError: a module has not the parameters that its class was registered with.
    """
    found: dict[int, list[Holder]] = {}
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):  # its module holds what is computed from these
            continue
        check_registered(module, {*module._parameters.keys(), *_computed(module)})  # keys: those of a scripted one
        held = {key: each for key, each in module._parameters.items() if each is not None}
        if parametrize.is_parametrized(module):
            held |= {key: _parametrized(module, key) for key in module.parametrizations}
        for key, parameter in held.items():
            if parameter.dim() < 2 or not parameter.numel():
                continue
            known = view_of(module, key, parameter) is not None
            if known or parameter.numel() > max(parameter.shape):
                found.setdefault(id(parameter), []).append(Holder(path, module, key, parameter))
    return list(found.values())


@torch.no_grad()
def _parametrized(module: nn.Module, key: str) -> Tensor:
    """The value of a parametrized parameter, found on a copy: computing it may change what it is computed from."""
    parametrizations: Any = module.parametrizations
    return copy.deepcopy(parametrizations[key]).eval()()


def _is_structured(module: nn.Module) -> bool:
    """Whether it is a layer, of those that can have a role, with a computed weight."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and "weight" in _computed(module)


def _computed(module: nn.Module) -> list[str]:
    """The names that a class computes: parametrized or structured weights."""
    return [name for cls in type(module).__mro__ for name, each in vars(cls).items() if isinstance(each, property)]


def _site(
    held: Sequence[Holder],
    names: Mapping[int, Sequence[str]],
    calls: Mapping[str, int] | None,
    roles: Mapping[str, str],
) -> Site:
    first = held[0]
    parameter = first.parameter
    view, whole = view_of(first.module, first.key, parameter), first.key == "weight" and len(held) == 1
    aliases = [site_name(path, each.key) for each in held for path in names[id(each.module)]]
    role = next((roles[each.name] for each in held if each.name in roles), "")
    if role and len(held) > 1 and any(isinstance(each.module, nn.Embedding | nn.EmbeddingBag) for each in held):
        role = TIED_HEAD
    own = sum(each.numel() for each in first.module.parameters(recurse=False))
    return Site(
        name=first.name,
        aliases=tuple(each for each in dict.fromkeys(aliases) if each != first.name),
        kind=kind_of(type(first.module)),
        shape=tuple(parameter.shape) if view is None else view.matrix_shape,
        conv_groups=rows_in_groups(first.module, first.key),
        parameters=own if whole else parameter.numel(),
        calls=None if calls is None else sum(calls.get(each, 0) for each in {each.path for each in held}),
        role=role,
        obstacle=next(filter(None, map(_obstacle, held)), ""),
        taps=taps_of(first.module, first.key),
    )


def find_weight(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the weight of this name, and the name of the parameter there.

    Raises:
        GMError: the model has no module or parameter of that name.
    """
    module = module_at(model, name)
    if module is not None:
        return module, "weight"
    path, _, key = name.rpartition(".")
    module = module_at(model, path)
    if module is not None and module._parameters.get(key) is not None:
        return module, key
    return get_modules(model, [name])[name], "weight"  # tells the nearest names


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module of this name, None where there is none."""
    found: nn.Module | None = model
    for each in path.split(".") if path else ():
        found = None if found is None else found._modules.get(each)
    return found


def read_weight(model: nn.Module, name: str) -> Tensor | None:  # (rows, columns, *taps)
    """The dense matrix of this name, detached; None where the module of this name holds none.

    Raises:
        GMError: the model has no module or parameter of that name.

    >>> read_weight(nn.ConvTranspose1d(8, 4, 3), "").shape
    torch.Size([4, 8, 3])
    """
    module, key = find_weight(model, name)
    parameter = module._parameters.get(key)
    view = None if parameter is None else view_of(module, key, parameter)
    return None if parameter is None or view is None else view.matrix(parameter.detach())


@torch.no_grad()
def write_weight(model: nn.Module, name: str, matrix: Tensor) -> None:
    """Set the values of a dense parameter to those of a matrix (rows, columns, *taps)."""
    module, key = find_weight(model, name)
    parameter = module.get_parameter(key)
    view = view_of(module, key, parameter)
    assert view is not None, "what is planned is known to be a matrix"
    parameter.copy_(view.parameter(matrix.to(parameter)))


def conv_groups_of(model: nn.Module, name: str) -> int:
    """The convolution groups in which the rows of the matrix of this name are."""
    return rows_in_groups(*find_weight(model, name))


def _calls_by_run(model: nn.Module, inputs: Inputs) -> Counter[str]:
    """How often each module runs, in order of first call, seen by hooks on a shell of the model."""
    calls: Counter[str] = Counter()
    watched = shell(model, private=True)
    count_calls(watched, calls)
    run_seeded(watched, inputs)
    return calls


def count_calls(model: nn.Module, calls: Counter[str]) -> None:
    """Count the calls of every module by name from now on, in order of the first; scripted ones take no hook."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.update([name]))


class Tracer(fx.Tracer):
    """torch.fx as torchvision and timm use it: what timm marks as untraceable stays a leaf, as structured layers do."""

    def __init__(self) -> None:
        from timm.models import get_notrace_functions

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        from timm.models import is_notrace_module

        whole = isinstance(m, SharingModule) or is_notrace_module(type(m))
        return whole or super().is_leaf_module(m, module_qualified_name)


def _calls_by_fx(model: nn.Module) -> Counter[str] | None:
    """How often each leaf module is called in the graph that torch.fx sees, or None where it cannot trace."""
    try:
        with seeded(model):  # what its code draws as it is traced
            graph = Tracer().trace(shell(model))
    except Exception:  # control flow, unusual arguments: the caller goes on from the modules alone
        return None
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def _roles(model: nn.Module, layers: Mapping[str, nn.Module], calls: Mapping[str, int] | None) -> dict[str, str]:
    """The stem is the convolution that runs first; the classifier is what timm says, else the last layer, if linear."""
    ran = [name for name in (layers if calls is None else calls) if name in layers]
    if len(ran) < 2:
        return {}
    roles = {}
    if isinstance(layers[ran[0]], nn.Conv1d | nn.Conv2d | nn.Conv3d):
        roles[ran[0]] = "stem"
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, Mapping) else None
    if named:
        heads = [named] if isinstance(named, str) else list(named)
        roles.update({name: "classifier" for name in ran if name in heads})
    elif isinstance(layers[ran[-1]], nn.Linear):
        roles[ran[-1]] = "classifier"
    return roles


def _obstacle(holder: Holder) -> str:
    """Why a parameter cannot become structured in this module; "" where it can."""
    module, key, parameter = holder.module, holder.key, holder.parameter
    name = type(module).__name__
    if parametrize.is_parametrized(module):
        which = key if parametrize.is_parametrized(module, key) else " and ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"its {which} is parametrized; remove the parametrization first"
    source = key.rpartition("_")[0]
    if isinstance(vars(module).get(source), Tensor):
        return f"{source} is computed from it by weight_norm, spectral_norm or pruning; remove that first"
    if isinstance(module, torch.jit.ScriptModule):
        return "its module is scripted, whose code is fixed"
    if isinstance(module, nn.RNNBase):
        return f"{name} hands its weights to torch as one flat list, in which none can be replaced"
    if view_of(module, key, parameter) is None:
        if isinstance(module, SharingModule):
            return f"it is a stored part of {name}, which has a structure already"
        return f"{key} of {name} is not known to be a matrix; gmcompress.register can say so"
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return f"{name} is a container, which would take the stored parts for one of its modules"
    if _has_other_forward(module):
        return f"its forward has been replaced on the instance{UNHOOK if HOOKED in vars(module) else ''}"
    if parameter.dtype not in FLOATS:
        return f"its {key} is of type {parameter.dtype}"
    if parameter.layout is not torch.strided:
        return f"its {key} is a sparse tensor"
    if type(parameter.data) is not Tensor:
        return f"its {key} is a {type(parameter.data).__name__}, which only its own code can read"
    if getattr(module, "sparse", False) is True:
        return "its gradients are sparse, which those of a computed weight cannot be"
    return ""


def _has_other_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's own, which is what takers back of another leave."""
    forward = vars(module).get("forward")
    is_own = isinstance(forward, MethodType) and forward.__func__ is type(module).forward
    return forward is not None and not (is_own and forward.__self__ is module)


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
    """The model with other modules in the places named, wherever it holds the old ones; the rest is copied.

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
    redirect_(model, {id(old[name]): new for name, new in modules.items()})
    return model
