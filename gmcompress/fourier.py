"""The real Fourier transform of a finite group: an orthogonal basis in which group matrices fall into small blocks.

W[x, y] = f(x⁻¹y) commutes with the left translations of the group, so on R^n it splits as they do: for every real
irreducible representation of dimension d, whose endomorphisms are the real numbers, the complex numbers or the
quaternions (K = 1, 2, 4), one block of size d that stands there d/K times. In the basis Q of this room QᵀWQ is exactly
that. Tensors only; the products are in `products`, and those of small kernels on cyclic products in `spectra`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import GMError
from .groups import Group
from .groups.families import cyclic, direct
from .groups.group import Indices

Matrix = NDArray[np.float64]

MERGED = 64  # factors of a direct product are transformed together up to this order, which spares passes over memory
MAX_AXIS = 1024  # order of a group without factors: its basis is a dense matrix
EXACT = 1e-10  # largest entry of QᵀWQ that should be zero, relative to the largest one of W
ATTEMPTS = 8  # random elements to find the irreducible subspaces by; one is enough but for unlucky eigenvalues


@dataclass(frozen=True, eq=False)
class Irreducibles:
    """The real irreducible representations of one size: `count` blocks of `size`, each standing there `copies` times.

    Columns `start` to `start + count·copies·size` of the basis belong to them, in the order (block, copy, entry).
    """

    start: int
    count: int
    copies: int
    size: int
    matrices: Tensor  # (count, size, size, n): Σ_g f(g) · matrices[..., g] is the block of W[x, y] = f(x⁻¹y)

    @property
    def stop(self) -> int:
        """One behind the last column."""
        return self.start + self.count * self.copies * self.size


@dataclass(frozen=True, eq=False)
class Fourier:
    """The real Fourier transform of a group: `basis` (n, n) is orthogonal, its columns ordered as `parts` say."""

    basis: Tensor
    parts: tuple[Irreducibles, ...]

    @property
    def order(self) -> int:
        """The order of the group."""
        return len(self.basis)


@lru_cache(maxsize=64)
def fourier_axes(group: Group) -> tuple[Fourier, ...]:
    """The transforms of the factors of a group, small ones merged; that of the group is their Kronecker product.

    Raises:
        GMError: a factor that is no direct product has an order above 1024.
    Source: Serre 1977, Linear Representations of Finite Groups, sections 6.2 and 13.2.

    >>> [axis.order for axis in fourier_axes(direct(cyclic(4), cyclic(4), cyclic(32)))]
    [16, 32]
    """
    merged: list[list[Group]] = []
    for each in group.factors or (group,):
        if merged and prod(factor.order for factor in merged[-1]) * each.order <= MERGED:
            merged[-1].append(each)
        else:
            merged.append([each])
    return tuple(fourier(direct(*each)) for each in merged)


@lru_cache(maxsize=64)
def fourier(group: Group) -> Fourier:
    """The real Fourier transform of a group in float64, without use of its factors but where all are cyclic.

    Raises:
        GMError: the order is above 1024.

    >>> transform = fourier(cyclic(3))
    >>> [(part.count, part.copies, part.size) for part in transform.parts]
    [(1, 1, 1), (1, 1, 2)]
    """
    if group.order > MAX_AXIS:
        raise GMError(f"{group}: the Fourier basis of a group that is no product is limited to order {MAX_AXIS}")
    with torch.device("cpu"):  # whatever torch's default is
        factors = group.factors or (group,)
        if all(np.array_equal(each.table, cyclic(each.order).table) for each in factors):
            return _of_characters([each.order for each in factors])
        for attempt in range(ATTEMPTS):
            found = _of_subspaces(group, torch.Generator().manual_seed(attempt))
            if found is not None and defect(found, group) < EXACT:
                return found
    raise AssertionError(f"no Fourier basis was found for {group}")


def defect(transform: Fourier, group: Group) -> float:
    """How far QᵀWQ is from its blocks for a random W, and Q from orthogonal: the largest wrong entry, relative."""
    values = torch.randn(group.order, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, matrix = transform.basis, group_matrix(values, group)
    blocks = []
    for part in transform.parts:
        each = part.matrices @ values  # (count, size, size)
        blocks += [each[number] for number in range(part.count) for _ in range(part.copies)]
    wrong = (basis.T @ matrix @ basis - torch.block_diag(*blocks)).abs().max() / matrix.abs().max()
    skew = (basis.T @ basis - torch.eye(group.order, dtype=torch.float64)).abs().max()
    return float(torch.maximum(wrong, skew))


def group_matrix(values: Tensor, group: Group) -> Tensor:  # (n,) -> (n, n)
    """W[x, y] = f(x⁻¹y)."""
    return values[torch.tensor(group.table[group.inverse])]


def characters(
    orders: Sequence[int],
    which: Indices,  # (c, d)
    points: Indices,  # (p, d)
) -> tuple[Matrix, Matrix]:  # (c, p), (c, p)
    """Real and imaginary part of exp(2πi Σ_j a_j b_j/k_j): characters a of C_k1 × … × C_kd at points b, in float64.

    >>> [each.round().tolist() for each in characters([4], np.array([[1]]), np.arange(4)[:, None])]
    [[[1.0, 0.0, -1.0, -0.0]], [[0.0, 1.0, 0.0, -1.0]]]
    """
    n = prod(orders)
    angles = 2 * np.pi * (which * (n // np.array(orders)) @ points.T % n) / n  # exact up to here
    return np.cos(angles), np.sin(angles)


def _of_characters(orders: list[int]) -> Fourier:
    """Cosines and sines of a product of cyclic groups; the pairs of a character and its conjugate are blocks of 2."""
    points = np.stack(np.unravel_index(np.arange(prod(orders)), orders), 1)  # (n, factors), the first slowest
    n = len(points)
    conjugate = np.ravel_multi_index(tuple((-points % np.array(orders)).T), orders)
    every = np.arange(n)
    real, pairs = every[conjugate == every], every[conjugate > every]
    cosines, sines = characters(orders, points, points)
    both = np.stack([cosines[pairs], sines[pairs]], axis=1) * np.sqrt(2 / n)
    basis = np.concatenate([cosines[real] / np.sqrt(n), both.reshape(-1, n)]).T
    parts = [Irreducibles(0, len(real), 1, 1, torch.tensor(cosines[real][:, None, None]))]
    if len(pairs):
        rows = [[cosines[pairs], sines[pairs]], [-sines[pairs], cosines[pairs]]]
        parts.append(Irreducibles(len(real), len(pairs), 1, 2, torch.tensor(np.array(rows)).movedim(2, 0)))
    return Fourier(torch.tensor(basis.copy()), tuple(parts))


def _with_matrices(spaces: list[tuple[int, Tensor]], group: Group) -> Fourier:
    """The transform of spaces (copies, columns ordered (copy, entry)), those of one size together, small ones first.

    The entry (e, e') of the block of the element g is Σ_x q_e(x) q_e'(x·g), over the first copy.
    """
    moved = torch.tensor(group.table)  # [x, g] = x·g
    spaces = sorted(spaces, key=lambda each: (each[1].shape[1] // each[0], each[0]))
    parts: list[Irreducibles] = []
    for copies, columns in spaces:
        size = columns.shape[1] // copies
        first = columns[:, :size]
        matrix = torch.einsum("xe,xgf->efg", first, first[moved])[None]
        if parts and (parts[-1].copies, parts[-1].size) == (copies, size):
            last = parts.pop()
            matrix = torch.cat([last.matrices, matrix])
            parts.append(Irreducibles(last.start, last.count + 1, copies, size, matrix))
        else:
            parts.append(Irreducibles(parts[-1].stop if parts else 0, 1, copies, size, matrix))
    return Fourier(torch.cat([each for _, each in spaces], dim=1), tuple(parts))


def _of_subspaces(group: Group, generator: torch.Generator) -> Fourier | None:
    """The transform from the eigenspaces of a random symmetric group matrix, which are irreducible, or None if unlucky.

    Other random group matrices are maps between equivalent ones; by Schur's lemma they are multiples of isometries,
    which carry one basis to all of them.
    """
    n = group.order

    def draw() -> Tensor:
        return group_matrix(torch.randn(n, generator=generator, dtype=torch.float64), group)

    values, vectors = torch.linalg.eigh(_symmetric(draw()))
    edges = (torch.nonzero(values.diff() > 1e-8 * values.abs().max()).flatten() + 1).tolist()
    spaces = list(vectors.split(np.diff([0, *edges, n]).tolist(), dim=1))
    maps = [draw() for _ in range(4)]
    found: list[tuple[int, Tensor]] = []
    while spaces:
        links = [(each, each.T @ maps[0] @ spaces[0]) for each in spaces if each.shape[1] == spaces[0].shape[1]]
        alike = [(each, link / link.norm()) for each, link in links if link.norm() > 1e-6]
        dimension, copies = spaces[0].shape[1], len(alike)  # in the regular representation d/K equivalent ones
        frame = None
        if dimension % copies == 0:
            frame = _frame([spaces[0].T @ each @ spaces[0] for each in maps], dimension // copies, generator)
        if frame is None:
            return None
        carried = torch.stack([each @ link @ frame * dimension**0.5 for each, link in alike], dim=1)
        apart = carried.reshape(n, copies, copies, dimension // copies)  # (n, space, copy, unit)
        found.append((copies, apart.transpose(1, 2).reshape(n, -1)))
        spaces = [each for each in spaces if not any(each is other for other, _ in alike)]
    return _with_matrices(found, group)


def _symmetric(matrix: Tensor) -> Tensor:
    return matrix + matrix.T


def _frame(maps: list[Tensor], kind: int, generator: torch.Generator) -> Tensor | None:
    """An orthonormal basis (dimension, copies · K) of an irreducible subspace, ordered (copy, unit).

    The maps of the subspace to itself are quaternions, complex or real numbers; a unit i, j, k turns the first vector
    of a copy into the others, so that all of them act in the same way on every copy. None where they are not K.
    """
    units: list[Tensor] = []
    for each in maps[1:]:
        turned = (each - each.T) / 2
        for unit in units:
            turned = turned - unit * (unit * turned).sum() / len(turned)
        if turned.norm() > 1e-6 * each.norm():
            units.append(turned / turned.norm() * len(turned) ** 0.5)
    if 1 + len(units[:3]) != kind and not (kind == 4 and len(units) >= 2):
        return None
    if kind == 4:
        units = [units[0], units[1], units[0] @ units[1]]
    columns: list[Tensor] = []
    while len(columns) < len(maps[0]):
        vector = torch.randn(len(maps[0]), generator=generator, dtype=torch.float64)
        for _ in range(2):  # twice is enough against rounding
            for each in columns:
                vector = vector - each * (each @ vector)
        vector = vector / vector.norm()
        columns += [vector, *(unit @ vector for unit in units)]
    return torch.stack(columns, dim=1)
