"""Laws of groups, subgroups, quotients and of the sets a group acts on."""

import itertools

import numpy as np
import pytest
from conftest import must_fail
from market import GROUPS, NOT_GROUPS, SMALL, cayley

from gmcompress.errors import GMError
from gmcompress.groups import (
    Group,
    alternating,
    ball,
    cosets,
    cycle_notation,
    cyclic,
    dihedral,
    direct,
    fixed,
    from_permutations,
    from_table,
    grid,
    group,
    gset,
    identify,
    is_normal,
    isomorphism,
    largest_quotient,
    normal_subgroups,
    quaternion,
    quotient,
    quotients,
    semidirect,
    subgroup,
    symmetric,
    word_lengths,
)

TINY = [name for name in GROUPS if group(name).order <= 12]


def slow_closure(table: np.ndarray, generators: tuple[int, ...]) -> frozenset[int]:
    """All products of the generators, until nothing is new."""
    reached = {0, *generators}
    while True:
        larger = reached | {int(table[a, b]) for a in reached for b in reached}
        if larger == reached:
            return frozenset(reached)
        reached = larger


def all_subgroups(table: np.ndarray) -> set[frozenset[int]]:
    """Every subgroup of a group of order at most 12: three generators are enough for each."""
    return {slow_closure(table, chosen) for k in range(4) for chosen in itertools.combinations(range(len(table)), k)}


def renamed(table: np.ndarray) -> np.ndarray:
    """The same group with its elements, but for the identity, numbered at random."""
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(len(table) - 1)])
    return np.argsort(order)[table[np.ix_(order, order)]]


# ------------------------------------------------------------------------------------------------------------- groups


def assert_group(table: np.ndarray) -> None:
    n, every = len(table), np.arange(len(table))
    assert (table[0] == every).all(), "0 is not a left identity"
    assert (table[:, 0] == every).all(), "0 is not a right identity"
    assert (np.sort(table) == every).all(), "a row does not hold every element"
    assert (np.sort(table.T) == every).all(), "a column does not hold every element"
    if n <= 24:
        assert np.array_equal(table[table], table[:, table]), "not associative"
    a, b, c = np.random.default_rng(0).integers(0, n, (3, 20000))
    assert np.array_equal(table[table[a, b], c], table[a, table[b, c]]), "not associative"


@pytest.mark.parametrize("name", GROUPS)
def test_is_a_group_and_equals_its_twin(name: str) -> None:
    assert_group(group(name).table)
    np.testing.assert_array_equal(group(name).table, cayley(GROUPS[name]))


@pytest.mark.parametrize("table", NOT_GROUPS.values(), ids=NOT_GROUPS)
def test_control_of_what_is_no_group(table: list[list[int]]) -> None:
    must_fail(assert_group, np.array(table))
    with pytest.raises(GMError, match="not a group"):
        from_table(table)


def test_tables_tell_groups_apart() -> None:
    assert group("C4") != group("C2xC2")
    assert group("D4") != group("Q8")
    must_fail(np.testing.assert_array_equal, group("C4").table, cayley(GROUPS["C2xC2"]))
    must_fail(np.testing.assert_array_equal, group("C5:C4[2]").table, renamed(cayley(GROUPS["C5:C4[2]"])))


def assert_orders(each: Group, orders: np.ndarray, inverse: np.ndarray) -> None:
    for a in range(each.order):
        powers = [0]
        while not powers[1:] or powers[-1]:
            powers.append(int(each.table[powers[-1], a]))
        assert orders[a] == len(powers) - 1
        assert inverse[a] == powers[-2]


@pytest.mark.parametrize("name", GROUPS)
def test_inverses_orders_exponent_generators(name: str) -> None:
    each = group(name)
    assert_orders(each, each.element_orders, each.inverse)
    assert each.exponent == min(k for k in range(1, each.order + 1) if (k % each.element_orders == 0).all())
    assert each.is_abelian == all(each.table[a, b] == each.table[b, a] for a in range(each.order) for b in range(a))
    assert slow_closure(each.table, each.generators) == frozenset(range(each.order))
    if each.exponent > 2:
        must_fail(assert_orders, each, np.roll(each.element_orders, 1), each.inverse)
        must_fail(assert_orders, each, each.element_orders, np.arange(each.order))


