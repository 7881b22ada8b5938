"""Random numbers that are the same each time, while the caller's streams of them stay where they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from .copies import parameters_of


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
    plain, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        for start in (torch.manual_seed, random.seed, np.random.seed):
            start(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numpy)
