"""Refit the layers of a block together, to the outputs of the dense block on calibration data.

Layers that were fitted one after another do not know of each other, nor of the shortcut around them. So the parameters
of a block's structured layers, its biases and its norms follow, all at once and in evaluation mode, what the dense
block gives on the dense model's data, from the inputs that the compressed model gives it. Blocks run in their order.
Errors are weighted by what they cost at the outputs of the model. What does not help on held-out examples is taken
back.
Source: Li et al. 2021, BRECQ (there for quantisation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .attaching import structured
from .batches import count_examples, first_examples, is_divisible
from .calibration import divergence, outputs
from .copies import evaluating, keeping_modes, parameters_of
from .forward import Inputs, ungraded
from .nesting import describe, floating, own_copy
from .notes import Notes
from .sensitivity import sensitivities
from .streams import seeded
from .tuning.losses import find_blocks

SIZE = 32  # examples of one step, at most
HELD_OUT = 10  # one step in so many judges
WORK = 5e12  # multiply-adds of the steps of all blocks
PASSES = 6  # over the data, at most
FEWEST = 64  # examples, below which nothing is refitted
SENSED = 256  # examples on which it is measured what errors cost
MEMORY = 3e9  # bytes of inputs and outputs held at once
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of Adam, one of which a trial chooses
TRIAL = 12  # steps of the trial at each rate
TRIED = 3  # blocks whose trials speak for the others, where each would cost more than the steps it is for
LONGER = 3.0  # times as large a rate as the best of so few steps is best for many, of more than all trials have
LOWER = 3.0  # times smaller is the rate that is tried where another did harm
SHARES = (0.85, 0.75, 0.5, 0.25)  # of the way that blocks went: the whole can suit the data of the steps too well

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Refit:
    """What refitting one block came to: its relative weighted squared error on held-out batches before and after.

    `rate` is 0.0, and after is before, where the block was better left as it was.
    """

    block: str
    before: float
    after: float
    rate: float


@dataclass(frozen=True)
class _Step:
    """Some examples on their way through a block: what the compressed block is given, and what the dense one gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[Tensor]


