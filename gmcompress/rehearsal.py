"""Rehearse a compression: which weights the model's code takes computed, found by running it with all of them so.

A model may ask for the very type of a layer, unpack its parameters, write into them or keep them elsewhere. So before
anything is planned the weights are changed, once where they are, and once as structured weights of the trivial group
with a residual, which hold any matrix. Where the second model does not run, or computes something else, a layer has to
stay dense; so has one whose module runs without reading the weight. Without inputs to run it on the code is followed by
torch.fx, where that can: code that reads a weight otherwise than as an attribute of its module sees no computed one.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from dataclasses import replace as changed
from threading import get_ident
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from .attaching import empty, exchange
from .copies import duplicate, evaluating, parameters_of, state_of
from .errors import GMError, said
from .forward import Inputs, run_seeded, shell
from .layers import GMLayer, GMWeight
from .nesting import describe, laid_open
from .streams import seeded
from .surgery import Site, Tracer, count_calls, find_weight, holders, read_weight, trace, write_weight

ANY = "C1+lowrank:1"  # what all matrices are; who computes with the stored tensors instead finds other products
EVALUATION, TRAINING, CHANGED = "evaluation", "training", "changed to training and not run"
MODES = ((EVALUATION, TRAINING, EVALUATION), (EVALUATION, CHANGED, EVALUATION), (EVALUATION,))  # the first that works
RUNS = 60  # of a model that refuses some weights, at most; those that are not sorted by then stay dense
REFUSED = "the model's code does not take a computed weight here: "
ELSEWHERE = "with a computed weight here the model's outputs change, so its code gets at the weight on a way of its own"
ASIDE = "the model's code gets at the weight on a way of its own, such as a loop over all parameters"
UNREAD = "its module runs without reading it, so its code keeps what it once made of it"


def rehearsed_sites(model: nn.Module, inputs: Inputs | None) -> tuple[Site, ...]:
    """The sites of `trace`, with an obstacle where the model does not run with a computed weight as with a dense one.

    Without inputs there is no rehearsal, and torch.fx tells what it can.

    Raises:
        GMError: as `trace`.

    >>> class Picky(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.free, self.picky = nn.Linear(4, 4), nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         assert type(self.picky) is nn.Linear
    ...         return self.picky(self.free(x))
    >>> [(site.name, site.obstacle) for site in rehearsed_sites(Picky(), torch.ones(2, 4))]
    [('free', ''), ('picky', "the model's code does not take a computed weight here: AssertionError")]
    """
    sites = trace(model, inputs)
    free = [site for site in sites if not site.obstacle]
    if not free:
        return sites
    if inputs is None:
        aside = _read_aside(model)
        return tuple(changed(each, obstacle=each.obstacle or ASIDE * (each.name in aside)) for each in sites)
    refused = dict.fromkeys(_unread(model, inputs, free), UNREAD)
    if names := [site.name for site in free if site.name not in refused]:
        rehearsal = _Rehearsal.of(model, inputs, names)
        rehearsal.take(names)
        refused |= rehearsal.refused
    return tuple(changed(site, obstacle=refused.get(site.name, site.obstacle)) for site in sites)


class _Reads(TorchDispatchMode):
    """Notes which parameters of a model, by the memory of their values, any operation takes.

    Reading a shape or a dtype is none, nor is making a view or a tensor of the same kind.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: dict[int, list[str]] = {}
        for name, each in parameters_of(model).items():
            self.names.setdefault(_memory(each), []).append(name)
        self.seen: set[str] = set()

    def note(self, taken: Any) -> None:
        for each in tree_leaves(taken):
            if isinstance(each, Tensor):
                self.seen.update(self.names.get(_memory(each), ()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or name.startswith("new_") or name.endswith("_like")):
            self.note((args, kwargs))
        return func(*args, **(kwargs or {}))


class _Following(Tracer):
    """Notes which parameters come into a graph on other ways than as an attribute of their module."""

    def __init__(self, reads: _Reads) -> None:
        super().__init__()
        self.reads = reads

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            self.reads.note(a)
        return super().create_arg(a)


def _memory(tensor: Tensor) -> int:
    """What tells the memory of a tensor's values from that of others, a view's being that of the whole."""
    try:
        return tensor.untyped_storage()._cdata
    except Exception:  # of sparse and other tensors without
        return id(tensor)


def watch(model: nn.Module, inputs: Inputs) -> tuple[Counter[str], set[str]] | None:
    """How often each module runs, and which parameters are read; None where the model does not run when watched.

    So it is too where it runs modules in threads of its own, in which no mode sees what is read.

    Raises:
        GMError: the model cannot be copied.
    """
    calls: Counter[str] = Counter()
    watched = shell(model)
    count_calls(watched, calls)
    reads, threads = _Reads(watched), {get_ident()}
    for each in watched.modules():
        if not isinstance(each, torch.jit.ScriptModule):
            each.register_forward_pre_hook(lambda *_: threads.add(get_ident()))
    try:
        with reads:
            run_seeded(watched, inputs)
    except GMError:  # it ran without, so some operation does not take part in a dispatch mode
        return None
    return None if len(threads) > 1 else (calls, reads.seen)


def _unread(model: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> set[str]:
    """The sites whose modules run without reading the weight, as those do that keep what they made of it once."""
    watched = watch(model, inputs)
    if watched is None:
        return set()
    read = {id(each) for name, each in parameters_of(model).items() if name in watched[1]}
    return {site.name for site in sites if site.calls and id(_parameter(model, site.name)) not in read}


def _read_aside(model: nn.Module) -> set[str]:
    """The weights that code reads otherwise than as attributes, as far as torch.fx can follow it."""
    followed = shell(model)
    reads = _Reads(followed)
    with suppress(Exception), seeded(followed), reads:  # control flow, unusual arguments
        _Following(reads).trace(followed)
    read = {id(each) for name, each in parameters_of(followed).items() if name in reads.seen}
    return {held[0].name for held in holders(followed) if id(held[0].parameter) in read}


@dataclass
class _Rehearsal:
    """A model, a copy in which all weights are changed, what that computes, and what was found out so far."""

    model: nn.Module
    twin: nn.Module
    offsets: Mapping[str, float]  # what the residual of a stand-in is everywhere
    inputs: Inputs
    expected: Any
    repeats: bool  # whether a second run of the twin gives the same
    modes: Sequence[str]  # in which it is run
    stores: bool  # whether it can give its state
    taken: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, inputs: Inputs, names: Sequence[str]) -> _Rehearsal:
        twin = evaluating(duplicate(model, {}))
        for each in parameters_of(twin).values():
            each.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        offsets = {}
        for name in names:
            weight = read_weight(twin, name)
            assert weight is not None, "a site without an obstacle holds a matrix"
            factors = 0.5 + torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            scaled = weight * factors.to(weight)
            # a power of two so large that the kernel of a stand-in and its residual add up without rounding
            offsets[name] = 2.0 ** (1 + math.frexp(float(scaled.abs().nan_to_num(0.0, 0.0).max()))[1])
            write_weight(twin, name, (scaled - offsets[name]) + offsets[name])
        for modes in MODES if has_modes(twin) else MODES[-1:]:
            try:  # copies, since a model may write into its weights
                expected, again = (_outputs(duplicate(twin, {}), inputs, modes) for _ in range(2))
            except Exception:  # a batch may be too small for training, labels be missing, or a `train` take no mode
                if modes == MODES[-1]:
                    raise
                continue
            if repeats := agree(expected, again):
                break
        return cls(model, twin, offsets, inputs, expected, repeats, modes, stores=_has_state(twin))

    def take(self, names: Sequence[str]) -> None:
        """Sort weights into those that the model takes computed, beside the ones taken before, and the others."""
        if self.runs == RUNS:
            self.refused |= dict.fromkeys(names, f"{REFUSED}nor does it take most others")
            return
        problem = self._problem([*self.taken, *names])
        if not problem:
            self.taken += names
        elif len(names) == 1:
            self.refused[names[0]] = problem
        else:
            self.take(names[: len(names) // 2])
            self.take(names[len(names) // 2 :])

    def _problem(self, names: Sequence[str]) -> str:
        """What happens when these weights are computed and the others are dense; "" where nothing does."""
        self.runs += 1
        try:
            small = self._computed(names)
        except GMError as problem:  # of a class that can have no subclass
            return str(problem)
        try:
            found = _outputs(small, self.inputs, self.modes)
            if self.stores:
                state_of(small)
        except Exception as problem:  # of any kind, from hooks on the state
            return REFUSED + said(problem.__cause__ or problem)
        return "" if not self.repeats or agree(found, self.expected) else ELSEWHERE

    def _computed(self, names: Sequence[str]) -> nn.Module:
        """The model with these weights computed and changed, and all others changed.

        What is reached otherwise than through the modules is not changed, by which that is found out.
        """
        kept = {id(_parameter(self.model, name)) for name in names}
        pairs = zip(*(parameters_of(each).values() for each in (self.model, self.twin)), strict=True)
        memo = {id(old): nn.Parameter((old if id(old) in kept else new).detach(), False) for old, new in pairs}
        copied = evaluating(duplicate(self.model, memo))
        return exchange(copied, {name: self._stand_in(copied, name) for name in names})

    def _stand_in(self, copied: nn.Module, name: str) -> GMLayer:
        layer, weight = empty(copied, name, ANY), read_weight(self.twin, name)
        assert weight is not None
        parts = layer.requires_grad_(False).parts()
        parts["kernel"].copy_((weight - self.offsets[name]).reshape(parts["kernel"].shape))
        parts["left"].fill_(self.offsets[name])
        parts["right"].fill_(1.0)
        if not isinstance(layer, GMWeight):
            layer.register_parameter("bias", find_weight(copied, name)[0]._parameters["bias"])
        return layer.eval()


def _parameter(model: nn.Module, name: str) -> Tensor:
    module, key = find_weight(model, name)
    return module.get_parameter(key)


def _outputs(model: nn.Module, inputs: Inputs, modes: Sequence[str]) -> list[Any]:
    """What the model returns, in one mode after another; what it writes into its weights at one shows in the next."""
    found = []
    with warnings.catch_warnings():
        if TRAINING in modes:
            warnings.simplefilter("ignore")
        for mode in modes:
            if mode == EVALUATION:
                evaluating(model)
            else:
                model.train()
            if mode != CHANGED:
                found.append(run_seeded(model, inputs))
    return found


def training_problem(dense: nn.Module, small: nn.Module, inputs: Inputs) -> str:
    """Why a compressed model does not run in training mode where the dense one does; "" where it does.

    Both are run only where code tells the modes apart, as where a copy of some layers follows them in training.
    """
    if not has_modes(dense):
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in (dense, small):
            try:
                trained = duplicate(each, {})
                trained.train()
                run_seeded(trained, inputs)
            except Exception as problem:  # a batch may be too small for training, labels be missing
                return "" if each is dense else said(problem.__cause__ or problem)
    return ""


def has_modes(model: nn.Module) -> bool:
    """Whether code other than torch's own does something at a change of mode, or asks for it.

    >>> has_modes(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    False
    """
    classes = {cls for each in model.modules() for cls in type(each).__mro__}
    return any(map(_asks_for_mode, (cls for cls in classes if not cls.__module__.startswith("torch."))))


def _asks_for_mode(cls: type) -> bool:
    if "train" in vars(cls):
        return True
    functions = (inspect.unwrap(each) for each in vars(cls).values() if isinstance(each, FunctionType))
    codes = [each.__code__ for each in functions if isinstance(each, FunctionType)]
    while codes:
        code = codes.pop()
        if "training" in code.co_names:
            return True
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return False


def _has_state(model: nn.Module) -> bool:
    try:
        return bool(state_of(model))
    except Exception:
        return False


def agree(found: Any, expected: Any) -> bool:
    """Whether outputs have one nesting and one set of shapes, and are equal up to rounding.

    >>> agree({"y": torch.ones(2)}, {"y": torch.ones(2)}), agree([torch.ones(2)], [torch.zeros(2)])
    (True, False)
    """
    (new, new_form), (old, old_form) = (tree_flatten(laid_open(each)) for each in (found, expected))
    if new_form != old_form or describe(new) != describe(old):
        return False
    return all(
        _near(a.detach(), b.detach())
        for a, b in zip(new, old, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )


def _near(found: Tensor, expected: Tensor) -> bool:
    if found.is_nested and expected.is_nested:
        found, expected = (each.to_padded_tensor(0.0) for each in (found, expected))
    if found.dtype != expected.dtype or found.layout is not torch.strided or not expected.dtype.is_floating_point:
        return found.dtype == expected.dtype  # labels and the like, which follow from the rest
    finite = torch.isfinite(expected)
    if not finite.any():
        return True
    wide = expected.double()[finite]
    allowed = min(0.1, 10 * math.sqrt(torch.finfo(expected.dtype).eps)) * float(wide.abs().max())
    return bool(((found.double()[finite] - wide).abs() <= allowed).all())
