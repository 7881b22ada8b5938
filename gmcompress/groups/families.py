"""The named families of finite groups, and the two products that build larger groups from smaller ones."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike

from ..errors import GMError
from .group import MAX_ORDER, Group, from_permutations


def check_size(name: str, order: int) -> None:
    """Refuse an order that is too large, before anything of that size is made.

    Raises:
        GMError: it is above 4096.
    """
    if order > MAX_ORDER:
        raise GMError(f"{name} has order {order}; groups of order up to {MAX_ORDER} are supported")


def _check_natural(family: str, n: int, least: int) -> None:
    if not isinstance(n, int | np.integer) or n < least:
        raise GMError(f"{family}n needs an integer n of at least {least}, not {n!r}")


def cyclic(n: int) -> Group:
    """The cyclic group of order n: element a is the rotation by a, a·b = a + b mod n.

    >>> cyclic(3).table.tolist()
    [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    _check_natural("C", n, 1)
    check_size(f"C{n}", n)
    every = np.arange(n)
    return Group((every[:, None] + every) % n, f"C{n}")


def dihedral(n: int) -> Group:
    """The symmetries of the regular n-gon, order 2n; element 2a + s is (rotation by a) · (reflection)^s.

    >>> dihedral(4).order
    8
    """
    _check_natural("D", n, 1)
    check_size(f"D{n}", 2 * n)
    inversion = (-np.arange(n)) % n
    return semidirect(cyclic(n), cyclic(2), [np.arange(n), inversion], name=f"D{n}")


def quaternion(n: int = 8) -> Group:
    """The generalised quaternion (dicyclic) group of order n, a multiple of 4; element 2a + s is xᵃ yˢ, y² = x^(n/4).

    >>> quaternion(8).element_orders.tolist()
    [1, 4, 4, 4, 2, 4, 4, 4]
    """
    _check_natural("Q", n, 4)
    check_size(f"Q{n}", n)
    if n % 4:
        raise GMError(f"Qn needs an n divisible by 4, not {n}")
    half = n // 2
    power, flip = np.divmod(np.arange(n), 2)
    sign = np.where(flip == 1, -1, 1)
    product = power[:, None] + sign[:, None] * power + (n // 4) * (flip[:, None] & flip)
    return Group(2 * (product % half) + (flip[:, None] ^ flip), f"Q{n}")


def symmetric(n: int) -> Group:
    """All permutations of n points, n ≤ 6.

    >>> symmetric(4).order
    24
    """
    _check_natural("S", n, 1)
    check_size(f"S{n}", int(np.prod(np.arange(1, min(n, 20) + 1), dtype=object)))
    cycle, swap = tuple((x + 1) % n for x in range(n)), (1, 0, *range(2, n))
    return from_permutations([cycle, swap[:n]] if n > 1 else [(0,)], name=f"S{n}")


def alternating(n: int) -> Group:
    """The even permutations of n points, n ≤ 7.

    >>> alternating(4).order
    12
    """
    _check_natural("A", n, 1)
    check_size(f"A{n}", int(np.prod(np.arange(1, min(n, 20) + 1), dtype=object)) // 2)
    cycles = [tuple({0: 1, 1: k, k: 0}.get(x, x) for x in range(n)) for k in range(2, n)]
    return from_permutations(cycles or [tuple(range(n))], name=f"A{n}")


def direct(*groups: Group) -> Group:
    """The direct product; element index is mixed radix, the first factor slowest, as in a Kronecker product.

    Trivial factors leave no trace, so a product of order n has at most log₂ n factors however often it is repeated.

    >>> direct(cyclic(2), cyclic(3)).is_abelian
    True
    """
    if not groups:
        raise GMError("a direct product needs at least one group")
    factors = tuple(leaf for each in groups for leaf in (each.factors or (each,)) if leaf.order > 1)
    if len(factors) < 2:
        return factors[0] if factors else groups[0]
    check_size("this direct product", int(np.prod([each.order for each in factors], dtype=object)))
    table = np.zeros((1, 1), dtype=np.int64)
    for each in factors:
        n, m = len(table), each.order
        table = (table[:, None, :, None] * m + each.table[None, :, None, :]).reshape(n * m, n * m)
    name = _product_name(factors) if all(each.name for each in factors) else ""
    return Group(table, name, factors)


def _product_name(factors: tuple[Group, ...]) -> str:
    parts = []
    for name, run in itertools.groupby(each.name for each in factors):
        count = len(list(run))
        parts.append(f"{name}^{count}" if count > 2 else "x".join([name] * count))
    return "x".join(parts)


def semidirect(
    normal: Group,  # order a
    acting: Group,  # order b
    homomorphism: ArrayLike,  # (b, a): row h is the automorphism of `normal` by which h acts
    *,
    name: str = "",
) -> Group:
    """The semidirect product N ⋊ H of order a·b: (x, h)·(y, k) = (x·φ_h(y), h·k); element index is x·b + h.

    Raises:
        GMError: a row is no automorphism, or the rows do not multiply as H does.

    >>> semidirect(cyclic(7), cyclic(3), [[k * x % 7 for x in range(7)] for k in (1, 2, 4)]).order
    21
    """
    phi = np.asarray(homomorphism)
    a, b = normal.order, acting.order
    check_size("this semidirect product", a * b)
    if phi.shape != (b, a) or not np.issubdtype(phi.dtype, np.integer):
        raise GMError(f"the homomorphism must be an integer array of shape {(b, a)}, not {phi.dtype} of {phi.shape}")
    for bad in np.flatnonzero((np.sort(phi, axis=1) != np.arange(a)).any(axis=1)):
        raise GMError(f"row {bad} of the homomorphism is no permutation of the normal subgroup's elements")
    for h in range(b):
        if not np.array_equal(phi[h][normal.table], normal.table[np.ix_(phi[h], phi[h])]):
            raise GMError(f"row {h} of the homomorphism is no automorphism of {normal}")
        if not np.array_equal(phi[acting.table[h]], phi[h][phi]):
            raise GMError(f"the rows of the homomorphism do not multiply as {acting} does (element {h})")
    left = normal.table[:, phi]  # (a, b, a): x · φ_h(y)
    table = left[:, :, :, None] * b + acting.table[None, :, None, :]
    return Group(table.reshape(a * b, a * b), name or f"{_operand(normal)}:{_operand(acting)}[{_rows(phi)}]")


def _operand(group: Group) -> str:
    return f"({group.name})" if group.factors or ":" in group.name else group.name


def _rows(phi: np.ndarray) -> str:
    return "/".join(" ".join(map(str, row)) for row in phi.tolist())
