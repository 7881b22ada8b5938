"""Fine-tuning in several processes: when they must look for parameters without gradients."""

import random

import accelerate
import numpy as np
import pytest
import torch
from conftest import must_fail
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gmcompress.tuning import Recipe
from gmcompress.tuning.running import Run


class Headed(nn.Module):
    """A small network with BatchNorm and dropout, and perhaps a head that no output reaches."""

    def __init__(self, *, head: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.Linear(16, 3)
        )
        self.head = nn.Linear(16, 4) if head else None

    def forward(self, inputs):
        return self.body(inputs)


def loader(generator=None):
    inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 8, shuffle=True, generator=generator)


@pytest.mark.parametrize("head", [False, True])
def test_what_wraps_the_model_looks_for_gradients_only_where_some_are_missing(head, monkeypatch):
    seen = []

    class Wrapped(nn.Module):
        def __init__(self, module, **options):
            super().__init__()
            self.module = module
            seen.append(options)

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapped)
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", "MULTI_CPU")
    Run(Headed(head=head), None, loader(), Recipe(epochs=1, lr=0.1, device="cpu"))
    assert [options.get("find_unused_parameters", False) for options in seen] == [head]


def state_of(run, generator):
    """All that looking at the gradients of a batch could have changed."""
    tensors = [each.clone() for each in run.plain.state_dict().values()]
    gradients = [each.grad for each in run.plain.parameters()]
    modes = [module.training for module in run.plain.modules()]
    streams = (torch.get_rng_state(), generator.get_state(), random.getstate(), *np.random.get_state()[1:3])
    return tensors, gradients, modes, streams, run.optimizer.state_dict()


def assert_same_state(first, second):
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_tells_what_the_loss_leaves_out_and_changes_nothing(head, frozen):
    generator = torch.Generator().manual_seed(3)
    model = Headed(head=head)
    model.body[1].eval()
    if head and frozen:
        model.head.requires_grad_(False)
    run = Run(model, Headed(head=False), loader(generator), Recipe(epochs=1, lr=0.1, device="cpu"))
    run.loader.synchronized_generator = generator  # as in several processes
    before = state_of(run, generator)
    assert run.leaves_parameters_out() == (head and not frozen)
    assert_same_state(before, state_of(run, generator))
    run.epoch(0, steps=run.steps, peak=0.1, progress=None)
    must_fail(assert_same_state, before, state_of(run, generator))
