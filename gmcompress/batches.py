"""Batches of calibration data: what is taken of a loader, and parts of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .errors import GMError
from .surgery import Inputs, describe

SAMPLES = 2000  # examples taken from the data, where they fit into MEMORY
MEMORY = 1 << 29  # bytes of calibration inputs held


def take(data: Iterable[Any], *, samples: int = SAMPLES, device: torch.device | None = None) -> list[Inputs]:
    """The inputs of the first batches of a loader: at most `samples` examples and half a gigabyte.

    A batch is (inputs, labels), inputs, or a mapping, whose "labels" are left out; a tensor alone is one batch.

    Raises:
        GMError: the data is empty, or a batch is something else.
    """
    found: list[Inputs] = []
    count = held = 0
    for batch in [data] if isinstance(data, Tensor | Mapping) else data:
        inputs = _inputs_of(batch, device)
        tensors = _tensors(inputs)
        if not tensors or tensors[0].dim() == 0 or not len(tensors[0]):
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


def _inputs_of(batch: Any, device: torch.device | None) -> Inputs:
    def moved(each: Any) -> Any:
        return each.to(device) if isinstance(each, Tensor) else each

    if isinstance(batch, Mapping):
        return {key: moved(each) for key, each in batch.items() if key != "labels"}
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return moved(batch[0])
    if isinstance(batch, Tensor):
        return moved(batch)
    raise GMError(f"a batch is (inputs, labels), inputs, or a mapping, but the data gave {describe(batch)}")


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [each for each in tree_leaves(inputs) if isinstance(each, Tensor)]


def is_divisible(inputs: Inputs) -> bool:
    """Whether all tensors have an example at each place of their first axis; a graph or a scalar input has not.

    >>> is_divisible({"nodes": torch.ones(5, 3), "edges": torch.ones(2, 9)}), is_divisible(torch.ones(5, 3))
    (False, True)
    """
    sizes = {each.shape[:1] for each in _tensors(inputs)}  # of a scalar none
    return len(sizes) == 1 and torch.Size() not in sizes


def first_of(inputs: Inputs, count: int) -> Inputs:
    """The first examples of a batch; all of one that cannot be divided."""
    return _part(inputs, 0, count) if is_divisible(inputs) else inputs


def _part(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The examples from one place up to another, of all tensors."""
    return tree_map(lambda each: each[start:stop] if isinstance(each, Tensor) else each, inputs)


def count_examples(inputs: Inputs) -> int:
    """The examples in a batch."""
    return next(len(each) for each in _tensors(inputs) if each.dim())


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
