"""Laws of the sets a group acts on, and of subgroups as groups of their own."""

import itertools

import numpy as np
import pytest
from conftest import must_fail
from market import SMALL, slow_subgroups

from gmcompress.errors import GMError
from gmcompress.groups import (
    GSet,
    axes_of,
    cosets,
    embed,
    factor_generators,
    fixed,
    grid,
    group,
    gset,
    isomorphism,
    regular,
    subgroup,
    transversal,
    word_lengths,
)

# ---------------------------------------------------------------------------------------------------------------- sets


def assert_action(each: GSet) -> None:
    t, n = each.group.table, each.group.order
    np.testing.assert_array_equal(each.action[0], np.arange(each.size))
    for g, h in itertools.product(range(n), range(n)):
        np.testing.assert_array_equal(each.action[t[g, h]], each.action[g][each.action[h]])


@pytest.mark.parametrize("name", SMALL)
def test_regular_fixed_and_cosets_are_actions(name: str) -> None:
    each = group(name)
    assert_action(regular(each))
    assert_action(fixed(each, 3))
    for g in range(each.order):
        points, inside = cosets(each, [g]), subgroup(each, [g])
        assert_action(points)
        assert points.size * len(inside) == each.order
        np.testing.assert_array_equal(np.flatnonzero(points.action[:, 0] == 0), inside)  # the stabiliser of H is H
        assert len(np.unique(points.action[:, 0])) == points.size
        assert gset(each, points.name) == points
    assert regular(each).is_regular
    assert not fixed(each, each.order).is_regular or each.order == 1
    if each.order > 2:
        must_fail(assert_action, GSet(each, np.roll(each.table, 1, axis=0), "shuffled"))
    if not each.is_abelian:
        must_fail(assert_action, GSet(each, each.table.T.copy(), "an action from the right"))


TURNS = {"C1": (0, 1), "C2": (2, 1), "C4": (1, 1), "D1": (0, 2), "D2": (2, 2), "D4": (1, 2)}  # quarter turns, mirrors


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2, 2), (2, 3), (4, 1)])
def test_grid_turns_counterclockwise_and_mirrors_left_right(name: str, size: tuple[int, int]) -> None:
    quarter, mirrors = TURNS[name]

    def assert_moves_pictures(action: np.ndarray) -> None:
        picture = np.random.default_rng(0).normal(size=size)
        for element in range(group(name).order):
            turns, mirror = divmod(element, mirrors)
            moved = np.empty(picture.size)
            moved[action[element]] = picture.ravel()  # what was at x is now at g·x
            first_mirrored = np.fliplr(picture) if mirror else picture
            turned = np.rot90(first_mirrored, quarter * turns)  # counterclockwise, as np.rot90
            np.testing.assert_array_equal(moved.reshape(size), turned)

    if quarter == 1 and size[0] != size[1]:
        with pytest.raises(GMError, match="square"):
            grid(group(name), *size)
        return
    taps = grid(group(name), *size)
    assert_action(taps)
    assert_moves_pictures(taps.action)
    assert gset(group(name), taps.name) == taps
    if name == "C4" and size[0] > 1:
        must_fail(assert_moves_pictures, taps.action[group("C4").inverse])  # clockwise


# ------------------------------------------------------------------------------------------------------ embedding


@pytest.mark.parametrize("name", SMALL)
def test_subgroups_are_groups_of_their_own_and_tile_the_group(name: str) -> None:
    whole = group(name)
    table, lengths = whole.table, word_lengths(whole, factor_generators(whole))
    assert (lengths >= 0).all(), "the generators of the factors generate"
    for members in slow_subgroups(table):
        small, embedded = embed(whole, members)
        assert embedded.tolist() == members
        assert np.array_equal(embedded[small.table], table[np.ix_(members, members)])
        for side in ("right", "left"):
            tile = transversal(whole, embedded, side=side)
            products = table[np.ix_(members, tile)] if side == "right" else table[np.ix_(tile, members)]
            assert sorted(products.ravel().tolist()) == list(range(whole.order))
            for t in tile:
                coset = table[members, t] if side == "right" else table[t, members]
                assert lengths[t] == lengths[coset].min(), "another element of the coset is nearer"


@pytest.mark.parametrize("name", SMALL)
def test_strings_name_the_only_subgroup_of_their_type(name: str) -> None:
    whole = group(name)
    every = slow_subgroups(whole.table)
    for members in every:
        small, _ = embed(whole, members)
        alike = [each for each in every if isomorphism(embed(whole, each)[0], small) is not None]
        if whole.factors or len(small.factors) > 1:
            continue
        if len(alike) == 1:
            assert embed(whole, small.name)[1].tolist() == members
        else:
            with pytest.raises(GMError, match="several subgroups"):
                embed(whole, small.name)


@pytest.mark.parametrize(
    ("name", "text", "members"),
    [
        ("C8xC8", "C4xC4", [8 * a + b for a in range(0, 8, 2) for b in range(0, 8, 2)]),
        ("C8xC8", "C1xC8", list(range(8))),
        ("C4^3", "C2^2xC1", [0, 8, 32, 40]),
        ("D4xC2", "C4xC1", [0, 4, 8, 12]),
        ("D4", "C4", [0, 2, 4, 6]),
        ("S4", "A4", None),
        ("C6xC2", "C3", [0, 4, 8]),
        ("C32xC32", "C1xC1", [0]),
    ],
)
def test_strings_of_subgroups(name: str, text: str, members: list[int] | None) -> None:
    small, found = embed(name, text)
    assert members is None or found.tolist() == members
    assert small.order == len(found)
    if name == "C8xC8" and text == "C4xC4":
        assert axes_of(small) == (4, 4)


def test_embeddings_refused() -> None:
    for name, text in (("D4", "C2"), ("C4xC4", "C4"), ("C8", "C3"), ("C4", "Y2"), ("C4xC4", "C4xC4xC4"), ("C8xC8", 3)):
        with pytest.raises(GMError):
            embed(name, text)
    with pytest.raises(GMError, match="not looked for"):
        embed("D512", "C2xC2")
    with pytest.raises(GMError, match="side is"):
        transversal(group("C4"), np.array([0]), side="up")
    with pytest.raises(GMError, match="do not reach"):
        transversal(group("C4"), np.array([0]), [2])
