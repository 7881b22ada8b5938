"""A subgroup as a group of its own: the string that names it, where its elements lie, and what tiles the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import GMError, shown
from .families import cyclic, direct
from .group import Group, Indices, from_table
from .parsing import group as parse
from .subgroups import _induced, subgroup, word_lengths

MAX_SEARCH = 512  # order of a group in which a subgroup is looked for by its isomorphism type


def axes_of(group: Group) -> tuple[int, ...]:
    """The orders of the direct factors: the axes of a signal on the group, whose index is mixed radix.

    >>> axes_of(parse("C4xC2")), axes_of(parse("D4"))
    ((4, 2), (8,))
    """
    return tuple(each.order for each in group.factors or (group,))


def factor_generators(group: Group) -> tuple[int, ...]:
    """Generators of the direct factors, each of which moves one axis: the word metric adds up over the axes.

    `group.generators` is as small as it can be made and may mix the axes; the two agree where there are no factors.

    >>> factor_generators(parse("C6xC2")), parse("C6xC2").generators
    ((2, 1), (2, 3))
    """
    if not group.factors:
        return group.generators
    steps = np.cumprod([1, *axes_of(group)[:0:-1]])[::-1]
    return tuple(
        int(each * step) for factor, step in zip(group.factors, steps, strict=True) for each in factor.generators
    )


def embed(group: Group | str, stride: str | Iterable[int]) -> tuple[Group, Indices]:
    """A subgroup H as (group, members): `members[h]` is the element of G that h is; members ascend, and 0 is 0.

    `stride` is a string or elements that generate H. A string names H up to isomorphism and is accepted where G has
    just one such subgroup; with as many factors as a direct product has it names a subgroup of each of them: "C4xC4" in
    C8xC8 is every second element of both axes, and "C1xC8" the second axis.

    Raises:
        GMError: an element is none of G, or a string fits no subgroup or several.

    >>> embed("C8xC8", "C4xC2")[1].tolist()
    [0, 4, 16, 20, 32, 36, 48, 52]
    >>> embed("D4", [2])[0].order
    4
    """
    whole, given = parse(group), as_given(stride)
    members = _named(whole, given) if isinstance(given, str) else subgroup(whole, given)
    return _as_group(whole, members), members


def as_given(stride: str | Iterable[int]) -> str | tuple[int, ...]:
    """A subgroup as it was given to `embed`, elements as a tuple, so that it can be kept and printed.

    Raises:
        GMError: it is neither a string nor elements.

    >>> as_given("C4"), as_given([2, 4])
    ('C4', (2, 4))
    """
    if not isinstance(stride, Iterable):
        raise GMError(f'a subgroup is a string such as "C4xC4" or the elements that generate it, not {shown(stride)}')
    return stride if isinstance(stride, str) else tuple(stride)


def _as_group(group: Group, members: Indices) -> Group:
    """The subgroup on 0 … m − 1; a product of cyclic groups where the members are one, axis by axis."""
    table = np.searchsorted(members, group.table[np.ix_(members, members)])
    apart = np.unravel_index(members, axes_of(group))
    parts = [len(np.unique(each)) for each in apart]
    if int(np.prod(parts)) == len(members):
        product = direct(*map(cyclic, parts))
        if np.array_equal(product.table, table):
            return product
    return group if len(members) == group.order else from_table(table)


def _named(group: Group, text: str) -> Indices:
    """The members of the one subgroup that a string means."""
    factors = group.factors or (group,)
    parts = _parts(text)
    if len(parts) != len(factors):
        return _only(group, parse(text), text)
    members = np.zeros(1, dtype=np.int64)
    for factor, part in zip(factors, parts, strict=True):
        members = (members[:, None] * factor.order + _only(factor, parse(part), text)).ravel()
    return members


def _parts(text: str) -> list[str]:
    """The factors of a product as they are written, powers written out; parse() leaves trivial ones no trace."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "([<") - (letter in ")]>")
        if letter in "xX×" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found: list[str] = []
    for part in parts:
        power = re.fullmatch(r"(.*)\^([0-9]{1,2})", part)
        found += [power[1]] * int(power[2]) if power else [part]
    return found


def _only(group: Group, wanted: Group, text: str) -> Indices:
    """The members of the only subgroup isomorphic to `wanted`."""
    if wanted.order == 1:
        return np.zeros(1, dtype=np.int64)
    if wanted == group:
        return np.arange(group.order, dtype=np.int64)
    if group == cyclic(group.order) and wanted.exponent == wanted.order and group.order % wanted.order == 0:
        return np.arange(0, group.order, group.order // wanted.order, dtype=np.int64)
    hint = "give elements that generate it, such as (1, 4)"
    if group.order > MAX_SEARCH:
        raise GMError(f"{text[:80]!r} is not looked for in {group} of order {group.order} > {MAX_SEARCH}; {hint}")
    first = None
    for members in _copies(group, wanted, ()):
        if first is not None and members != first:
            raise GMError(f"{text[:80]!r}: {group} has several subgroups {wanted}, for example {_some(first)}; {hint}")
        first = members
    if first is None:
        raise GMError(f"{text[:80]!r}: {group} has no subgroup {wanted}; {hint}")
    return np.array(sorted(first), dtype=np.int64)


def _some(members: frozenset[int]) -> list[int]:
    return sorted(members)[:12]


def _copies(group: Group, wanted: Group, images: tuple[int, ...]) -> Iterator[frozenset[int]]:
    """The images of all injective homomorphisms from `wanted`, one by one, repeated as they come."""
    mapped = _induced(wanted, group, wanted.generators[: len(images)], images)
    if mapped is None:
        return
    if len(images) == len(wanted.generators):
        yield frozenset(mapped.tolist())
        return
    order = wanted.element_orders[wanted.generators[len(images)]]
    taken = set(mapped[mapped >= 0].tolist())
    for candidate in np.flatnonzero(group.element_orders == order):
        if int(candidate) not in taken:
            yield from _copies(group, wanted, (*images, int(candidate)))


def transversal(
    group: Group,
    members: Indices,  # of a subgroup H
    generators: Iterable[int] | None = None,  # of the word metric; by default those of the direct factors
    *,
    side: str = "right",
) -> Indices:  # (n/|H|,)
    """One element of every coset, the nearest to the identity in the word metric, nearest first; ties to the smaller.

    Cosets H·t where `side` is "right", t·H where it is "left". With the right ones every g is h·t in one way, and the
    tiles h·T, which H moves onto each other from the left, cover the group without overlap.

    Raises:
        GMError: the generators do not generate the group.

    >>> whole = parse("C8xC8")
    >>> transversal(whole, embed(whole, "C4xC4")[1]).tolist()
    [0, 1, 8, 9]
    >>> transversal(parse("C8"), embed("C8", "C2")[1]).tolist()
    [0, 1, 7, 2]
    """
    if side not in ("right", "left"):
        raise GMError(f'side is "right", for cosets H·t, or "left", for cosets t·H, not {shown(side)}')
    lengths = word_lengths(group, factor_generators(group) if generators is None else generators)
    if (lengths < 0).any():
        raise GMError(f"the elements given do not generate {group}: they do not reach {int(np.argmin(lengths))}")
    products = group.table[members] if side == "right" else group.table[:, members].T  # (m, n)
    nearest_first = np.lexsort((np.arange(group.order), lengths))
    smallest = products.min(axis=0)[nearest_first]  # names the coset of each element
    first = np.unique(smallest, return_index=True)[1]
    return nearest_first[np.sort(first)].astype(np.int64)
