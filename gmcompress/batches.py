"""Batches of calibration data: what is taken of a loader, and parts of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import Signature
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map

from .errors import GMError
from .forward import Inputs
from .nesting import describe, is_plain, is_ragged, takes_all

SAMPLES = 2000  # examples taken from the data, where they fit into MEMORY
MEMORY = 1 << 29  # bytes of calibration inputs held


class Taken(list[Inputs]):
    """What was taken of a loader: a batch is all the arguments of a model, with no labels beside it."""


class WholeList(list[Any]):
    """Positional arguments that are not to be divided into examples."""


class WholeMapping(dict[str, Any]):
    """Arguments by name that are not to be divided into examples."""


register_pytree_node(WholeList, lambda each: (list(each), None), lambda leaves, _: WholeList(leaves))
register_pytree_node(
    WholeMapping,
    lambda each: (list(each.values()), list(each)),
    lambda leaves, keys: WholeMapping(zip(keys or [], leaves, strict=True)),
)


def whole(inputs: Inputs) -> Inputs:
    """A batch that stays as it is, since the model does not run on a part of it.

    >>> is_divisible(whole(torch.ones(5, 3))), count_examples(whole({"x": torch.ones(5, 3)}))
    (False, 5)
    """
    if isinstance(inputs, Mapping):
        return WholeMapping(inputs)
    return WholeList(inputs if isinstance(inputs, list | tuple) else [inputs])


def take(
    data: Iterable[Any],
    *,
    samples: int = SAMPLES,
    device: torch.device | None = None,
    labels: bool = False,
    form: Signature | None = None,
) -> Taken:
    """The inputs of the first batches of a loader: at most `samples` examples and half a gigabyte.

    A batch is (inputs, labels), inputs, or a mapping, whose "labels" are left out unless asked for; a tensor alone is
    one batch. Inputs beside labels may be a mapping or several tensors, and a list of images beside as many mappings is
    one argument. Where the model's `forward` is of a form that takes all parts of a batch, or all but the last, and not
    the first alone, they are its arguments: a tensor, and tensors, lists of tensors and numbers.

    Raises:
        GMError: the data is empty, or a batch is something else.
    """
    if isinstance(data, Taken):
        return Taken(moved(each, device) for each in data)
    found = Taken()
    count = held = 0
    for batch in [data] if isinstance(data, Tensor | Mapping) else data:
        inputs = inputs_of(batch, device, form=form)
        if labels and isinstance(batch, Mapping) and isinstance(inputs, dict) and "labels" in batch:
            inputs["labels"] = moved(batch["labels"], device)
        tensors = _tensors(inputs)
        if any(map(is_ragged, tensors)) or not any(each.dim() and len(each) for each in tensors):
            raise GMError(f"a batch of calibration data holds examples along its first axis, not {describe(inputs)}")
        inputs = first_of(inputs, samples - count)
        found.append(inputs)
        count += count_examples(inputs)
        held += sum(each.numel() * each.element_size() for each in tensors)
        if count >= samples or held >= MEMORY:
            break
    if not found:
        raise GMError("the calibration data is empty: it gave no batch")
    return found


def moved(inputs: Any, device: torch.device | None) -> Any:
    """The same nesting with its tensors on a device."""
    return tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, inputs)


def count_arguments(batch: Any, form: Signature | None) -> int:
    """How many parts of a batch, from the first on, are arguments of a model of this form that needs several.

    They are all, or all but the labels behind them; 0 where the form does not tell. The first is a tensor, the others
    are tensors, lists of tensors or numbers.
    """
    if form is None or not _are_arguments(batch):
        return 0
    return next((each for each in (len(batch), len(batch) - 1) if each > 1 and takes_all(form, batch[:each])), 0)


def inputs_of(batch: Any, device: torch.device | None = None, *, form: Signature | None = None) -> Inputs:
    """What a model is called with for a batch of a loader, on a device.

    Raises:
        GMError: the batch is of no known kind.

    >>> inputs_of(([torch.ones(2), torch.zeros(2)], torch.tensor([0, 1])))
    [tensor([1., 1.]), tensor([0., 0.])]
    """
    if count := count_arguments(batch, form):
        return moved(list(batch[:count]), device)
    if isinstance(batch, list | tuple) and len(batch) == 2 and _goes_with(*batch):
        batch = batch[0]
        if not isinstance(batch, Mapping):
            return moved(batch, device)
    if isinstance(batch, Mapping):
        return {key: moved(each, device) for key, each in batch.items() if key != "labels"}
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return moved(batch[0], device)
    if isinstance(batch, Tensor):
        return moved(batch, device)
    if _is_detection(batch):
        return [moved(list(batch[0]), device)]
    raise GMError(f"a batch is (inputs, labels), inputs, or a mapping, but the data gave {describe(batch)}")


def _goes_with(inputs: Any, labels: Any) -> bool:
    """Whether these are a mapping or several tensors, all arguments of a model, beside one tensor of labels."""
    return isinstance(labels, Tensor) and (_are_tensors(inputs) or isinstance(inputs, Mapping))


def _are_tensors(given: Any) -> bool:
    """Whether it is a list or tuple of tensors, one at least."""
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(each, Tensor) for each in given)


def _are_arguments(given: Any) -> bool:
    """Whether it is a list or tuple with a tensor first, and tensors, lists of tensors and numbers behind it."""
    if not (isinstance(given, list | tuple) and given and isinstance(given[0], Tensor)):
        return False
    return all(isinstance(each, Tensor | int | float) or _are_tensors(each) for each in given)


def _is_detection(batch: Any) -> bool:
    """Whether it is a list of images and one of as many mappings of labels."""
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(e, list | tuple) for e in batch)):
        return False
    images, labels = batch
    kinds = zip(images, labels, strict=False)
    return 0 < len(images) == len(labels) and all(isinstance(a, Tensor) and isinstance(b, Mapping) for a, b in kinds)


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [each for each in tree_leaves(inputs) if isinstance(each, Tensor)]


def _whole(given: Any, *, is_argument: bool = False) -> list[Tensor]:
    """The tensors that are arguments, by themselves or in mappings: not those in lists, which may be examples each."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, Mapping):
        return [found for each in given.values() for found in _whole(each, is_argument=True)]
    if isinstance(given, list | tuple) and not is_argument:
        return [found for each in given for found in _whole(each, is_argument=True)]
    return []


