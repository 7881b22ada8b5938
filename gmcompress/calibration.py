"""What data says about a model's layers: second moments of their inputs and output gradients, and the mean shifts.

Inputs are seen through hooks on the modules by name, so that any model that runs can be calibrated. A layer that is
never called (its weight is read by other code) has no moments, and is fitted without data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # one inside of vmap is of no use outside

from .batches import split_batch
from .errors import GMError
from .surgery import Inputs, call, describe, floating, run

POSITIONS = 60  # input vectors per dimension of a moment, beyond which positions are drawn at random
CHUNK = 1 << 24  # numbers of one unfolded piece of a convolution's input
BACKWARD = 2_500_000  # numbers of input in one backward pass
DAMPING = 1e-3  # of the mean of a moment's diagonal, added to the diagonal
TRUST = (0.0, 0.03, 0.3, 3.0)  # ridges under which targets are tried on examples held out, shares of the diagonal


@dataclass(frozen=True)
class Moments:
    """Sums over a layer's input vectors x (of the compressed model) and t (of the dense one), each of `size` numbers.

    For a convolution a vector is one patch, in the order of the weight; a grouped convolution has one sum per group.
    `inputs` is Σ x xᵀ and `cross` Σ t xᵀ, both (conv_groups, m, m) and divided by `count`; the means are (conv_groups,
    m). `halves` are the moments of every other batch, where there are two or more.
    """

    count: int
    inputs: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor
    halves: tuple[Moments, ...] = ()

    def centred(self) -> Moments:
        """The same with the means taken away: what counts where a bias or BatchNorm absorbs the mean."""
        inputs = self.inputs - self.mean[:, :, None] * self.mean[:, None]
        cross = self.cross - self.dense_mean[:, :, None] * self.mean[:, None]
        halves = tuple(each.centred() for each in self.halves)
        return Moments(self.count, inputs, cross, self.mean, self.dense_mean, halves)

    def gram(self) -> Tensor:  # (conv_groups, m, m)
        """Σ x xᵀ, damped, and shrunk towards its diagonal where there are few vectors for its size."""
        m = self.inputs.shape[1]
        diagonal = torch.diag_embed(self.inputs.diagonal(dim1=1, dim2=2))
        few = m / (m + self.count)
        return (1 - few) * self.inputs + few * diagonal + self._ridge()

    def _ridge(self) -> Tensor:
        size = self.inputs.diagonal(dim1=1, dim2=2).mean()
        size = size if float(size) > 0 else torch.ones_like(size)
        return DAMPING * size * torch.eye(self.inputs.shape[1], dtype=self.inputs.dtype, device=self.inputs.device)

    def target(self, weight: Tensor) -> Tensor:  # (rows, columns, *taps), same
        """The dense weight that best reproduces the dense layer's outputs from the compressed model's inputs.

        W* = W (C + R)(S + R)⁻¹: ‖W t − Ŵ x‖² is ‖(W* − Ŵ) S^½‖² and a part that no Ŵ changes. The ridge R is the one
        of TRUST, or so large that W* = W, whose targets err least when each half of the batches judges the other's:
        vectors of one example resemble each other, so that their number does not tell how far to trust them.
        """
        if not self.halves:
            return self._target(weight, TRUST[0])
        one, other = self.halves
        errors = {ridge: other._error(weight, one._target(weight, ridge)) for ridge in TRUST}
        errors = {ridge: lost + one._error(weight, other._target(weight, ridge)) for ridge, lost in errors.items()}
        best = min(errors, key=lambda ridge: errors[ridge])
        kept = one._error(weight, weight) + other._error(weight, weight)
        return weight if kept <= errors[best] else self._target(weight, best)

    def _target(self, weight: Tensor, ridge: float) -> Tensor:
        groups, m = self.inputs.shape[:2]
        few = m / (m + self.count)
        extra = (few + ridge) * torch.diag_embed(self.inputs.diagonal(dim1=1, dim2=2)) + self._ridge()
        wanted = weight.reshape(groups, -1, m) @ ((1 - few) * self.cross + extra)
        found = torch.linalg.solve((1 - few) * self.inputs + extra, wanted, left=False)
        return found.reshape(weight.shape)

    def _error(self, weight: Tensor, target: Tensor) -> float:
        """The mean of ‖W t − W* x‖² over these vectors, without the part that no target changes."""
        groups, m = self.inputs.shape[:2]
        dense, new = weight.reshape(groups, -1, m), target.reshape(groups, -1, m)
        return float((new * (new @ self.inputs - 2 * dense @ self.cross)).sum())

    def shift(self, dense: Tensor, fitted: Tensor) -> Tensor:  # weights -> (rows)
        """By how much the mean output of the fitted weight lies above that of the dense one."""
        groups, m = self.inputs.shape[:2]
        new = fitted.reshape(groups, -1, m) @ self.mean[:, :, None]
        old = dense.reshape(groups, -1, m) @ self.dense_mean[:, :, None]
        return (new - old).flatten()


class _Stop(BaseException):  # the way out of a forward pass once its last layer was seen; no model catches it
    pass


def _run(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return run(model, inputs)
    except _Stop:
        return None


@torch.no_grad()
def collect(
    dense: nn.Module,
    small: nn.Module,
    names: Sequence[str],
    batches: Iterable[Inputs],
) -> dict[str, Moments]:
    """The moments of the named layers, the dense and the compressed model run side by side on the same batches.

    `small` may be the dense model itself. Both must be in evaluation mode. At most POSITIONS × size vectors of a layer
    are taken, the same positions of both models.
    """
    batches = list(batches)
    sums: dict[str, _Sums] = {}
    old, new = (model.get_submodule for model in (dense, small))
    for number, inputs in enumerate(batches):
        kept = _given(dense, {name: old(name) for name in names}, inputs)
        other = kept if small is dense else _given(small, {name: new(name) for name in names}, inputs)
        for name in names:
            for index, (t, x) in enumerate(_paired(kept[name], other[name])):
                if name not in sums:
                    sums[name] = _Sums(old(name), len(batches))
                sums[name].add(t, x, half=number % 2, seed=number * 1000 + index)
            kept[name], other[name] = [], []
    return {name: each.moments() for name, each in sums.items() if any(each.counts)}


def _paired(dense: Sequence[Tensor], small: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The inputs of a layer in both models, call by call; those of the compressed one alone where they do not match.

    What goes into a layer may depend on the values before: the tokens of an expert, the boxes of a detector.
    """
    alike = [each.shape for each in dense] == [each.shape for each in small]
    return [(t, x) for t, x in zip(dense if alike else small, small, strict=True) if x.numel()]


