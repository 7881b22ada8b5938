"""Laws of convolution between homogeneous spaces: it commutes with the group, and nothing else that is linear does."""

import itertools
from typing import Any

import pytest
import torch
from conftest import assert_close, must_fail
from market import GROUPS, slow_subgroups
from torch import Generator, Tensor

from gmcompress.errors import GMError
from gmcompress.groupconv import GroupConv
from gmcompress.groups import GSet, cosets, factor_generators, group, word_lengths
from gmcompress.homogeneous import HomogeneousConv

SMALL = [name for name in GROUPS if group(name).order <= 12]


def random_layer(*args: Any, generator: Generator, **options: Any) -> HomogeneousConv:
    layer = HomogeneousConv(*args, **options).double()
    for each in layer.parameters():
        torch.nn.init.normal_(each, generator=generator)
    return layer


def moved(points: GSet, g: int, signal: Tensor) -> Tensor:
    """(g·x)[g·y] = x[y]."""
    found = torch.empty_like(signal)
    found[..., torch.tensor(points.action[g])] = signal
    return found


def assert_commutes(layer: HomogeneousConv, rows: GSet, signal: Tensor) -> None:
    plain = layer(signal)
    for g in range(layer.group.order):
        assert_close(layer(moved(layer.columns, g, signal)), moved(rows, g, plain))


@pytest.mark.parametrize("name", SMALL)
def test_commutes_and_has_an_entry_for_each_double_coset(name: str, generator: Generator) -> None:
    whole = group(name)
    table = whole.table
    lengths = word_lengths(whole, factor_generators(whole))
    for source, target in itertools.product(slow_subgroups(table)[:6], repeat=2):
        double = {frozenset(int(table[table[k, u], h]) for k in target for h in source) for u in range(len(table))}
        for radius in (None, 1):
            layer = random_layer(name, 1, 2, source=source, target=target, radius=radius, generator=generator)
            near = [each for each in double if radius is None or min(lengths[list(each)]) <= radius]
            assert layer.kernel.shape == (2, 1, len(near))
            signal = torch.randn(1, 1, layer.columns.size, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                assert_commutes(layer, layer.rows, signal)


def test_from_the_group_to_itself_it_is_group_convolution(generator: Generator) -> None:
    for name, radius in (("D4", None), ("C4xC2", 1), ("S3", 1)):
        layer = random_layer(name, 2, 3, source=(), target=(), radius=radius, generator=generator)
        conv = GroupConv(name, 2, 3, radius=radius).double()
        conv.load_state_dict(layer.state_dict())
        signal = torch.randn(2, 2, conv.group.order, generator=generator, dtype=torch.float64)
        assert_close(layer(signal), conv(signal))


def test_lifting_then_convolving_is_convolving_the_lifted(generator: Generator) -> None:
    """A signal on G/H is one on G that H leaves alone from the right."""
    layer = random_layer("D4", 1, 2, source=[1], target=[4], generator=generator)
    signal = torch.randn(2, 1, layer.columns.size, generator=generator, dtype=torch.float64)
    table, members = layer.group.table, [0, 1]
    lifted = signal[..., torch.tensor(layer.columns.action[:, 0])]  # x[g] = x[gH]
    kernel = torch.zeros(2, 1, 8, dtype=torch.float64)
    for u in range(8):
        label = int(layer.labels[0, layer.columns.action[u, 0]])
        kernel[:, :, u] = layer.kernel.detach()[:, :, label] / len(members)
    conv = GroupConv("D4", 1, 2).double()
    conv.kernel.data, conv.bias.data = kernel, layer.bias.detach()
    on_group = conv(lifted)
    for g in range(8):
        assert_close(on_group[..., g], layer(signal)[..., int(layer.rows.action[g, 0])])
        assert_close(on_group[..., g], on_group[..., int(table[g, 4])])


def test_the_wrong_space_and_shuffled_labels_are_noticed(generator: Generator) -> None:
    layer = random_layer("D4", 1, 2, source=[1], target=[4], generator=generator)
    signal = torch.randn(1, 1, 4, generator=generator, dtype=torch.float64)
    assert_commutes(layer, layer.rows, signal)
    must_fail(assert_commutes, layer, cosets(layer.group, [1]), signal)
    layer.labels = layer.labels[:, torch.tensor([1, 0, 2, 3])]
    must_fail(assert_commutes, layer, layer.rows, signal)


def test_gradients_copies_and_refusals(generator: Generator) -> None:
    layer = random_layer("S3", 1, 2, source=[2], target=[1], radius=1, generator=generator)
    signal = torch.randn(2, 1, layer.columns.size, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (signal,))
    again = eval(repr(layer)).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(signal), layer(signal))
    with pytest.raises(GMError, match="has shape"):
        layer(torch.ones(1, 1, 6))
    for options, message in (
        ({"source": "C5", "target": ()}, "no subgroup"),
        ({"source": 3, "target": ()}, "a subgroup is a string"),
        ({"source": (), "target": (), "radius": -1}, "radius"),
    ):
        with pytest.raises(GMError, match=message):
            HomogeneousConv("S3", 1, 1, **options)
    with pytest.raises(GMError, match="in_channels"):
        HomogeneousConv("S3", 0, 1, source=(), target=())