def refit_blocks(
    dense: nn.Module,  # in evaluation mode; not changed
    small: nn.Module,  # the compressed model, whose parameters are changed
    batches: Sequence[Inputs],
    *,
    macs: int,  # of one example through the dense model
    logits: bool,  # whether the model's outputs are
    effort: float = 1.0,
    seed: int = 0,
    notes: Notes | None = None,
    kind: str = "block",  # of the notes
    progress: Progress | None = None,
) -> list[Refit]:
    """Refit block after block; a block that cannot be run by itself, or is run more than once, is left as it is.

    Each goes back part of the way where held-out examples bear that out; in the end all do together where that brings
    the outputs nearer to the dense model's, and the whole way where nothing else does. Nothing happens in half
    precision, with fewer than FEWEST examples, or where running these would cost too much.
    """
    examples = sum(map(count_examples, batches))
    affordable = int(effort * WORK / max(1, 3 * macs))  # examples through all blocks, forward and backward
    if min(examples, affordable) < FEWEST or any(each.dtype != torch.float32 for each in parameters_of(small).values()):
        return []
    pieces = _pieces(first_examples(batches, affordable))
    if len(pieces) < HELD_OUT:
        return []
    held, parameters = pieces[HELD_OUT // 2 :: HELD_OUT], list(parameters_of(small).values())
    had = [each.detach().clone() for each in parameters]
    with keeping_modes(small):
        evaluating(small)
        wanted = outputs(dense, held)

        def judge() -> float:
            return divergence(wanted, outputs(small, held), logits=logits)

        before = judge()
        walk = _Walk(dense, small, pieces)
        names = walk.order(find_blocks(small))
        weights = sensitivities(dense, pieces[: -(-SENSED // SIZE)], names, logits=logits, seed=seed)
        work = partial(_refit, passes=max(1, min(PASSES, affordable // examples)), seed=seed)
        done = _in_order(walk, names, weights, work, notes or Notes(None, {}), kind, progress)
        if done and not _shorten(parameters, had, before, judge) < before:
            done = [replace(each, after=each.before, rate=0.0) for each in done]
    return done


def _in_order(
    walk: _Walk,
    names: Sequence[str],
    weights: Mapping[str, Sequence[Tensor]],  # of errors, by block
    work: Callable[..., Refit | None],
    notes: Notes,
    kind: str,
    progress: Progress | None,
) -> list[Refit]:
    """The blocks refitted one after another, those done before as the notes have them."""
    done: list[Refit] = []
    for name in names:
        if progress is not None:
            progress(name, len(done), len(names))
        block, tensors = walk.models[1].get_submodule(name), _free(walk.models[1], name)
        kept = notes.read(kind, name)
        if kept is not None:
            _put(tensors.values(), [kept[1][key] for key in tensors])
            done.append(Refit(name, **kept[0]))
        elif tensors and (steps := walk.steps(name)):
            helped = [each.rate for each in done if each.rate > 0]
            found = work(name, block, list(tensors.values()), steps, _Measure(steps, weights.get(name)), helped)
            if found is not None:
                done.append(found)
                facts = {key: getattr(found, key) for key in ("before", "after", "rate")}
                notes.write(kind, name, facts, {key: each.detach() for key, each in tensors.items()})
        walk.leave(name)
    return done


@torch.no_grad()
def _put(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for each, value in zip(tensors, values, strict=True):
        each.copy_(value)


@torch.no_grad()
def _shorten(tensors: Sequence[Tensor], start: Sequence[Tensor], before: float, judge: Callable[[], float]) -> float:
    """Move tensors to the best place on the way from their start; the error there, `before` where it is the start."""
    ends = [each.detach().clone() for each in tensors]
    best, least = ends, judge()
    for share in SHARES:
        between = [old.lerp(new, share) for old, new in zip(start, ends, strict=True)]
        _put(tensors, between)
        if not (lost := judge()) < least:
            break
        best, least = between, lost
    moved = least < before
    _put(tensors, best if moved else start)
    return least if moved else before


def _free(small: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of a block that may follow: of structured weights, and vectors; none that lives elsewhere too."""
    block = small.get_submodule(name)
    inside = {id(each) for each in block.modules()}
    outside = {id(p) for m in small.modules() if id(m) not in inside for p in m._parameters.values() if p is not None}
    parts = {id(each) for layer in structured(block).values() for each in layer.parts().values()}
    found = {key: each for key, each in parameters_of(block).items() if id(each) in parts or each.dim() == 1}
    return {key: each for key, each in found.items() if id(each) not in outside}


def _refit(
    name: str,
    block: nn.Module,
    parameters: Sequence[Tensor],
    steps: Sequence[_Step],
    measure: _Measure,
    helped: Sequence[float],
    *,
    passes: int,
    seed: int,
) -> Refit | None:
    """Adam with a rate from a trial, falling to zero; undone where held-out steps do not bear it out.

    The rates that `helped` the blocks before speak for this one where a trial would cost more than the steps do; a rate
    that does harm gives way to a lower one. None where the block does not give what the dense one gives, since what
    runs inside depends on values.
    """
    held = steps[HELD_OUT // 2 :: HELD_OUT]
    used = [each for index, each in enumerate(steps) if index % HELD_OUT != HELD_OUT // 2]
    descent = _Descent(block, parameters, used, held, measure, torch.Generator().manual_seed(seed))
    try:
        before = descent.judge()
    except Exception:  # such as outputs of other shapes than those wanted
        descent.close()
        return None
    after, rate = before, 0.0
    try:
        count = len(used) * passes
        few = count < TRIAL * len(RATES)
        if few and len(helped) >= TRIED:
            rate = median_low(helped)
        else:
            rate = (1.0 if few else LONGER) * descent.choose(before, min(TRIAL, count))
        after = descent.arrive(rate, count, before)
        if not after < before:
            rate /= LOWER
            after = descent.arrive(rate, count, before)
    except Exception:  # of any kind: what gives no gradients is left as it was
        pass
    finally:
        if not after < before:
            descent.start_again()
            after, rate = before, 0.0
        descent.close()
    return Refit(name, before, after, rate)


class _Descent:
    """Steps of Adam on the parameters of a block."""

    def __init__(
        self,
        block: nn.Module,
        parameters: Sequence[Tensor],
        used: Sequence[_Step],
        held: Sequence[_Step],
        measure: _Measure,
        generator: torch.Generator,
    ) -> None:
        self.block, self.parameters, self.used, self.held = block, list(parameters), used, held
        self.measure, self.generator = measure, generator
        self.start = [each.detach().clone() for each in parameters]
        self.flags = [each.requires_grad for each in parameters]
        for each in parameters:
            each.requires_grad_(True)

    def choose(self, before: float, count: int) -> float:
        """The rate that is best after a few steps; larger ones than the first that does harm are not tried."""
        found: dict[float, float] = {}
        for rate in RATES:
            lost = self.run(rate, count)
            self.start_again()
            found[rate] = lost if lost == lost else float("inf")
            if not lost < 1.05 * before:
                break
        return min(found, key=lambda each: found[each])

    def run(self, rate: float, count: int) -> float:
        """The error on the held-out steps after so many steps, the rate rising and falling in one cycle."""
        optimizer = torch.optim.Adam(self.parameters, lr=rate)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=count + 1, pct_start=0.1)
        order: list[int] = []
        for _ in range(count):
            order = order or torch.randperm(len(self.used), generator=self.generator, device="cpu").tolist()
            optimizer.zero_grad()
            self.measure(self.block, self.used[order.pop()]).backward()
            optimizer.step()
            cycle.step()
        return self.judge()

    def arrive(self, rate: float, count: int, before: float) -> float:
        """The error after so many steps, or back on the way where it is less; `before` at the start."""
        self.run(rate, count)
        return _shorten(self.parameters, self.start, before, self.judge)

    @torch.no_grad()
    def judge(self) -> float:
        """The error on the held-out steps."""
        return float(torch.stack([self.measure(self.block, each) for each in self.held]).mean())

    @torch.no_grad()
    def start_again(self) -> None:
        """Every parameter as it was."""
        for each, value in zip(self.parameters, self.start, strict=True):
            each.copy_(value)

    def close(self) -> None:
        """No gradients stay, and what was frozen is frozen."""
        for each, flag in zip(self.parameters, self.flags, strict=True):
            each.requires_grad_(flag)
            each.grad = None


class _Measure:
    """The squared error of a block's outputs, each entry weighted by what it costs, relative to that of their mean."""

    def __init__(self, steps: Sequence[_Step], weights: Sequence[Tensor] | None) -> None:
        outputs = list(zip(*(each.wanted for each in steps), strict=True))
        fitting = weights is not None and [w.shape for w in weights] == [values[0].shape[1:] for values in outputs]
        self.weights: list[Tensor | float] = list(weights) if weights is not None and fitting else [1.0] * len(outputs)
        self.spread = []
        for values, weight in zip(outputs, self.weights, strict=True):
            mean = torch.stack([each.mean(0) for each in values]).mean(0)
            square = torch.stack([(weight * (each - mean).square()).mean() for each in values]).mean()
            self.spread.append(max(float(square), 1e-20))

    def __call__(self, block: nn.Module, step: _Step) -> Tensor:  # ()
        found = floating(block(*own_copy(step.args), **own_copy(step.kwargs)))
        errors = [
            (weight * (ours - wanted).square()).mean() / scale
            for ours, wanted, weight, scale in zip(found, step.wanted, self.weights, self.spread, strict=True)
        ]
        return torch.stack(errors).mean()


def _pieces(batches: Sequence[Inputs]) -> list[Inputs]:
    """Batches in pieces of about equal size of at most SIZE examples."""
    found: list[Inputs] = []
    for batch in batches:
        if not is_divisible(batch):
            found.append(batch)
            continue
        leaves, form = tree_flatten(batch)
        count = -(-count_examples(batch) // SIZE)
        parts = [each.tensor_split(count) if isinstance(each, Tensor) else [each] * count for each in leaves]
        found.extend(tree_unflatten(list(each), form) for each in zip(*parts, strict=True))
    return found


class _LeftError(Exception):
    """The run of a model may end here."""


def _given(model: nn.Module, name: str, piece: Inputs, seed: int) -> tuple[Any, Any] | None:
    """The arguments that a module of a model is given; None where it is not called."""
    found: list[tuple[Any, Any]] = []

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((own_copy(args), own_copy(kwargs)))
        raise _LeftError

    handle = model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with seeded(model, seed):
            ungraded(model, piece)
    except _LeftError:
        pass
    finally:
        handle.remove()
    return found[0] if found else None


class _Walk:
    """Inputs and outputs of one block after the other, with as few runs of the whole models as possible.

    Where a block is given just what the one before it gave, both are run by themselves.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, pieces: Sequence[Inputs]) -> None:
        self.models, self.pieces = (dense, small), pieces
        self.next: dict[str, str] = {}  # block -> the one that is given its output and nothing else
        self.at = ""
        self.given: list[list[tuple[Any, Any]]] = []  # at the present block, by model and piece

    def order(self, names: Sequence[str]) -> list[str]:
        """The blocks that run just once, in their order."""
        seen: list[tuple[str, Any, Any, Any]] = []

        def noting(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                inside = any(map(is_functorch_wrapped_tensor, floating(output)))  # of vmap, and of no use outside
                seen.append((name, args, kwargs, None if inside else output))

            return hook

        with ExitStack() as stack, seeded(self.models[0]):
            for name in names:
                module = self.models[0].get_submodule(name)
                stack.callback(module.register_forward_hook(noting(name), with_kwargs=True).remove)
            ungraded(self.models[0], self.pieces[0])
        for (before, _, _, output), (name, args, kwargs, _) in pairwise(seen):
            if isinstance(output, Tensor) and len(args) == 1 and args[0] is output and not kwargs:
                self.next[before] = name
        counts = Counter(name for name, *_ in seen)
        return [name for name, *_, output in seen if counts[name] == 1 and floating(output)]

    def steps(self, name: str) -> list[_Step]:
        """What a block of the compressed model is given, and what that of the dense one gives.

        None if that is too large, or where the block does not run by itself, or the two do not match, since what runs
        depends on values.
        """
        if self.at != name:
            self.at, self.given = "", [[], []]
            for number, piece in enumerate(self.pieces):
                for model, found in zip(self.models, self.given, strict=True):
                    given = _given(model, name, piece, number)
                    if given is None:
                        return []
                    found.append(given)
                one = sum(each.numel() * each.element_size() for each in floating([each[0] for each in self.given]))
                if 2 * one * len(self.pieces) > MEMORY:
                    return []
            self.at = name
        dense = self.models[0].get_submodule(name)
        try:
            with torch.no_grad():
                wanted = [floating(dense(*own_copy(args), **own_copy(kwargs))) for args, kwargs in self.given[0]]
        except Exception:  # of any kind, from code that counts on what runs around the block
            self.at = ""
            return []
        alike = all(describe(old) == describe(new) for old, new in zip(*self.given, strict=True))
        if not alike or len({tuple(each.shape[1:] for each in values) for values in wanted}) > 1:
            return []
        return [_Step(*given, each) for given, each in zip(self.given[1], wanted, strict=True)]

    @torch.no_grad()
    def leave(self, name: str) -> None:
        """Go on to the next block, if this one gives it all that it is given."""
        after = self.next.get(name, "")
        if not after or self.at != name:
            return
        self.at = ""
        with suppress(Exception):  # of code that counts on what runs around the block
            for model, found in zip(self.models, self.given, strict=True):
                block = model.get_submodule(name)
                found[:] = [((block(*own_copy(args), **own_copy(kwargs)),), {}) for args, kwargs in found]
            self.at = after
