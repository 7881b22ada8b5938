"""From a weight to the best structured weight: group part and residuals, fitted in float64 and returned as stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .errors import GMError
from .groups import Group
from .structure import (
    Structure,
    as_structure,
    as_view,
    check_weight,
    diagonals,
    expand,
    lowrank_weight,
    orbit_means,
)

SWEEPS = 100  # of the alternating projections of group part and low rank; they stop earlier when nothing moves


@dataclass(frozen=True)
class Fit:
    """A weight as its structure stores it, and how near it came.

    `tensors` are named and shaped by `structure.shapes`, in the dtype of the weight. `relative_error` is
    ‖W − Ŵ‖/‖W‖, `distance` is that of the nearest group matrix alone, without a residual; both Frobenius.
    """

    structure: Structure
    tensors: Mapping[str, Tensor]
    relative_error: float
    distance: float

    def __repr__(self) -> str:
        return f"Fit({str(self.structure)!r}, relative_error={self.relative_error:.4g}, distance={self.distance:.4g})"


def project(weight: Tensor, structure: Structure | Group | str) -> Fit:
    """The nearest weight of the given structure.

    Group part alone: the mean over orbits. With displacement rank r: the closed form, column means of the group
    diagonals F plus the truncated SVD of the row-centred F, exact. With low rank: exact projections on both sets
    alternate from the group part on, so that the error never grows; the result is a local minimum.

    Raises:
        GMError: the shape does not fit, the weight is not finite, or a rank exceeds what the matrix can have.
    Source: GM paper for the displacement rank; Eckart and Young 1936, theorem of the nearest matrix of given rank.

    >>> project(torch.eye(4), "C4").relative_error
    0.0
    """
    structure = as_structure(structure)
    exact = check_weight(weight)
    _check_ranks(structure, tuple(weight.shape))
    tensors = _group_part(exact, structure)
    if structure.lowrank:
        tensors = _alternate(exact, structure, tensors)
    plain = structure.with_rank(0, residual="lowrank")
    group_only = expand({"kernel": orbit_means(exact, plain)}, plain, weight.shape)
    return Fit(
        structure=structure,
        tensors={name: each.to(weight.dtype).contiguous() for name, each in tensors.items()},
        relative_error=relative_error(expand(tensors, structure, weight.shape), exact),
        distance=relative_error(group_only, exact),
    )


def relative_error(approximation: Tensor, weight: Tensor) -> float:
    """‖Ŵ − W‖/‖W‖, Frobenius; 0 for a zero weight met exactly."""
    error, norm = float((approximation - weight).norm()), float(weight.norm())
    return error / norm if norm else error


def _check_ranks(structure: Structure, shape: tuple[int, ...]) -> None:
    _, i, carried = structure.blocks(shape)
    left = prod(structure.shapes(shape).get("left", (shape[0], 1))[:-1])  # rows of the matrix of low rank
    limits = {
        "displacement": min(structure.rows.size - 1, i * structure.points * carried),
        "lowrank": min(left, prod(shape) // left),
    }
    for what, limit in limits.items():
        rank = getattr(structure, what)
        if rank > limit:
            raise GMError(
                f"{what} rank {rank} is more than a weight of shape {shape} can have with {structure}: {limit}"
            )


def _group_part(weight: Tensor, structure: Structure) -> dict[str, Tensor]:
    """Group matrix and displacement residual, the closed form."""
    kernel = orbit_means(weight, structure)
    if not structure.displacement:
        return {"kernel": kernel}
    rows = diagonals(weight, structure).flatten(2)  # (o, n, columns·taps)
    u, s, vh = truncated_svd(rows - rows.mean(1, keepdim=True), structure.displacement)
    # gates of root mean square 1, as the constant gate of the kernel, so that kernel and filters train on one scale
    scale = structure.group.order**0.5
    shapes = structure.shapes(weight.shape)
    gates = (u * scale).transpose(1, 2).reshape(shapes["gates"])
    filters = (s[..., None] * vh / scale).reshape(shapes["filters"])
    return {"kernel": kernel, "gates": gates, "filters": filters}


def _low_rank(weight: Tensor, structure: Structure) -> dict[str, Tensor]:
    u, s, vh = truncated_svd(as_view(weight, structure), structure.lowrank)
    shapes = structure.shapes(weight.shape)
    left, right = u * s.sqrt(), s.sqrt()[:, None] * vh
    return {"left": left.reshape(shapes["left"]), "right": right.reshape(shapes["right"])}


def _alternate(weight: Tensor, structure: Structure, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Group part and low rank by turns, each exact for what the other leaves."""
    only_group = structure.with_rank(structure.displacement, residual="displacement")
    group, error = start, float("inf")
    for _ in range(SWEEPS):
        rest = weight - expand(group, only_group, weight.shape)
        low = _low_rank(rest, structure)
        rest = weight - lowrank_weight(low, structure, weight.shape)
        group = _group_part(rest, only_group)
        before, error = error, float((rest - expand(group, only_group, weight.shape)).norm())
        if error >= before * (1 - 1e-6):
            break
    return {**group, **low}


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:  # (*b, n, m) -> (*b, n, r), (*b, r), ...
    """The leading `rank` singular triples.

    Where few of many are wanted, the leading eigenvectors of the smaller Gram matrix span the space and a Rayleigh–Ritz
    step on the matrix itself restores the digits that squaring lost.
    """
    n, m = matrix.shape[-2:]
    if n > m:
        u, s, vh = truncated_svd(matrix.mT, rank)
        return vh.mT, s, u.mT
    if n <= 32 or 3 * rank > n:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]
    _, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    basis, _ = torch.linalg.qr(matrix.mT @ vectors[..., -rank:])  # (*b, m, r)
    u, s, inner = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u, s, inner @ basis.mT


def svd_error(weight: Tensor, stored: int, *, conv_groups: int = 1) -> float:
    """The control: relative error of plain truncated SVD with at most `stored` numbers; 1 where not even rank 1 fits.

    For a convolution the better of the two views is taken, out × in·taps and out·ky × in·kx. A grouped convolution
    has one matrix, and the same rank, in each of its groups.
    """
    exact = check_weight(weight)
    apart = exact.reshape(conv_groups, exact.shape[0] // conv_groups, *exact.shape[1:])
    views = [apart.flatten(2)]
    if apart.dim() == 5 and apart.shape[3] > 1 and apart.shape[4] > 1:
        views.append(apart.transpose(2, 3).flatten(3).flatten(1, 2))
    total = float(exact.square().sum())
    errors = []
    for view in views:
        rank = stored // (conv_groups * sum(view.shape[1:]))
        short = view if view.shape[1] <= view.shape[2] else view.mT
        energies = torch.linalg.eigvalsh(short @ short.mT).clamp_min(0)  # ascending
        lost = energies[:, : max(energies.shape[1] - rank, 0)].sum()
        errors.append((float(lost) / total) ** 0.5 if total else 0.0)
    return min(errors)
