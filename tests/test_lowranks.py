"""All low ranks of a weight at once: each as if it had been factored by itself, and its loss as if multiplied out."""

from math import prod

import pytest
import torch
from conftest import assert_close
from torch import Generator, Tensor

from gmcompress.factors import Metric, start_factors
from gmcompress.lowranks import low_ranks
from gmcompress.structure import Structure, expand

SHAPES = [((12, 10), 1, False), ((6, 8, 3, 3), 1, True), ((6, 8, 3, 3), 1, False), ((8, 3, 3, 2), 2, True)]


def moments(shape: tuple[int, ...], groups: int, generator: Generator) -> tuple[Tensor, Tensor]:
    m, rows = prod(shape[1:]), shape[0]
    roots = (
        torch.randn(groups, m, m, generator=generator).double(),
        torch.randn(rows, rows, generator=generator).double(),
    )
    inputs, outputs = (each @ each.mT for each in roots)
    return (inputs if groups > 1 else inputs[0]), outputs


@pytest.mark.parametrize("moment", ["none", "inputs", "outputs", "both"])
@pytest.mark.parametrize(("shape", "groups", "split"), SHAPES, ids=str)
def test_every_rank_is_as_by_itself(
    shape: tuple[int, ...], groups: int, split: bool, moment: str, generator: Generator
) -> None:
    inputs, outputs = moments(shape, groups, generator)
    metric = Metric(
        inputs if moment in ("inputs", "both") else None, outputs if moment in ("outputs", "both") else None
    )
    weight = torch.randn(shape, generator=generator).double()
    found = low_ranks(weight, metric, 5, split=split)
    assert found.largest == 5
    assert_close(found.losses[0], metric.loss(weight))
    for rank in range(1, 6):
        structure = Structure.factors(rank, split=split)
        alone = expand(start_factors(weight, structure, metric), structure, shape)
        leading = expand(found.leading(rank), structure, shape)
        assert_close(leading, alone)
        assert_close(found.losses[rank], metric.loss(alone - weight))


def test_an_exact_low_rank_loses_nothing(generator: Generator) -> None:
    weight = torch.randn(9, 2, generator=generator) @ torch.randn(2, 7, generator=generator)
    losses = low_ranks(weight, Metric(), 4, split=False).losses
    assert losses[1] > 1e-3
    assert float(losses[2:].max()) < 1e-10 * float(weight.square().sum())


def test_as_an_adapted_structure_it_is_the_same_weight(generator: Generator) -> None:
    weight, adapted = torch.randn(8, 8, generator=generator), Structure.factors(3, grid=(2, 4))
    found = low_ranks(weight, Metric(), 4, split=False)
    assert_close(
        expand(found.as_adapted(adapted), adapted, (8, 8)), expand(found.leading(3), Structure.factors(3), (8, 8))
    )
