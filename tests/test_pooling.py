"""Laws of pooling: every position is read once, and it commutes with the subgroup, for every subgroup of the market."""

import numpy as np
import pytest
import torch
from conftest import assert_close, must_fail
from market import SMALL, slow_act, slow_subgroups
from torch import Generator, Tensor, nn

from gmcompress.errors import GMError
from gmcompress.groups import factor_generators, group, word_lengths
from gmcompress.pooling import GroupPool, GroupUnpool, LiePool


def slow_pool(name: str, members: list[int], signal: Tensor, mode: str) -> Tensor:
    """Over the tile h·T, T the nearest element to the identity of every coset H·t, found one by one."""
    table = group(name).table
    lengths = word_lengths(group(name), factor_generators(group(name)))
    left, tile = set(range(len(table))), []
    for t in sorted(range(len(table)), key=lambda g: (lengths[g], g)):
        if t in left:
            tile.append(t)
            left -= {int(table[h, t]) for h in members}
    assert not left
    columns = []
    for h in members:
        values = torch.stack([signal[..., int(table[h, t])] for t in tile])
        columns.append(values.amax(0) if mode == "max" else values.mean(0))
    return torch.stack(columns, -1)


def assert_commutes(layer: nn.Module, signal: Tensor, acts: list[tuple[np.ndarray, int, np.ndarray, int]]) -> None:
    expected = layer(signal)
    for before, g, after, h in acts:
        assert_close(layer(slow_act(before, g, signal)), slow_act(after, h, expected))


@pytest.mark.parametrize("name", SMALL)
def test_pooling_and_unpooling_for_every_subgroup(name: str, generator: Generator) -> None:
    table = group(name).table
    for members in slow_subgroups(table):
        signal = torch.randn(1, 2, len(table), generator=generator, dtype=torch.float64)
        small = signal[..., : len(members)]
        for mode in ("max", "mean"):
            layer = GroupPool(name, members, mode)
            own = layer.out_group.table
            assert sorted(layer.tiles.flatten().tolist()) == list(range(len(table))), "every position is read once"
            assert_close(layer(signal), slow_pool(name, members, signal, mode))
            assert_commutes(layer, signal, [(table, g, own, h) for h, g in enumerate(members)])
        for mode in ("copy", "zero"):
            back = GroupUnpool(name, members, mode)
            assert_commutes(back, small, [(own, h, table, g) for h, g in enumerate(members)])
        assert_close(GroupPool(name, members, "mean")(GroupUnpool(name, members)(small)), small)


@pytest.mark.parametrize("name", ["C8", "D4", "C4xC2", "S4"])
def test_the_wrong_subgroup_and_the_wrong_cosets_are_noticed(name: str, generator: Generator) -> None:
    table = group(name).table
    signal = torch.randn(1, 2, len(table), generator=generator, dtype=torch.float64)
    members = next(each for each in slow_subgroups(table) if len(each) == 2)
    layer, outside = GroupPool(name, members), [g for g in range(len(table)) if g not in members]
    must_fail(assert_commutes, layer, signal, [(table, outside[0], layer.out_group.table, 1)])
    layer.tiles = layer.tiles.flatten()[torch.randperm(len(table), generator=generator)].reshape(layer.tiles.shape)
    must_fail(assert_commutes, layer, signal, [(table, members[1], layer.out_group.table, 1)])


def test_tiles_are_those_nearest_to_the_identity() -> None:
    assert GroupPool("C8xC8", "C4xC4").tiles[0].tolist() == [0, 1, 8, 9]
    assert GroupPool("C9", "C3").tiles.tolist() == [[0, 1, 8], [3, 4, 2], [6, 7, 5]]
    assert GroupPool("C9", "C3", generators=[2]).tiles[0].tolist() == [0, 2, 7]


def test_the_trivial_subgroup_makes_invariants(generator: Generator) -> None:
    signal, table = torch.randn(2, 3, 8, generator=generator), group("D4").table
    layer = GroupPool("D4", ())
    for g in range(8):
        assert torch.equal(layer(slow_act(table, g, signal)), layer(signal))


def test_axes_and_copies(generator: Generator) -> None:
    layer, back = GroupPool("C8xC4", "C4xC2", "mean"), GroupUnpool("C8xC4", "C4xC2", "zero")
    signal = torch.randn(2, 3, 8, 4, generator=generator)
    assert layer(signal).shape == (2, 3, 4, 2)
    assert back(layer(signal)).shape == signal.shape
    assert torch.equal(layer(signal).flatten(2), layer(signal.flatten(2)))
    assert_close(layer(signal), nn.functional.avg_pool2d(signal, 2))
    for each in (layer, back, GroupPool("D4", [2], generators=[1, 2])):
        again = eval(repr(each))
        assert repr(again) == repr(each)
        assert torch.equal(again.tiles, each.tiles)
        assert not each.state_dict()


def test_refused() -> None:
    with pytest.raises(GMError, match="several subgroups"):
        GroupPool("D4", "C2")
    with pytest.raises(GMError, match="mode"):
        GroupPool("D4", [1], "sum")
    with pytest.raises(GMError, match="mode"):
        GroupUnpool("D4", [1], "max")
    with pytest.raises(GMError, match="do not generate"):
        GroupPool("D4", [1], generators=[2])
    with pytest.raises(GMError, match="has shape"):
        GroupPool("C4xC2", "C2xC2")(torch.ones(1, 2, 4))


@pytest.mark.parametrize("mode", ["max", "mean"])
def test_pooling_on_lie_groups(mode: str, generator: Generator) -> None:
    signal = torch.randn(2, 3, 4, 6, 9, generator=generator, dtype=torch.float64)
    reduce = torch.amax if mode == "max" else torch.mean
    over_h, over_g, tiles = (LiePool(mode, over=over) for over in ("H", "G", 3))
    assert_close(over_h(signal), torch.stack([reduce(signal[:, :, :, i], 2) for i in range(6)], 2))
    assert_close(over_g(signal), reduce(over_h(signal), (2, 3)))
    expected = torch.stack(
        [reduce(signal[..., i : i + 3, j : j + 3], (3, 4)) for i in (0, 3) for j in (0, 3, 6)], 3
    ).unflatten(3, (2, 3))
    assert_close(tiles(signal), expected)
    must_fail(assert_close, tiles(signal.roll(1, 4)), expected)
    for each in (over_h, over_g, tiles):
        assert repr(eval(repr(each))) == repr(each)


def test_pooling_on_lie_groups_refused() -> None:
    for options, message in (({"mode": "sum"}, "mode"), ({"over": "K"}, "over"), ({"over": 0}, "over")):
        with pytest.raises(GMError, match=message):
            LiePool(**options)
    with pytest.raises(GMError, match="samples, height, width"):
        LiePool()(torch.ones(2, 3, 4, 5))
    with pytest.raises(GMError, match="do not divide"):
        LiePool(over=2)(torch.ones(2, 3, 4, 5, 4))
