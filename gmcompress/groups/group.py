"""A finite group is its Cayley table: what a `Group` is, how a table is checked, what follows from the table alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import GMError

Indices = NDArray[np.int64]

MAX_ORDER = 4096  # the table has order² entries: 128 MiB of int64 at this order
MAX_GENERATORS = 64  # of permutations: one for each element but the identity, where a small table is written as them


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group of order n, given by its Cayley table.

    Conventions on which the whole package leans: element 0 is the identity, `table[a, b]` is a·b, actions are from the
    left (`action[g, x]` is g·x), and a structured weight satisfies W[g·x, g·y] = W[x, y].

    `name` is a string that `group()` parses back to the same table; it is empty for a large group given by its table.
    `factors` are the groups of which this one is the direct product, in the order of its mixed-radix element index.

    >>> from gmcompress.groups import group
    >>> group("C2xC3").order
    6
    """

    table: Indices  # (n, n)
    name: str = ""
    factors: tuple[Group, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self.table.setflags(write=False)

    def __repr__(self) -> str:
        return f"group({self.name!r})" if self.name else f"Group(order={self.order})"

    def __str__(self) -> str:
        return self.name or f"a group of order {self.order}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.order, self.table[: min(self.order, 64)].tobytes()))

    def __deepcopy__(self, memo: dict[int, object]) -> Group:
        return self  # immutable, and its table is large

    @property
    def order(self) -> int:
        """Number of elements, n."""
        return len(self.table)

    @cached_property
    def inverse(self) -> Indices:  # (n,)
        """`inverse[a]` is a⁻¹."""
        return np.argmax(self.table == 0, axis=1).astype(np.int64)

    @cached_property
    def is_abelian(self) -> bool:
        """Whether a·b = b·a for all elements."""
        return bool(np.array_equal(self.table, self.table.T))

    @cached_property
    def element_orders(self) -> Indices:  # (n,)
        """`element_orders[a]` is the least k ≥ 1 with aᵏ = 1."""
        orders = np.ones(self.order, dtype=np.int64)
        power = np.arange(self.order)
        while (alive := power != 0).any():
            power = np.where(alive, self.table[power, np.arange(self.order)], 0)
            orders += alive
        return orders

    @cached_property
    def exponent(self) -> int:
        """The least k ≥ 1 with aᵏ = 1 for every element a."""
        return int(np.lcm.reduce(self.element_orders))

    @cached_property
    def generators(self) -> tuple[int, ...]:
        """A small generating set: the elements of largest order first, each outside what the earlier ones generate."""
        chosen: list[int] = []
        reached = self.generated_by(())
        for element in np.argsort(-self.element_orders, kind="stable"):
            if len(reached) == self.order:
                break
            if element not in reached:
                chosen.append(int(element))
                reached = self.generated_by(chosen)
        return tuple(chosen)

    def generated_by(self, elements: Iterable[int]) -> frozenset[int]:
        """The elements of the subgroup that `elements` generate."""
        moves = self.check_elements(elements)
        reached = np.zeros(self.order, dtype=bool)
        reached[0] = True
        frontier = np.array([0])
        while len(frontier):
            images = np.unique(self.table[np.ix_(frontier, moves)]) if len(moves) else np.array([], dtype=np.int64)
            frontier = images[~reached[images]]
            reached[frontier] = True
        return frozenset(int(each) for each in np.flatnonzero(reached))

    def check_elements(self, elements: Iterable[int]) -> Indices:
        """The elements as an array, each once and in the order given.

        Raises:
            GMError: an element is not an integer in 0 … n − 1.
        """
        given = list(dict.fromkeys(elements))
        wrong = [each for each in given if not isinstance(each, (int, np.integer)) or not 0 <= each < self.order]
        if wrong:
            raise GMError(f"{wrong[0]!r} is no element of {self}: elements are the integers 0 to {self.order - 1}")
        return np.array(given, dtype=np.int64)


def from_table(table: ArrayLike, *, name: str = "") -> Group:
    """The group with the given Cayley table, after checking every axiom; element 0 must be the identity.

    Associativity is checked on generators only (Light's test), which costs n² per generator in place of n³.

    Raises:
        GMError: the table is not square, not Latin, has no identity at 0, or is not associative.
    Source: Light's associativity test, Clifford and Preston 1961, section 1.2.

    >>> from_table([[0, 1], [1, 0]]).order
    2
    """
    array = np.array(table)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise GMError(f"a Cayley table is square and not empty, but this one has shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise GMError(f"a Cayley table holds integers, but this one holds {array.dtype}")
    n = len(array)
    if n > MAX_ORDER:
        raise GMError(f"a group of order {n} is too large: at most {MAX_ORDER}, because its table has order² entries")
    array = array.astype(np.int64)
    every = np.arange(n)
    if not (np.array_equal(array[0], every) and np.array_equal(array[:, 0], every)):
        raise GMError("not a group: element 0 is not the identity (row 0 and column 0 must read 0, 1, 2, ...)")
    for what, rows in (("row", array), ("column", array.T)):
        bad = np.flatnonzero((np.sort(rows, axis=1) != every).any(axis=1))
        if len(bad):
            raise GMError(f"not a group: {what} {bad[0]} of the table does not hold every element once")
    for middle in _generators_of_loop(array):
        if not np.array_equal(array[array[:, middle]], array[:, array[middle]]):
            raise GMError(f"not a group: the product is not associative at element {middle}")
    return Group(array, name or permutation_name(array))


def _generators_of_loop(table: Indices) -> list[int]:
    """Elements whose closure under multiplication is everything; needs no associativity."""
    generators: list[int] = []
    reached = np.zeros(len(table), dtype=bool)
    reached[0] = True
    while not reached.all():
        generators.append(int(np.argmin(reached)))
        reached[generators[-1]] = True
        size = 0
        while size != reached.sum():
            size = reached.sum()
            members = np.flatnonzero(reached)
            reached[table[np.ix_(members, members)]] = True
    return generators


def from_permutations(generators: Sequence[Sequence[int]], *, name: str = "") -> Group:
    """The group generated by permutations of 0 … d − 1, each given as its list of images.

    The product is composition, (a·b)(x) = a(b(x)). Elements are numbered in breadth-first order from the identity, the
    generators applied from the left in the order given.

    Raises:
        GMError: a generator is no permutation, their degrees differ, there are more than 64 of them, or the group has
            more than 4096 elements.

    >>> from_permutations([(1, 2, 0), (1, 0, 2)]).order
    6
    """
    given = [tuple(int(image) for image in each) for each in generators]
    if not given:
        raise GMError("a permutation group needs at least one generator")
    if len(given) > MAX_GENERATORS:
        few = f"at most {MAX_GENERATORS}; a group of order {MAX_ORDER} needs no more than {MAX_ORDER.bit_length() - 1}"
        raise GMError(f"{len(given)} permutations are too many generators: {few}")
    degree = len(given[0])
    for each in given:
        if len(each) != degree or sorted(each) != list(range(degree)):
            raise GMError(f"{list(each)} is no permutation of 0 to {degree - 1}")
    table = _composed(np.array(given, dtype=np.int32))
    return Group(table, name or f"<{','.join(cycle_notation(each) for each in given)}>")


def _composed(moves: NDArray[np.int32]) -> Indices:  # (generators, points) -> (n, n)
    """The Cayley table of what permutations generate, elements numbered breadth first."""
    elements = [np.arange(moves.shape[1], dtype=np.int32)]
    index = {elements[0].tobytes(): 0}
    parents: list[tuple[int, int]] = [(0, 0)]  # element = generator · parent
    left: list[list[int]] = []  # left[element][generator] is generator · element
    while len(left) < len(elements):
        images = moves[:, elements[len(left)]]
        numbers = []
        for number, image in enumerate(images):
            found = index.setdefault(image.tobytes(), len(elements))
            if found == len(elements):
                if found == MAX_ORDER:
                    raise GMError(f"these permutations generate more than {MAX_ORDER} elements, which is too many")
                elements.append(image.copy())
                parents.append((number, len(left)))
            numbers.append(found)
        left.append(numbers)
    moved = np.array(left, dtype=np.int64)
    table = np.empty((len(elements), len(elements)), dtype=np.int64)
    table[0] = np.arange(len(elements))
    for element in range(1, len(elements)):
        number, parent = parents[element]
        table[element] = moved[table[parent], number]
    return table


def cycle_notation(permutation: Sequence[int]) -> str:
    """The permutation as a product of disjoint cycles; the largest point is always written, so that the degree is too.

    >>> cycle_notation((1, 0, 2))
    '(0 1)(2)'
    """
    seen: set[int] = set()
    cycles = []
    for start in range(len(permutation)):
        if start in seen:
            continue
        cycle = [start]
        while (following := int(permutation[cycle[-1]])) != start:
            cycle.append(following)
        seen.update(cycle)
        if len(cycle) > 1 or start == len(permutation) - 1:
            cycles.append("(" + " ".join(map(str, cycle)) + ")")
    return "".join(cycles)


def permutation_name(table: Indices) -> str:
    """A permutation-group string that parses back to exactly this table, or '' where it would be too long (n > 64)."""
    if len(table) > 64:
        return ""
    short = Group(table).generators or (0,)
    for generators in (short, range(1, len(table))):  # the second always gives the order of the table back
        candidate = from_permutations([tuple(table[each]) for each in generators])
        if np.array_equal(candidate.table, table):
            return candidate.name
    raise AssertionError("the left regular representation gives back its own table")