@pytest.mark.parametrize("name", GROUPS)
def test_names_and_tables_round_trip(name: str) -> None:
    each = group(name)
    assert group(each.name) == each
    assert eval(repr(each)) == each
    for table in (each.table, renamed(each.table)):
        again = from_table(table)
        np.testing.assert_array_equal(again.table, table)
        np.testing.assert_array_equal(group(again.name).table, table)


@pytest.mark.parametrize("name", SMALL)
def test_isomorphisms(name: str) -> None:
    def assert_homomorphism(source: Group, target: Group, image: np.ndarray | None) -> None:
        assert image is not None
        assert sorted(image) == list(range(target.order))
        np.testing.assert_array_equal(image[source.table], target.table[np.ix_(image, image)])

    each, other = group(name), from_table(renamed(group(name).table))
    assert_homomorphism(each, other, isomorphism(each, other))
    assert_homomorphism(identify(other), other, isomorphism(identify(other), other))
    if each.order > 3:
        must_fail(assert_homomorphism, each, other, np.roll(np.arange(each.order), 1))


@pytest.mark.parametrize(
    ("first", "second"), [("D4", "Q8"), ("C4", "C2xC2"), ("D6", "Q12"), ("A4", "D6"), ("C5:C4[2]", "D10"), ("C2", "C3")]
)
def test_no_isomorphism(first: str, second: str) -> None:
    assert isomorphism(group(first), group(second)) is None


@pytest.mark.parametrize(("first", "second"), [("D3", "S3"), ("Q4", "C4"), ("C3:C4[2]", "Q12"), ("C2xS3", "D6")])
def test_isomorphic_families(first: str, second: str) -> None:
    assert isomorphism(group(first), group(second)) is not None
    assert identify(group(first)) == identify(group(second))


def test_permutations() -> None:
    assert from_permutations([(1, 2, 0), (1, 0, 2)]) == group("<(0 1 2),(0 1)>") == symmetric(3)
    assert group("<(0 1)(2)>").name == f"<{cycle_notation((1, 0, 2))}>"
    for wrong in ([], [(0, 0)], [(1, 2)], [(0, 1), (0, 1, 2)]):
        with pytest.raises(GMError):
            from_permutations(wrong)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "position", "found"),
    [
        ("", 0, "the end"),
        ("4", 0, "'4'"),
        ("Y4", 0, "'Y'"),
        ("C", 1, "the end"),
        ("C-4", 1, "'-'"),
        ("C4x", 3, "the end"),
        ("C4xx", 3, "'x'"),
        ("C4*C2", 2, "'*'"),
        ("C4)", 2, "')'"),
        ("(C4", 3, "the end"),
        ("C4^", 3, "the end"),
        ("C4^0", 3, "'0'"),
        ("C2^13", 3, "'1'"),
        ("C2^2^2", 4, "'^'"),
        ("C7:C3", 5, "the end"),
        ("C7:C3[", 6, "the end"),
        ("C7:C3[2", 7, "the end"),
        ("C4:C2[0 1 2 3/0 3 2]", 6, "'0'"),
        ("<0 1>", 1, "'0'"),
        ("<(0 1", 5, "the end"),
        ("<(0 1)", 6, "the end"),
        ("<(0 1),>", 7, "'>'"),
        ("C٤", 1, "'٤'"),
        ("<(0 1),(2 2)>", 7, "'('"),  # the permutation in which the point stands twice
    ],
)
def test_parse_errors_show_the_place(text: str, position: int, found: str) -> None:
    with pytest.raises(GMError) as caught:
        group(text)
    assert f"at position {position}:" in str(caught.value)
    assert f"found {found}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("C0", "C4097", "D2049", "Q4100", "Q6", "Q2", "S0", "S7", "S999999", "A8", "A999999", "C2^12xC2", "S6^2"),
        *("C99999999999999999999", "C2^99999999999999999999", "<(0 99999999)>", "<(0 4097)>", "<(0 0)>", "<>", "<()>"),
        *("(" * 40 + "C2" + ")" * 40, "(" * 100000, "C2x" * 30000 + "C2", "<(0 1 2 3 4 5 6),(0 1)>"),
        *("C7:C3[3]", "C0:C2[1]", "S3:C2[1]", "C4:C2[0 1 2 3/0 2 1 3]", "C4:C2[0 3 2 1/0 1 2 3]"),
        *("C4:C2[0 1 2 3/0 9 2 1]", "C4:C2[0 1 2 3]", "C4:C2[0 1 2 3/]", "C4:C2[/]", "C4:C2[0 0 0 0/0 0 0 0]"),
        *(f"C4:C2[0 1 2 3/0 {10**30} 2 1]", f"C4:C2[{'3' * 5000}]"),
    ],
)
def test_strings_refused(text: str) -> None:
    with pytest.raises(GMError) as caught:
        group(text)
    assert len(str(caught.value)) < 400


