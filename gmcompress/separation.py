"""Separable kernels on a group G = N·H: the two factors, the grid of taps, the nearest kernel of a kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import GMError, shown
from .groups import Group, axes_of, embed
from .groups import group as parse
from .groups.group import Indices
from .linalg import truncated_svd
from .structure import Separable, TapGrid, check_kind, check_weight, combine, separable_shapes

SWEEPS = 60  # of alternating least squares; each lowers the error
FILLINGS = 30  # of what lies beside the taps, at most

Factors = Sequence[str | Iterable[int]]


def factorise(group: Group, factors: Factors | None = None) -> tuple[Indices, Indices]:
    """(N, H): the elements of two subgroups such that every element of the group is x·h in one way, x of N, h of H.

    By default H is the last factor of a direct product and N the others; of a semidirect product N:H, and of a dihedral
    group, what the name says. `factors` gives two others, each as in `embed`; neither has to be normal.

    Raises:
        GMError: the group has no such name, or the two given do not make up the group.

    >>> [each.tolist() for each in factorise(parse("D4"))]
    [[0, 2, 4, 6], [0, 1]]
    """
    n = group.order
    if factors is not None:
        if isinstance(factors, str) or len(factors) != 2:
            raise GMError(f'factors are two subgroups, such as ([2], [1]) or ("C4", "C2"), not {shown(factors)}')
        normal, acting = (embed(group, each)[1] for each in factors)
    elif len(axes := axes_of(group)) > 1:
        normal, acting = np.arange(0, n, axes[-1]), np.arange(axes[-1])
    else:
        last = 2 if group.name[:1] == "D" and group.name[1:].isdigit() else _acting_order(group.name)
        if not last:
            raise GMError(f"{group} names no two factors; give them as factors=(generators of N, generators of H)")
        normal, acting = np.arange(0, n, last), np.arange(last)
    products = group.table[np.ix_(normal, acting)]
    if products.size != n or len(np.unique(products)) != n:
        sizes = f"{len(normal)} and {len(acting)} elements"
        raise GMError(f"factors of {sizes} do not make up {group}: every element must be x·h in exactly one way")
    return normal, acting


def _acting_order(name: str) -> int:
    """The order of H in a name N:H[rows], 0 where the name is not of this form."""
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter in "([<") - (letter in ")]>")
        if letter == ":" and depth == 0:
            return parse(name[place + 1 : name.rindex("[")]).order
    return 0


def grid_of(group: Group, taps: Indices, factors: Factors | None = None) -> tuple[Indices, Indices]:
    """The N-parts and the H-parts of some elements x·h, ascending: the smallest grid that holds the elements."""
    normal, acting = factorise(group, factors)
    products = group.table[np.ix_(normal, acting)]
    rows, columns = np.nonzero(np.isin(products, taps))
    return normal[np.unique(rows)], acting[np.unique(columns)]


def tap_grid(group: Group, taps: Indices, factors: Factors | None = None) -> TapGrid:
    """How taps lie on the smallest grid of two subgroups that holds them; all of them on N where no two are named.

    >>> str(tap_grid(parse("C8xC8"), np.array([0, 1, 7, 8, 56])))
    '3x3<0-3,6>'
    """
    try:
        rows, columns = grid_of(group, taps, factors)
    except GMError:
        return TapGrid((len(taps), 1))
    place = {int(element): at for at, element in enumerate(group.table[np.ix_(rows, columns)].ravel())}
    return TapGrid.of((len(rows), len(columns)), (place[int(tap)] for tap in taps))


def nearest_separable(weight: Tensor, structure: Separable) -> dict[str, Tensor]:
    """The tensors of a sum of separable kernels that come nearest to a weight (rows, columns, *taps), in float64.

    Where the taps leave some of their grid out, what the kernels are there is free: found by filling it in with what
    they were before, from zero on, until nothing moves; the error never grows.

    Raises:
        GMError: the taps are not those of the structure, or the weight is not finite.
    Source: Srebro and Jaakkola 2003, Weighted low-rank approximations, for the filling in.
    """
    exact, grid = check_weight(weight), structure.grid_of(weight.shape)
    kernel = exact.flatten(2)
    kind, terms = structure.kind, structure.terms
    found = separate(grid.whole(kernel), kind, terms=terms)
    if grid.places is None:
        return found
    best, error = found, float("inf")
    for _ in range(FILLINGS):
        whole = combine(found, kind)
        before, lost = error, float((grid.kernel(whole) - kernel).norm())
        if lost >= before * (1 - 1e-3):
            break
        best, error, filled = found, lost, grid.whole(kernel, whole)
        alone = kind == "dgseparable"  # which is not in closed form, and goes on from where it is
        found = _alternate(filled, **found, sweeps=2) if alone else separate(filled, kind, terms=terms)
    return best


def separate(
    kernel: Tensor,  # (o, i, |N|, |H|)
    kind: str,
    *,
    terms: int = 1,
) -> dict[str, Tensor]:
    """The tensors of a kind whose kernel is the Frobenius-nearest one, in the dtype of the kernel.

    In closed form, a truncated singular value decomposition for every output channel (for every pair of channels where
    gseparable); for dgseparable by alternating least squares from the nearest dseparable kernel, which finds a local
    optimum no worse than its start. Those in closed form are exact from min(|N|, i·|H|), min(|N|, |H|) and
    min(i, |N|·|H|) terms.

    Raises:
        GMError: the kernel has not four axes or is not finite, the kind is unknown, or there is less than one term.
    Source: Eckart and Young 1936; Knigge et al. 2022, section 3, for the kinds.

    >>> kernel = torch.ones(2, 3, 4, 5)
    >>> {name: tuple(each.shape) for name, each in separate(kernel, "separable").items()}
    {'outer': (1, 2, 4), 'inner': (1, 2, 3, 5)}
    """
    check_kind(kind)
    exact = check_weight(kernel)
    if exact.dim() != 4:
        raise GMError(f"a kernel to separate has shape (o, i, |N|, |H|), not {tuple(kernel.shape)}")
    if not isinstance(terms, int) or terms < 1:
        raise GMError(f"terms is an integer of at least 1, not {shown(terms)}")
    if kind == "nonseparable":
        return {"kernel": kernel.detach().clone()}
    found = _nearest(exact, kind, terms)
    o, i, x, h = exact.shape
    wanted = separable_shapes(kind, o, i, (x, h), terms)
    return {name: _padded(found[name], terms).reshape(shape).to(kernel) for name, shape in wanted.items()}


def _nearest(kernel: Tensor, kind: str, terms: int) -> dict[str, Tensor]:
    """Factors of every term, terms in front; there may be fewer terms than asked for."""
    if kind == "separable":
        outer, inner = _halves(kernel.transpose(1, 2).flatten(2), terms)  # (o, x, i·h)
        return {"outer": outer, "inner": inner}
    if kind == "gseparable":
        outer, inner = _halves(kernel, terms)
        return {"outer": outer, "inner": inner}
    mixing, outer = _halves(kernel.flatten(2), terms)  # (o, i, x·h)
    if kind == "dseparable":
        return {"mixing": mixing, "outer": outer}
    pieces = -(-terms // len(mixing))  # of every term, where there are fewer than wanted
    across, inner = _halves(outer.unflatten(-1, kernel.shape[2:]), pieces)  # (q, k, o, x), (q, k, o, h)
    start = [mixing.expand(len(across), *mixing.shape), across, inner]
    return _alternate(kernel, *(each.flatten(0, 1)[:terms] for each in start))


def _halves(matrices: Tensor, terms: int) -> tuple[Tensor, Tensor]:  # (*b, n, m) -> (k, *b, n), (k, *b, m)
    """The singular vectors, each times the root of its value."""
    u, s, vh = truncated_svd(matrices, min(terms, *matrices.shape[-2:]))
    root = s.sqrt()
    return (u * root[..., None, :]).movedim(-1, 0), (root[..., None] * vh).movedim(-2, 0)


def _padded(tensor: Tensor, terms: int) -> Tensor:
    """With zero terms behind, up to the number wanted."""
    return torch.cat([tensor, tensor.new_zeros(terms - len(tensor), *tensor.shape[1:])])


def _alternate(
    kernel: Tensor, mixing: Tensor, outer: Tensor, inner: Tensor, *, sweeps: int = SWEEPS
) -> dict[str, Tensor]:
    """Σ_k mixing ⊗ outer ⊗ inner for every output channel, one factor at a time at its least-squares optimum."""
    found = {"i": mixing, "x": outer, "h": inner}
    for _ in range(sweeps):
        for own in found:
            a, b = (each for each in found if each != own)
            gram = torch.einsum("koa,loa->okl", found[a], found[a]) * torch.einsum("kob,lob->okl", found[b], found[b])
            right = torch.einsum(f"oixh,ko{a},ko{b}->ok{own}", kernel, found[a], found[b])
            found[own] = (torch.linalg.pinv(gram, hermitian=True) @ right).transpose(0, 1)
    return {"mixing": found["i"], "outer": found["x"], "inner": found["h"]}
