"""The losses of fine-tuning: distillation with labels, and the outputs of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Signature
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..batches import count_arguments, inputs_of
from ..calibration import IMPOSSIBLE, first_output, spread_of
from ..errors import GMError, said
from ..layers import GMLayer
from ..nesting import describe, is_plain
from ..surgery import get_modules
from .recipe import FEATURES, Recipe

CONTAINERS = (nn.Sequential, nn.ModuleList)
UNDECIDED = 0.25  # of the entropy of equal classes: what a teacher's softened answers have in the mean
TEMPERATURES = 1.0, 8.0
ROWS = 256  # of logits, at most, from which a temperature is found
HALVINGS = 20


def distillation_loss(
    found: Tensor,  # (batch, classes), (batch, tokens, classes) or (batch, classes, *places); what is no logits: any
    wanted: Tensor | None,  # the teacher's, same shape
    labels: Tensor | None,  # without the axis of classes
    recipe: Recipe,
    *,
    logits: bool = True,
) -> Tensor:  # ()
    """`distillation` × T² × KL(teacher ‖ student) + `task` × cross-entropy; one of them alone where one is missing.

    T is 1 where the recipe leaves it open. Outputs that are no logits of classes, or that have labels of floating
    point, have the relative squared error in place of both; a single logit has it in place of the divergence, and
    binary cross-entropy with labels of 0 and 1.

    Raises:
        GMError: the teacher's outputs have another shape, the labels do not fit, or there is neither.
    Source: Hinton, Vinyals and Dean 2015, section 2.

    >>> logits = torch.tensor([[2.0, 1.0]])
    >>> distillation_loss(logits, logits, None, Recipe())
    tensor(0.)
    """
    if wanted is not None and wanted.shape != found.shape:
        raise GMError(f"the teacher's outputs have shape {tuple(wanted.shape)}, the model's {tuple(found.shape)}")
    if wanted is None and labels is None:
        raise GMError("there is nothing to learn from: neither a teacher nor labels in the batches")
    weight = 1.0 if wanted is None else recipe.task
    if not has_classes(found, labels, logits=logits):
        loss = found.new_zeros(()) if wanted is None else recipe.distillation * relative_square(found, wanted)
        return loss if labels is None else loss + weight * _distance(found, labels)
    soft = labels is not None and labels.is_floating_point()
    axis = _class_axis(found, labels)
    if labels is not None:
        labels = _rows(labels, axis) if soft else labels.flatten().long()
    found = _rows(found, axis)
    loss = found.new_zeros(())
    if wanted is not None:
        t = recipe.temperature or 1.0
        new, old = (_log_softmax(each / t) for each in (found, _rows(wanted, axis)))
        loss = recipe.distillation * t * t * F.kl_div(new, old, log_target=True, reduction="batchmean")
    if labels is None:
        return loss
    try:
        return loss + weight * F.cross_entropy(found, labels)
    except IndexError as problem:
        raise GMError(f"the labels do not fit outputs of {found.shape[-1]} classes: {said(problem)}") from problem


def _log_softmax(values: Tensor) -> Tensor:
    """With a finite logarithm where a class is ruled out by a logit of minus infinity."""
    return F.log_softmax(values, dim=-1).clamp(min=IMPOSSIBLE)


def _rows(values: Tensor, axis: int) -> Tensor:  # (*, classes, *) -> (rows, classes)
    return values.movedim(axis, -1).flatten(0, -2).float()


def temperature_of(
    wanted: Tensor,  # logits, as in distillation_loss
    labels: Tensor | None = None,
) -> float:
    """The temperature from 1 to 8 at which a teacher's answers are a quarter as undecided as they can be.

    That is where their mean entropy is a quarter of log(classes). Much below it the answers say no more than which
    class is the first, much above it that there are classes: at 4, a ResNet on CIFAR-10 has 23 % of that entropy, and a
    vision transformer on the 1,000 classes of ImageNet, whose logits lie nearer together, 99 %.

    >>> temperature_of(torch.tensor([[20.0, 0.0, 0.0, 0.0]]))
    5.53
    """
    logits = _rows(wanted, _class_axis(wanted, labels))
    logits = logits[:: -(-len(logits) // ROWS)] if len(logits) else logits.new_zeros(1, 2)
    low, high = TEMPERATURES
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        logarithms = _log_softmax(logits / middle)
        entropy = -(logarithms.exp() * logarithms).sum(1).mean()
        low, high = (low, middle) if entropy > UNDECIDED * math.log(logits.shape[1]) else (middle, high)
    return round(low, 2)


def has_classes(found: Tensor, labels: Tensor | None, *, logits: bool) -> bool:
    """Whether outputs are logits of two classes or more."""
    if found.dim() < 2 or found.shape[_class_axis(found, None)] < 2:
        return False
    if labels is None or not labels.is_floating_point():
        return logits or labels is not None
    return labels.shape == found.shape and _are_shares(labels.movedim(_class_axis(found, None), -1))


def _are_shares(labels: Tensor) -> bool:
    """Whether labels are probabilities of the classes, as those of mixed examples are."""
    return bool((labels >= 0).all() and ((labels.sum(-1) - 1).abs() < 1e-3).all())


def relative_square(found: Tensor, wanted: Tensor) -> Tensor:  # ()
    """The mean square of the error over the variance of what is wanted; entries that are infinite there left out."""
    known = wanted.isfinite()
    found, wanted = (each.where(known, 0.0).float() for each in (found, wanted))
    return (found - wanted).square().mean() / spread_of(wanted)


def _distance(found: Tensor, labels: Tensor) -> Tensor:  # ()
    """The loss of single logits against labels of 0 and 1, of other outputs against labels of floating point.

    Raises:
        GMError: there are not as many labels as outputs, or they are of another kind.
    """
    if labels.numel() != found.numel():
        raise GMError(f"labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(found.shape)}")
    labels = labels.reshape(found.shape)
    if labels.is_floating_point():
        return relative_square(found, labels)
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise GMError("the labels of a single output for each example are 0 and 1, or of floating point")
    return F.binary_cross_entropy_with_logits(found.float(), labels.float())


def _class_axis(found: Tensor, labels: Tensor | None) -> int:
    """Where the classes are: last in (batch, tokens, classes), second in (batch, classes, *places).

    Labels that name a class each lack that axis; those of floating point have it too, and say nothing.
    """
    if labels is None or labels.is_floating_point():
        return 1 if found.dim() == 4 else -1
    if labels.shape == found.shape[:-1]:
        return -1
    if labels.shape == (found.shape[0], *found.shape[2:]):
        return 1
    if labels.shape == found.shape:
        raise GMError("labels of one number for each output are of floating point; integers name one class each")
    raise GMError(f"labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(found.shape)}")


def outputs_to_compare(output: Any) -> tuple[Tensor, bool]:
    """The `logits` in a model's output, or its first tensor of floating point, and whether they are called logits.

    Raises:
        GMError: there is none.

    >>> outputs_to_compare({"out": torch.ones(1), "logits": torch.zeros(1)})
    (tensor([0.]), True)
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return (named, True) if isinstance(named, Tensor) else (first_output(output), False)