def test_largest_strings_accepted() -> None:
    for text in ("C4096", "D2048", "Q4096", "C2^12", "S6", "A7", "(" * 30 + "C2" + ")" * 30):
        assert group(text).order <= 4096


def test_constructors_refuse() -> None:
    large = np.add.outer(np.arange(4097), np.arange(4097)) % 4097
    for table in ([], [0], [[0, 1]], [[0.0]], large):
        with pytest.raises(GMError):
            from_table(table)
    for call in (
        lambda: cyclic(0),
        lambda: cyclic(2.0),  # type: ignore[arg-type]
        lambda: dihedral(-1),
        lambda: quaternion(10),
        lambda: symmetric(7),
        lambda: alternating(8),
        direct,
        lambda: direct(cyclic(65), cyclic(64)),
        lambda: semidirect(cyclic(3), cyclic(2), [[0, 1, 2]]),
        lambda: semidirect(cyclic(3), cyclic(2), [[0, 1, 2], [0, 2, 1.5]]),
        lambda: group(4),  # type: ignore[arg-type]
        lambda: subgroup(cyclic(4), [4]),
        lambda: ball(cyclic(4), -1),
        lambda: fixed(cyclic(2), 0),
        lambda: grid(cyclic(3), 3, 3),
        lambda: grid(cyclic(4), 3, 2),
        lambda: grid(cyclic(2), 0, 3),
        lambda: gset(cyclic(2), "H"),
        lambda: cosets(cyclic(2), [2]),
    ):
        with pytest.raises(GMError):
            call()


# ------------------------------------------------------------------------------------------------ subgroups, quotients


def assert_subgroup(each: Group, members: np.ndarray) -> None:
    inside = set(members.tolist())
    assert 0 in inside
    assert {int(each.table[a, b]) for a in inside for b in inside} == inside
    assert {int(each.inverse[a]) for a in inside} == inside
    assert each.order % len(inside) == 0


@pytest.mark.parametrize("name", SMALL)
def test_subgroups_are_closed(name: str) -> None:
    each = group(name)
    for generators in itertools.combinations(range(each.order), 2 if each.order <= 12 else 1):
        members = subgroup(each, generators)
        assert_subgroup(each, members)
        assert frozenset(members.tolist()) == slow_closure(each.table, generators)
        if len(members) > 2:
            must_fail(assert_subgroup, each, members[:-1])


@pytest.mark.parametrize("name", TINY)
def test_normal_subgroups_are_those_of_brute_force(name: str) -> None:
    def assert_all_normal(found: set[frozenset[int]]) -> None:
        t, inverse = each.table, each.inverse
        normal = {n for n in every if all(int(t[t[g, h], inverse[g]]) in n for g in range(each.order) for h in n)}
        assert found == normal
        assert {n for n in every if is_normal(each, sorted(n))} == normal

    each = group(name)
    every = all_subgroups(each.table)
    found = {frozenset(n.tolist()) for n in normal_subgroups(each)}
    assert_all_normal(found)
    must_fail(assert_all_normal, found - {frozenset([0])})
    if name in ("D3", "A4", "D6"):
        must_fail(assert_all_normal, every)


