"""What data says about a model: how far outputs lie apart, the moments of gradients, and norms behind layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # one inside of vmap is of no use outside
from torch.utils._pytree import tree_leaves

from .batches import split_batch
from .errors import GMError
from .forward import Inputs, call, run_seeded, ungraded
from .linalg import gram_matrix
from .moments import version_of
from .nesting import describe, floating, laid_open
from .streams import seeded
from .surgery import TIED_HEAD, trace

BACKWARD = 2_500_000  # numbers of input in one backward pass
IMPOSSIBLE = -100.0  # the log-probability of a class that is ruled out


def outputs(model: nn.Module, batches: Iterable[Inputs]) -> list[Tensor]:
    """`first_output` of what the model returns, batch by batch; logits for a classifier.

    What is drawn at random is the same for every model, and other for every batch.
    """
    return [first_output(run_seeded(model, inputs, seed=number)) for number, inputs in enumerate(batches)]


def first_output(found: Any) -> Tensor:
    """The first tensor of floating point in an output; one with axes, such as logits, before a loss beside it.

    Complex numbers are pairs of real ones, where there are no others.

    Raises:
        GMError: there is none.

    >>> first_output({"signal": torch.zeros(2, 3, dtype=torch.complex64)}).shape
    torch.Size([2, 3, 2])
    """
    leaves = (each for each in tree_leaves(laid_open(found)) if isinstance(each, Tensor))
    tensors = floating(found) or [torch.view_as_real(each) for each in leaves if each.is_complex()]
    if not tensors:
        raise GMError(f"the model's output, {describe(found)}, holds no tensor of floating point to compare")
    return next((each for each in tensors if each.dim()), tensors[0])


def ends_in_classes(model: nn.Module, inputs: Inputs | None) -> bool:
    """Whether the outputs of a dense model are taken for logits, since a classifier is the last to run."""
    return any(site.role in ("classifier", TIED_HEAD) for site in trace(model, inputs))


def divergence(wanted: Sequence[Tensor], found: Sequence[Tensor], *, logits: bool) -> float:
    """How far outputs lie from the wanted ones, the mean over examples (and places).

    For logits of two classes or more the Kullback–Leibler divergence of the distributions over classes, in nats; for
    other outputs the squared error relative to the variance of the wanted ones. Where sizes differ, as the numbers of
    boxes found may, it compares what both have. Entries that are infinite, as masked ones, or were NaN are left out.
    """
    total, count = 0.0, 0
    for old, new in zip(wanted, found, strict=True):
        if old.shape != new.shape:
            both = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
            old, new = old[both], new[both]
        if not old.numel():
            continue
        if logits and are_classes(old):
            old, new = (classes_last(each.double()).log_softmax(-1).clamp(min=IMPOSSIBLE) for each in (old, new))
            each = F.kl_div(new, old, log_target=True, reduction="none").where(~old.isnan(), 0.0)
            total, count = total + float(each.sum()), count + len(old)
        else:
            compared = old.isfinite() & ~new.isinf()
            old, new = (each.double().where(compared, 0.0) for each in (old, new))
            old, new = (each.reshape(len(each) if each.dim() else 1, -1) for each in (old, new))
            total, count = total + float((old - new).square().mean() / spread_of(old)) * len(old), count + len(old)
    return total / max(count, 1)


def spread_of(values: Tensor) -> Tensor:  # ()
    """The variance of outputs over the examples; of a single one, or equal ones, that of its entries; else its size."""
    size = values.square().mean()
    found = ((values - mean).square().mean() for mean in (values.mean(0), values.mean()))
    return next((each for each in found if each > 1e-20 * size), size if size > 0 else torch.ones_like(size))


def are_classes(values: Tensor) -> bool:
    """Whether logits are of two classes or more, so that they have a distribution."""
    return classes_last(values).shape[-1] > 1


def classes_last(values: Tensor) -> Tensor:  # (batch, classes), (batch, tokens, classes), (batch, classes, y, x)
    values = values.movedim(1, -1) if values.dim() == 4 else values
    return values.flatten(0, -2) if values.dim() > 1 else values.reshape(1, -1)


@dataclass(frozen=True)
class Gradients:
    """What the gradients at the outputs of a layer tell of errors there.

    `moment` is their second moment over rows, (rows, rows), with mean diagonal 1. `places` is their mean square at each
    place of an example's output, row after row and of mean 1; None where there is one place, or examples differ in
    what they have.
    """

    moment: Tensor
    places: Tensor | None


def output_gradients(
    model: nn.Module, batches: Iterable[Inputs], names: Sequence[str], *, logits: bool, seed: int = 0
) -> dict[str, Gradients]:
    """What each layer's gradients tell, those of a random `projection` of the outputs.

    So the moments are the layers' factors of the Fisher information. Layers that no gradient reaches are left out.

    Source: Martens and Grosse 2015, K-FAC; Grosse and Martens 2016 for convolutions.
    """
    sums: dict[str, _GradientSums] = {}
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack, seeded(model, seed), torch.enable_grad():
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(gradient_hook(_summing(module, name, sums))).remove)
        for whole in batches:
            for inputs in split_batch(whole, BACKWARD):
                backpropagate(model, inputs, generator, logits=logits)
    found = {name: each.gradients() for name, each in sums.items()}
    return {name: each for name, each in found.items() if each is not None}


class _GradientSums:
    """The running sums of one layer."""

    def __init__(self) -> None:
        self.moment: Tensor | None = None
        self.places: Tensor | None = None
        self.uneven = False

    def add(self, gradient: Tensor) -> None:  # (batch, *places, rows)
        gradient = gradient.float()
        moment = gram_matrix(gradient.flatten(0, -2)).double()
        self.moment = moment if self.moment is None else self.moment + moment
        squares = gradient.square().sum((0, -1)) if gradient.dim() > 2 else gradient.new_zeros(())
        self.uneven |= self.places is not None and self.places.shape != squares.shape
        self.places = squares if self.places is None or self.uneven else self.places + squares

    def gradients(self) -> Gradients | None:
        assert self.moment is not None, "a gradient was seen"
        size = float(self.moment.diagonal().mean())
        if not size > 0 or not torch.isfinite(self.moment).all():
            return None
        places = None if self.uneven or self.places is None or self.places.numel() < 2 else self.places.flatten()
        return Gradients(self.moment / size, None if places is None else places / places.mean())


def _summing(
    module: nn.Module, name: str, sums: dict[str, _GradientSums]
) -> Callable[[tuple[Any, ...]], Callable[[Tensor], None]]:
    def take_in(gradient: Tensor) -> None:
        if isinstance(module, nn.Conv2d):  # to which an image may come without a batch
            gradient = (gradient if gradient.dim() == 4 else gradient[None]).movedim(1, -1)
        elif gradient.dim() == 1:  # nor has a vector one
            gradient = gradient[None]
        sums.setdefault(name, _GradientSums()).add(gradient)

    return lambda _arguments: take_in


def gradient_hook(watch: Callable[[tuple[Any, ...]], Callable[[Tensor], None]]) -> Callable[..., Tensor]:
    """A forward hook that gives the gradient at a layer's output to what `watch` makes of the layer's arguments.

    It passes over calls without gradients, as those of a part that the model's code runs as it is.
    """

    def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if is_functorch_wrapped_tensor(output) or output.is_nested or not torch.is_grad_enabled():
            return output
        output = differentiable(output)
        output.register_hook(watch(arguments))
        return output

    return hook


def differentiable(output: Tensor) -> Tensor:
    """The output; where weights are frozen a graph begins here, on a tensor that may be changed in place."""
    if output.requires_grad:
        return output
    return output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)


def backpropagate(model: nn.Module, inputs: Inputs, generator: torch.Generator, *, logits: bool) -> Tensor | None:
    """The outputs, after a backward pass of their `projection`; None where the code lets no gradient through."""
    try:
        output = first_output(call(model, inputs))
        score = projection(output, generator, logits=logits)
        if score.requires_grad:
            score.backward()
            return output.detach()
    except GMError:
        raise
    except Exception as problem:  # of any kind: some code refuses to be differentiated in evaluation mode
        if "out of memory" in str(problem) or "can't allocate" in str(problem):
            raise
    return None


def projection(output: Tensor, generator: torch.Generator, *, logits: bool) -> Tensor:  # ()
    """The outputs summed with random signs; of logits, the log-probabilities, each by the root of its probability.

    The gradients of that have the second moments that those of the log-likelihood of a label drawn from the prediction
    have: with probabilities p both are diag(p) − p pᵀ at the logits. But labels that are unlikely are drawn rarely, and
    then weigh much, so that far more of them would have to be drawn for moments as sure.
    """
    classes = logits and are_classes(output)
    values = classes_last(output).float().log_softmax(-1) if classes else output
    signs = torch.randint(0, 2, values.shape, generator=generator, device="cpu").to(values) * 2 - 1
    if not classes:
        return (values * signs).sum()
    if values.isnan().any():
        raise GMError("the model's outputs on the calibration data are not finite, so they cannot be compared")
    ruled_out = values.detach().isinf()  # their probabilities, and gradients, are 0
    return (values.masked_fill(ruled_out, 0.0) * signs * (values.detach() / 2).exp()).sum()


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def norms_after(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, str]:
    """For each layer that feeds a BatchNorm directly, the name of that BatchNorm; both must be called once."""
    made: dict[tuple[int, int], list[str]] = {}
    kept: list[Tensor] = []  # so that no id is given twice
    found: dict[str, list[str]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                made.setdefault(version_of(output), []).append(name)
                kept.append(output)

        return hook

    def match(norm: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            given = isinstance(arguments[0], Tensor) if arguments else False
            origin = made.get(version_of(arguments[0]), []) if given else []
            found.setdefault(norm, []).extend(origin or [""])

        return hook

    with ExitStack() as stack, seeded(model):
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        for name, module in model.named_modules():
            if isinstance(module, NORMS) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(match(name)).remove)
        ungraded(model, inputs)
    calls = [name for names_of in made.values() for name in names_of]
    pairs = {origin[0]: norm for norm, origin in found.items() if len(origin) == 1 and origin[0]}
    return {name: norm for name, norm in pairs.items() if calls.count(name) == 1}