def own_loss(output: Any) -> Tensor | None:  # ()
    """The loss that a model returns beside its outputs, if it does."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and not found.dim() else None


def parts_of(batch: Any, device: torch.device, form: Signature) -> tuple[Any, Tensor | None]:
    """Inputs and labels of a batch, on the device, for a model whose `forward` is of this form.

    Raises:
        GMError: the batch is of no known kind.
    """
    inputs, labels = inputs_of(batch, device, form=form), None
    if count := count_arguments(batch, form):
        labels = batch[count] if count < len(batch) else None
    elif isinstance(batch, Mapping):
        labels = batch.get("labels")
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        labels = batch[1]
        if len(batch) > 2:
            raise GMError(f"a batch is (inputs, labels), inputs, or a mapping, but the loader gave {describe(batch)}")
    return inputs, labels.to(device) if isinstance(labels, Tensor) else None


# ---------------------------------------------------------------------------------------------------------------------
# The outputs of blocks


def find_blocks(model: nn.Module) -> list[str]:
    """The modules directly inside the outermost nn.Sequential and nn.ModuleList that hold structured layers.

    A container directly inside a container is opened too. Where the model holds no structured layer, its matrices and
    kernels take their place.

    >>> find_blocks(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)))
    ['0.0', '1']
    """
    compressed = any(isinstance(each, GMLayer) for each in model.modules())

    def holds(module: nn.Module) -> bool:
        if compressed:
            return any(isinstance(each, GMLayer) for each in module.modules())
        return any(each.dim() > 1 for each in module.parameters())

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        inside = isinstance(module, CONTAINERS)
        for key, child in module.named_children():
            if inside and not isinstance(child, CONTAINERS):
                if holds(child):
                    yield prefix + key
            else:
                yield from walk(child, f"{prefix}{key}.")

    return list(walk(model, ""))


class Features:
    """The blocks of a student and of its teacher whose outputs are compared, and the weight of that.

    Where the recipe leaves the weight open there may be none of them; then the loss is zero.

    Raises:
        GMError: a weight was given, but no teacher, a name that one of them lacks, or none found.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, recipe: Recipe) -> None:
        self.asked, self.named = recipe.features is not None, bool(recipe.blocks)
        self.weight = FEATURES if recipe.features is None else recipe.features
        self.student: dict[str, nn.Module] = {}
        self.teacher: dict[str, nn.Module] = {}
        if not self.weight or (teacher is None and not self.asked and not self.named):
            return
        if teacher is None:
            raise GMError(f"features={self.weight!r} compares with a teacher, and there is none")
        known = dict(teacher.named_modules())
        names = recipe.blocks or tuple(name for name in find_blocks(student) if name in known)
        self._check(names)
        self.student, self.teacher = get_modules(student, names), get_modules(teacher, names)

    def loss(
        self,
        ours: Mapping[str, Any],  # outputs by name of block
        theirs: Mapping[str, Any],
    ) -> Tensor | float:  # ()
        """The mean over the blocks of ‖h_s − h_t‖² / ‖h_t − mean(h_t)‖², the mean over all entries of h_t.

        Raises:
            GMError: a block that was named gave no tensor, or one of another shape than the teacher's; or all did,
                though a weight was given.
        """
        names = [name for name in self.student if _same_kind(ours.get(name), theirs.get(name))]
        if self.named:
            for name in self.student:
                if name not in names:
                    gave, wanted = (describe(each[name]) if name in each else "nothing" for each in (ours, theirs))
                    raise GMError(f"block {name!r} gave {gave}, in the teacher {wanted}: they cannot be compared")
        self._check(names)
        return torch.stack([_relative(ours[name], theirs[name]) for name in names]).mean() if names else 0.0

    def _check(self, names: Any) -> None:
        if self.asked and not names:
            raise GMError("found no blocks with outputs of the teacher's shapes to compare; name them with blocks=")


def _same_kind(ours: Any, theirs: Any) -> bool:
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)) or not is_plain(ours) or theirs.is_nested:
        return False
    return ours.shape == theirs.shape and ours.is_floating_point()


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:  # ()
    ours, theirs = ours.float(), theirs.float()
    size, spread = theirs.square().sum(), (theirs - theirs.mean()).square().sum()
    if not spread > 1e-12 * size:  # all equal up to rounding
        spread = size if size > 0 else torch.ones_like(size)
    return (ours - theirs).square().sum() / spread


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """What these modules return while the block runs, by name, the last call of each; by hooks that then are removed.

    >>> layer = nn.Linear(2, 3)
    >>> with outputs_of({"it": layer}) as found:
    ...     _ = layer(torch.zeros(1, 2))
    >>> found["it"].shape, len(layer._forward_hooks)
    (torch.Size([1, 3]), 0)
    """
    found: dict[str, Any] = {}

    def keeper(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[name] = output

        return keep

    handles = [module.register_forward_hook(keeper(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for each in handles:
            each.remove()