@pytest.mark.parametrize("name", SMALL)
def test_quotient_map_is_a_homomorphism(name: str) -> None:
    def assert_quotient(q: Group, projection: np.ndarray, normal: np.ndarray) -> None:
        assert_group(q.table)
        np.testing.assert_array_equal(projection[each.table], q.table[np.ix_(projection, projection)])
        np.testing.assert_array_equal(np.flatnonzero(projection == 0), normal)

    each = group(name)
    for normal in normal_subgroups(each):
        q, projection = quotient(each, normal.tolist())
        assert q.order * len(normal) == each.order
        assert_quotient(q, projection, normal)
        if q.order > 1:
            must_fail(assert_quotient, q, np.roll(projection, 1), normal)


def test_no_quotient_by_a_subgroup_that_is_not_normal() -> None:
    with pytest.raises(GMError, match="not normal"):
        quotient(dihedral(3), [1])


@pytest.mark.parametrize("name", SMALL)
def test_quotients_are_quotients(name: str) -> None:
    def assert_listed(listed: list[Group], literal: list[Group]) -> None:
        for each in listed:
            assert any(isomorphism(each, other) is not None for other in literal), each

    each = group(name)
    listed = list(quotients(each))
    literal = [quotient(each, n.tolist())[0] for n in normal_subgroups(each)]
    assert_listed(listed, literal)
    must_fail(assert_listed, [*listed, group("C5xC5")], literal)
    if not each.factors:
        assert_listed(literal, listed)
    assert listed[0].order == each.order
    assert listed[-1].name == "C1"
    assert [q.order for q in listed] == sorted((q.order for q in listed), reverse=True)
    assert all(group(q.name) == q for q in listed)


@pytest.mark.parametrize("name", SMALL)
def test_quotients_come_once(name: str) -> None:
    for first, second in itertools.combinations(quotients(group(name)), 2):
        assert isomorphism(first, second) is None, f"{first} and {second} are the same group"


@pytest.mark.parametrize(
    ("bound", "widths", "expected"),
    [
        ("C32xC32", (1024, 1024), "C32xC32"),
        ("C32xC32", (512, 256), "C16xC16"),
        ("C32xC32", (64, 64), "C8xC8"),
        ("C32xC32", (192, 768), "C8xC8"),
        ("C32xC32", (3, 64), "C1"),
        ("C2^6", (16, 48), "C2^4"),
        ("D4", (12, 4), "C2xC2"),
        ("S4", (6, 12), "D3"),
    ],
)
def test_largest_quotient(bound: str, widths: tuple[int, int], expected: str) -> None:
    found = largest_quotient(group(bound), int(np.gcd(*widths)))
    assert found.name == expected
    assert all(width % found.order == 0 for width in widths)


# --------------------------------------------------------------------------------------------------------- word metric


@pytest.mark.parametrize("name", SMALL)
def test_word_lengths(name: str) -> None:
    def assert_lengths(lengths: np.ndarray) -> None:
        layers, reached = [{0}], {0}
        while layers[-1]:
            layers.append({int(each.table[a, s]) for a in layers[-1] for s in moves} - reached)
            reached |= layers[-1]
        assert all(lengths[a] == radius for radius, layer in enumerate(layers) for a in layer)
        assert all(lengths[a] == -1 for a in range(each.order) if a not in reached)

    each = group(name)
    for generators in (each.generators, each.generators[:1], (each.order - 1,)):
        moves = {*generators, *each.inverse[list(generators)].tolist()}
        lengths = word_lengths(each, generators)
        assert_lengths(lengths)
        if each.order > 3:
            must_fail(assert_lengths, np.roll(lengths, 1))
        for radius in range(3):
            assert ball(each, radius, generators).tolist() == [a for a, k in enumerate(lengths) if 0 <= k <= radius]
    lengths = word_lengths(each)
    assert (lengths[each.table] <= lengths[:, None] + lengths).all(), "the triangle inequality"
    np.testing.assert_array_equal(lengths[each.inverse], lengths)


def test_quotients_of_equal_order_and_exponent_are_told_apart():
    names = [each.name for each in quotients(group("D3xC6"))]
    assert {"D3", "C6"} <= {identify(group(name)).name for name in names if group(name).order == 6}
    assert len({identify(group(name)).name for name in names}) == len(names)