def _given(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, list[Tensor]]:
    """The inputs of modules in one run: kept as they are, or as copies where later code changed them in place."""
    seen: dict[str, list[Tensor]] = {}
    for copying in (False, True):
        states: list[tuple[Tensor, tuple[int, int]]] = []
        with ExitStack() as stack:
            seen = _watch(stack, modules, states, copying=copying)
            _run(model, inputs)
        if all(_state(each) == state for each, state in states):
            break
    return seen


def _watch(
    stack: ExitStack,
    modules: Mapping[str, nn.Module],
    states: list[tuple[Tensor, tuple[int, int]]],  # of what is kept, which grows
    *,
    copying: bool,
) -> dict[str, list[Tensor]]:
    """Lists that fill with the inputs of modules as they are called; the pass stops once each was called."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor) and not is_functorch_wrapped_tensor(arguments[0]):
                found = arguments[0].clone() if copying else arguments[0]
                seen[name].append(found)
                states.append((found, _state(found)))
            if all(seen.values()):
                raise _Stop

        return hook

    for name, module in modules.items():
        stack.callback(module.register_forward_pre_hook(hook_of(name)).remove)
    return seen


class _Sums:
    """The running sums of one layer."""

    def __init__(self, module: nn.Module, batches: int) -> None:
        self.module, self.batches = module, batches
        self.groups = getattr(module, "groups", 1)
        self.size = module.get_parameter("weight")[0].numel()
        self.counts = [0, 0]
        self.sums: list[list[Tensor]] = [[], []]

    def add(self, dense: Tensor, small: Tensor, *, half: int, seed: int) -> None:
        """Take one call's inputs in."""
        if isinstance(self.module, nn.Conv2d):
            pairs = self._patches(dense, small, seed)
        else:
            pairs = [self._drawn(dense.reshape(-1, 1, self.size), small.reshape(-1, 1, self.size), seed)]
        for t, x in pairs:  # each (vectors, groups, size)
            t, x = t.transpose(0, 1).float(), x.transpose(0, 1).float()
            found = [x.mT @ x, t.mT @ x if t is not x else x.mT @ x, x.sum(1), t.sum(1)]
            found = [each.double() for each in found]
            had = self.sums[half]
            self.sums[half] = [a + b for a, b in zip(had, found, strict=True)] if had else found
            self.counts[half] += x.shape[1]

    def _limit(self) -> int:
        return max(1, POSITIONS * self.size // self.batches)

    def _drawn(self, t: Tensor, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        if len(x) <= self._limit():
            return t, x
        index = torch.randint(len(x), (self._limit(),), generator=torch.Generator().manual_seed(seed)).to(x.device)
        return t[index], x[index]

    def _patches(self, t: Tensor, x: Tensor, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Patches of both inputs, piece by piece along the batch, an axis that they may lack."""
        if x.dim() == 3:
            t, x = (x[None], x[None]) if t is x else (t[None], x[None])
        whole = x.shape[0] * max(1, x[0].numel() * self.size // max(1, x.shape[1]))
        pieces = max(1, -(-whole // CHUNK))
        step = max(1, x.shape[0] // pieces)
        share = max(1, self._limit() * step // x.shape[0])
        for n, start in enumerate(range(0, x.shape[0], step)):
            patches = [self._unfold(each[start : start + step]) for each in ((x,) if t is x else (t, x))]
            if len(patches[0]) > share:
                generator = torch.Generator().manual_seed(seed * 100_003 + n)
                index = torch.randint(len(patches[0]), (share,), generator=generator).to(x.device)
                patches = [each[index] for each in patches]
            yield patches[0], patches[-1]

    def _unfold(self, x: Tensor) -> Tensor:  # (batch, channels, height, width) -> (patches, groups, size)
        module = self.module
        assert isinstance(module, nn.Conv2d)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(x.float(), module._reversed_padding_repeated_twice, mode=mode)
        columns = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
        return columns.transpose(1, 2).reshape(-1, self.groups, self.size)

    def moments(self) -> Moments:
        apart = [(count, sums) for count, sums in zip(self.counts, self.sums, strict=True) if count]
        halves = [_mean_of(count, sums) for count, sums in apart]
        if len(halves) < 2:
            return halves[0]
        whole = _mean_of(sum(self.counts), [a + b for a, b in zip(*self.sums, strict=True)])
        return replace(whole, halves=tuple(halves))


def _mean_of(count: int, sums: Sequence[Tensor]) -> Moments:
    inputs, cross, mean, dense_mean = (each / count for each in sums)
    return Moments(count, inputs, cross, mean, dense_mean)


def outputs(model: nn.Module, batches: Iterable[Inputs]) -> list[Tensor]:
    """`first_output` of what the model returns, batch by batch; logits for a classifier."""
    return [first_output(run(model, inputs)) for inputs in batches]


def first_output(found: Any) -> Tensor:
    """The first tensor of floating point in an output; one with axes, such as logits, before a loss beside it.

    Raises:
        GMError: there is none.
    """
    tensors = floating(found)
    if not tensors:
        raise GMError(f"the model's output, {describe(found)}, holds no tensor of floating point to compare")
    return next((each for each in tensors if each.dim()), tensors[0])


def divergence(wanted: Sequence[Tensor], found: Sequence[Tensor], *, logits: bool) -> float:
    """How far outputs lie from the wanted ones, the mean over examples (and places).

    For logits of two classes or more the Kullback–Leibler divergence of the distributions over classes, in nats; for
    other outputs the squared error relative to the variance of the wanted ones. Where sizes differ, as the numbers of
    boxes found may, it compares what both have.
    """
    total, count = 0.0, 0
    for old, new in zip(wanted, found, strict=True):
        if old.shape != new.shape:
            both = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
            old, new = old[both], new[both]
        if not old.numel():
            continue
        if logits and _classes_last(old).shape[-1] > 1:
            old, new = _classes_last(old.double()), _classes_last(new.double())
            each = F.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="sum")
            total, count = total + float(each), count + len(old)
        else:
            old, new = (each.double().reshape(len(each) if each.dim() else 1, -1) for each in (old, new))
            total, count = total + float((old - new).square().mean() / _spread(old)) * len(old), count + len(old)
    return total / max(count, 1)


def _spread(values: Tensor) -> Tensor:  # ()
    """The variance of outputs over the examples; of a single one, or equal ones, that of its entries; else its size."""
    size = values.square().mean()
    found = ((values - mean).square().mean() for mean in (values.mean(0), values.mean()))
    return next((each for each in found if each > 1e-20 * size), size if size > 0 else torch.ones_like(size))


def _classes_last(values: Tensor) -> Tensor:  # (batch, classes), (batch, tokens, classes), (batch, classes, y, x)
    values = values.movedim(1, -1) if values.dim() == 4 else values
    return values.flatten(0, -2) if values.dim() > 1 else values.reshape(1, -1)


def output_moments(
    model: nn.Module, batches: Iterable[Inputs], names: Sequence[str], *, logits: bool, seed: int = 0
) -> dict[str, Tensor]:
    """For each layer the second moment of the gradients at its outputs, (rows, rows), with mean diagonal 1.

    The gradients are those of the log-likelihood of a label drawn from the model's own prediction (for outputs that are
    no logits, of a random projection), so that the moment is the layer's factor of the Fisher information. Layers that
    no gradient reaches are left out.

    Source: Martens and Grosse 2015, K-FAC; Grosse and Martens 2016 for convolutions.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack, torch.enable_grad():
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(_gradient_hook(name, sums)).remove)
        for whole in batches:
            for inputs in split_batch(whole, BACKWARD):
                backpropagate(model, inputs, generator, logits=logits)
    found = {}
    for name, total in sums.items():
        size = float(total.diagonal().mean())
        if size > 0 and torch.isfinite(total).all():
            found[name] = total / size
    return found


def _gradient_hook(name: str, sums: dict[str, Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if is_functorch_wrapped_tensor(output):
            return output
        axis = -3 if isinstance(module, nn.Conv2d) else -1

        def take_in(gradient: Tensor) -> None:
            rows = gradient.movedim(axis, -1).flatten(0, -2).float()
            moment = (rows.mT @ rows).double()
            sums[name] = sums[name] + moment if name in sums else moment

        if not output.requires_grad:  # frozen weights: a graph begins here, on a tensor that may be changed in place
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output.register_hook(take_in)
        return output

    return hook


def backpropagate(model: nn.Module, inputs: Inputs, generator: torch.Generator, *, logits: bool) -> None:
    """The backward pass of `likelihood` of the model's outputs; none where its code lets no gradient through."""
    try:
        score = likelihood(first_output(call(model, inputs)), generator, logits=logits)
        if score.requires_grad:
            score.backward()
    except GMError:
        raise
    except Exception as problem:  # of any kind: some code refuses to be differentiated in evaluation mode
        if "out of memory" in str(problem) or "can't allocate" in str(problem):
            raise


def likelihood(output: Tensor, generator: torch.Generator, *, logits: bool) -> Tensor:  # ()
    """The log-likelihood of labels drawn from the prediction; for outputs that are no logits a random projection."""
    if not logits or _classes_last(output).shape[-1] < 2:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return (output * signs).sum()
    values = _classes_last(output).float().log_softmax(-1)
    if values.isnan().any():
        raise GMError("the model's outputs on the calibration data are not finite, so they cannot be compared")
    labels = torch.multinomial(values.detach().exp().cpu(), 1, generator=generator).to(values.device)
    return values.gather(1, labels).sum()


def _state(tensor: Tensor) -> tuple[int, int]:
    """A tensor and its values: an activation or addition in place gives the same tensor another version."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def norms_after(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, str]:
    """For each layer that feeds a BatchNorm directly, the name of that BatchNorm; both must be called once."""
    made: dict[tuple[int, int], list[str]] = {}
    kept: list[Tensor] = []  # so that no id is given twice
    found: dict[str, list[str]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                made.setdefault(_state(output), []).append(name)
                kept.append(output)

        return hook

    def match(norm: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            given = isinstance(arguments[0], Tensor) if arguments else False
            origin = made.get(_state(arguments[0]), []) if given else []
            found.setdefault(norm, []).extend(origin or [""])

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        for name, module in model.named_modules():
            if isinstance(module, NORMS) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(match(name)).remove)
        call(model, inputs)
    calls = [name for names_of in made.values() for name in names_of]
    pairs = {origin[0]: norm for norm, origin in found.items() if len(origin) == 1 and origin[0]}
    return {name: norm for name, norm in pairs.items() if calls.count(name) == 1}