def is_divisible(inputs: Inputs) -> bool:
    """Whether all tensors have an example at each place of their first axis; a graph or a scalar input has not.

    Nor has a list of images, each of which is an example, a sparse or nested tensor, or what is marked as `whole`.

    >>> is_divisible({"nodes": torch.ones(5, 3), "edges": torch.ones(2, 9)}), is_divisible(torch.ones(5, 3))
    (False, True)
    """
    tensors = _tensors(inputs)
    if isinstance(inputs, WholeList | WholeMapping) or not all(map(is_plain, tensors)):
        return False
    sizes = {each.shape[:1] for each in tensors}  # of a scalar none
    return len(sizes) == 1 and torch.Size() not in sizes and bool(_whole(inputs))


def first_of(inputs: Inputs, count: int) -> Inputs:
    """The first examples of a batch; all of one that cannot be divided."""
    return _part(inputs, 0, count) if is_divisible(inputs) else inputs


def _part(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The examples from one place up to another, of all tensors."""
    return tree_map(lambda each: each[start:stop] if isinstance(each, Tensor) else each, inputs)


def count_examples(inputs: Inputs) -> int:
    """The examples in a batch: the places of a tensor's first axis, or the tensors of a list of them.

    >>> count_examples(torch.ones(5, 3)), count_examples({"images": [torch.ones(3, 8, 8), torch.ones(3, 6, 9)]})
    (5, 2)
    """
    sizes = [len(each) for each in _whole(inputs) if each.dim() and len(each)]
    return sizes[0] if sizes else sum(each.dim() > 0 for each in _tensors(inputs))


def first_examples(batches: Iterable[Inputs], count: int) -> list[Inputs]:
    """The first so many examples of several batches.

    >>> [len(each) for each in first_examples([torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2)], 4)]
    [3, 1]
    """
    found: list[Inputs] = []
    for each in batches:
        if count <= 0:
            break
        found.append(first_of(each, count))
        count -= count_examples(found[-1])
    return found


def split_batch(inputs: Inputs, limit: int) -> list[Inputs]:
    """A batch in pieces of at most `limit` numbers of input, at least one example each; whole if it has no parts."""
    if not is_divisible(inputs):
        return [inputs]
    tensors = _tensors(inputs)
    total = len(tensors[0])
    size = max(1, limit // max(1, sum(each.numel() for each in tensors) // total))
    return [_part(inputs, start, start + size) for start in range(0, total, size)]
