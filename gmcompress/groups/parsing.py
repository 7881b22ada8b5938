"""Group strings: "C8", "D4xC2", "C2^3", "C7:C3[2]", "<(0 1 2),(0 1)>" and how they are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ..errors import GMError
from .families import alternating, check_size, cyclic, dihedral, direct, quaternion, semidirect, symmetric
from .group import MAX_GENERATORS, Group, from_permutations

FAMILIES: dict[str, Callable[[int], Group]] = {
    "C": cyclic,
    "D": dihedral,
    "S": symmetric,
    "A": alternating,
    "Q": quaternion,
}

MAX_STRING = 1 << 16  # characters; the permutation strings of groups of order 64 stay below it
MAX_DEPTH = 32  # nested parentheses
MAX_POINTS = 4096  # of a permutation


def group(text: str | Group) -> Group:
    """The group that a string names; a Group is returned as it is.

    Cn cyclic, Dn dihedral of order 2n, Sn symmetric, An alternating, Qn quaternion of order n; `x` direct product, `^k`
    repeated product, parentheses; `Cn:Cm[k]` the semidirect product in which the generator of Cm multiplies Cn by k
    (in general `N:H[rows]`, one permutation of N per element of H); `<...>` permutations in cycle notation.

    Raises:
        GMError: the string is not of this form, with the position, or the group is larger than 4096.

    >>> group("D4xC2").order, group("C2^3").order, group("C7:C3[2]").order, group("<(0 1 2),(0 1)>").order
    (16, 8, 21, 6)
    """
    if isinstance(text, Group):
        return text
    if not isinstance(text, str):
        raise GMError(f'a group is given as a string such as "C4xC4", not as {type(text).__name__}')
    return _parse(text)


@lru_cache(maxsize=32)  # a table has up to 128 MiB
def _parse(text: str) -> Group:
    if len(text) > MAX_STRING:
        raise GMError(f"a group string of {len(text)} characters is too long; at most {MAX_STRING}")
    reader = _Reader(text)
    result = reader.product(0)
    if reader.at != len(text):
        raise reader.error("expected 'x', '^', ':' or the end")
    return result


class _Reader:
    """A recursive-descent reader; `at` is the position of the next character."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def error(self, problem: str) -> GMError:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        shown = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        families = ", ".join(f"{each}n" for each in FAMILIES)
        return GMError(
            f"group string {shown!r}: at position {self.at}: {problem}, found {found} "
            f'(families {families}; products "C4xC2", powers "C2^3")'
        )

    def take(self, pattern: str) -> str | None:
        match = re.compile(pattern).match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match.group()

    def need(self, pattern: str, wanted: str) -> str:
        taken = self.take(pattern)
        if taken is None:
            raise self.error(f"expected {wanted}")
        return taken

    def number(self, wanted: str) -> int:
        digits = self.need(r"[0-9]+", wanted)
        if len(digits) > 6:
            raise GMError(f"group string: the number {digits[:12]} at position {self.at - len(digits)} is too large")
        return int(digits)

    def numbers(self) -> list[int]:
        found = [self.number("a number")]
        while self.take(r" +"):
            found.append(self.number("a number"))
        return found

    def product(self, depth: int) -> Group:
        factors = [self.power(depth)]
        while self.take(r"[xX×]"):
            factors.append(self.power(depth))
        return direct(*factors) if len(factors) > 1 else factors[0]

    def power(self, depth: int) -> Group:
        base = self.twisted(depth)
        if not self.take(r"\^"):
            return base
        start = self.at
        exponent = self.number("an exponent")
        if not 1 <= exponent <= 12:
            self.at = start
            raise self.error("an exponent must be from 1 to 12")
        return direct(*[base] * exponent)

    def twisted(self, depth: int) -> Group:
        normal = self.atom(depth)
        if not self.take(":"):
            return normal
        acting = self.atom(depth)
        self.need(r"\[", "'[' with the action of the second group on the first")
        start = self.at
        numbers = [self.numbers()]
        while self.take("/"):
            numbers.append(self.numbers())
        self.need(r"\]", "a number or ']'")
        if len(numbers) == 1 and len(numbers[0]) == 1:
            return _multiplier(normal, acting, numbers[0][0])
        if len({len(row) for row in numbers}) != 1:
            self.at = start
            raise self.error("the rows of an action must be of equal length")
        return semidirect(normal, acting, np.array(numbers, dtype=np.int64))

    def atom(self, depth: int) -> Group:
        if depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} nested parentheses")
        if self.take(r"\("):
            inner = self.product(depth + 1)
            self.need(r"\)", "')'")
            return inner
        if self.take("<"):
            return self.permutations()
        start = self.at
        letter = self.need(r"[A-Za-z]", "the letter of a group family")
        if letter not in FAMILIES:
            self.at = start
            raise self.error(f"unknown group family {letter!r}")
        order = self.number(f"a number after {letter!r}")
        try:
            return FAMILIES[letter](order)
        except GMError as problem:
            raise GMError(f"group string {self.text[:80]!r}: at position {start}: {problem}") from None

    def permutations(self) -> Group:
        generators = [self.cycles()]
        while self.take(","):
            generators.append(self.cycles())
            if len(generators) > MAX_GENERATORS:
                raise self.error(f"more than {MAX_GENERATORS} permutations")
        self.need(">", "',' or '>' after a permutation")
        degree = 1 + max(point for each in generators for cycle in each for point in cycle)
        return from_permutations([_images(each, degree) for each in generators])

    def cycles(self) -> list[list[int]]:
        """One permutation; its points are checked here, where its position is known."""
        start, found = self.at, []
        while self.take(r"\(\s*"):
            cycle = [self.number("a point")]
            while self.take(r"\s+(?=[0-9])"):
                cycle.append(self.number("a point"))
            self.need(r"\s*\)", "a point or ')'")
            found.append(cycle)
        if not found:
            raise self.error("expected a cycle such as (0 1 2)")
        points = [point for cycle in found for point in cycle]
        if len(points) != len(set(points)) or max(points) >= MAX_POINTS:
            self.at = start
            few = f"permutations of more than {MAX_POINTS} points are not supported"
            raise self.error(few if max(points) >= MAX_POINTS else "a point stands twice in one permutation")
        return found


def _images(cycles: list[list[int]], degree: int) -> list[int]:
    images = list(range(degree))
    for cycle in cycles:
        for point, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            images[point] = following
    return images


def _multiplier(normal: Group, acting: Group, k: int) -> Group:
    """Cn:Cm[k]: the generator of Cm acts on Cn as multiplication by k."""
    n, m = normal.order, acting.order
    check_size(f"C{n}:C{m}[{k}]", n * m)
    if not (normal == cyclic(n) and acting == cyclic(m)):
        raise GMError(f"[{k}] as an action needs two cyclic groups, not {normal} and {acting}")
    if pow(k, m, n) != 1 % n:
        raise GMError(f"C{n}:C{m}[{k}]: {k}^{m} is {pow(k, m, n)} mod {n}, but it must be 1")
    powers = np.array([pow(k, h, n) for h in range(m)])
    return semidirect(normal, acting, np.outer(powers, np.arange(n)) % n, name=f"C{n}:C{m}[{k}]")
