"""Random numbers that are the same each time, while the caller's streams of them stay where they are."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from .copies import parameters_of


@contextmanager
def own_random_numbers(devices: Iterable[torch.device] | None = None) -> Iterator[None]:
    """Random numbers drawn inside leave the caller's streams where they were, on the CPU and these devices, or all."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(None if devices is None else list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def seeded(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """What a model draws inside, of torch, numpy and Python, follows from the seed alone.

    >>> with seeded(nn.Linear(2, 2)):
    ...     first = torch.rand(2)
    >>> with seeded(nn.Linear(2, 2)):
    ...     print(torch.equal(torch.rand(2), first))
    True
    """
    devices = {each.device for each in parameters_of(model).values() if each.is_cuda}
    with own_random_numbers(devices):
        for start in (torch.manual_seed, random.seed, np.random.seed):
            start(seed)
        yield
