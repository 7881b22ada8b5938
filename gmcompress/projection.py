"""From a weight to the best structured weight: group part and factor part, fitted and returned as stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .errors import GMError
from .factors import Metric, start_factors, views_of
from .fitting import refine
from .groups import Group
from .linalg import small_gram, trailing_energy, truncated_svd
from .separation import nearest_separable
from .structure import (
    Structure,
    as_structure,
    check_weight,
    diagonals,
    distance,
    expand,
    factor_weight,
    orbit_means,
)

SWEEPS = 100  # of the alternating projections of group part and low rank; they stop earlier when nothing moves
EXACT = 1 << 13  # numbers up to which the factors of a weight are fitted in float64; in float32 above


@dataclass(frozen=True)
class Fit:
    """A weight as its structure stores it, and how near it came.

    `tensors` are named and shaped by `structure.shapes`, in the dtype of the weight. `relative_error` is
    ‖W − Ŵ‖/‖W‖, `distance` is that of the nearest group matrix alone, without a residual, None where the structure has
    no group; both Frobenius. `loss` is tr(G E S Eᵀ)/tr(G W S Wᵀ) for the metric of the fit: the part of the mean square
    of the layer's outputs that is lost; without a metric the square of the relative error.
    """

    structure: Structure
    tensors: Mapping[str, Tensor]
    relative_error: float
    distance: float | None
    loss: float

    def __repr__(self) -> str:
        far = "None" if self.distance is None else f"{self.distance:.4g}"
        return f"Fit({str(self.structure)!r}, relative_error={self.relative_error:.4g}, distance={far})"


def project(
    weight: Tensor,
    structure: Structure | Group | str,
    *,
    metric: Metric | None = None,
    iterations: int = 2000,
    effort: float = 3e11,
) -> Fit:
    """The nearest weight of the given structure, in the Frobenius norm or in that of a metric.

    Group part alone: the mean over orbits. With displacement rank r: the closed form, column means of the group
    diagonals F plus the truncated SVD of the row-centred F, exact. A low rank alone: the truncated SVD. Group part and
    low rank: exact projections on both sets alternate, so that the error never grows. Separable kernels: by
    `gmcompress.separation`, in the Frobenius norm whatever the metric. Adapted bases, and everything
    under a metric: L-BFGS from these starts (`gmcompress.fitting.refine`), at most `iterations` steps; the
    loss never grows, and the result is a local minimum, unless `effort` multiply-adds end the fit before.

    Raises:
        GMError: the shape does not fit, the weight is not finite, or a rank exceeds what the matrix can have.
    Source: GM paper for the displacement rank; Eckart and Young 1936, theorem of the nearest matrix of given rank.

    >>> project(torch.eye(4), "C4").relative_error
    0.0
    """
    structure = as_structure(structure)
    exact = check_weight(weight)
    shape = tuple(weight.shape)
    _check_ranks(structure, shape)
    metric = (metric or Metric()).to(exact.dtype)
    metric.check(shape)
    if structure.separable is not None or (structure.grid is None and metric == Metric()):
        tensors, away, lost = _start(exact, structure, metric)
    else:
        dtype = exactness(exact)
        limits: dict[str, Any] = {"iterations": iterations, "effort": effort}
        start, away, _ = _start(exact.to(dtype), structure, metric.to(dtype))
        tensors = refine(exact.to(dtype), structure, start, metric=metric.to(dtype), **limits)
        tensors, lost = {name: each.double() for name, each in tensors.items()}, None
    norm = float(exact.norm()) or 1.0
    found = expand(tensors, structure, shape) if lost is None else exact
    error = relative_error(found, exact) if lost is None else lost / norm
    return Fit(
        structure=structure,
        tensors={name: each.to(weight.dtype).contiguous() for name, each in tensors.items()},
        relative_error=error,
        distance=None if away is None else away / norm,
        loss=error**2 if metric == Metric() else metric.relative_loss(found, exact),
    )


def exactness(weight: Tensor) -> torch.dtype:
    """In which precision a weight's factors are fitted."""
    return torch.float64 if weight.numel() <= EXACT else torch.float32


def _start(exact: Tensor, structure: Structure, metric: Metric) -> tuple[dict[str, Tensor], float | None, float | None]:
    """The fit in the Frobenius norm; the distance to the group matrices, if any; the error, where it is known."""
    if structure.separable is not None:
        return nearest_separable(exact, structure.separable), None, None
    if structure.group is None:
        return start_factors(exact, structure, metric), None, None
    tensors, away, lost = _group_part(exact, structure)
    return (_alternate(exact, structure, tensors), away, None) if structure.lowrank else (tensors, away, lost)


def fitted_distance(fit: Fit, shape: tuple[int, ...]) -> float | None:
    """The distance of a fitted weight to the group matrices, relative to its own norm; None where there is no group.

    Exactly 0 without a residual. With gates it needs no dense weight: in group-diagonal coordinates the fitted weight
    is 1 (f + Σ_k mean(a_k) b_k)ᵀ + Σ_k (a_k − mean(a_k)) b_kᵀ, of which the second sum is orthogonal to the first.
    """
    structure = fit.structure
    if structure.group is None:
        return None
    if structure.lowrank:
        return distance(expand(fit.tensors, structure, shape), structure, relative=True)
    if not structure.displacement:
        return 0.0
    gates = fit.tensors["gates"].double()  # (o, r, n)
    filters = fit.tensors["filters"].double().flatten(2)  # (o, r, columns·taps)
    means = gates.mean(2, keepdim=True)
    rows = fit.tensors["kernel"].double().flatten(1) + (means * filters).sum(1)
    gates = gates - means
    away = float(((gates @ gates.mT) * (filters @ filters.mT)).sum().clamp_min(0))
    whole = structure.acting.order * float(rows.square().sum()) + away
    return (away / whole) ** 0.5 if whole else 0.0


def relative_error(approximation: Tensor, weight: Tensor) -> float:
    """‖Ŵ − W‖/‖W‖, Frobenius; 0 for a zero weight met exactly."""
    error, norm = float((approximation - weight).norm()), float(weight.norm())
    return error / norm if norm else error


def _check_ranks(structure: Structure, shape: tuple[int, ...]) -> None:
    left = prod(structure.shapes(shape).get("left", (shape[0], 1))[:-1])  # rows of the matrix of the factors
    limits = {"lowrank": min(left, prod(shape) // left)}
    if structure.group is not None:
        o, i, carried = structure.blocks(shape)
        limits["displacement"] = min(shape[0] // o - 1, i * structure.points * carried)
    for what, limit in limits.items():
        rank = getattr(structure, what)
        if rank > limit:
            raise GMError(
                f"{what} rank {rank} is more than a weight of shape {shape} can have with {structure}: {limit}"
            )


def _group_part(weight: Tensor, structure: Structure) -> tuple[dict[str, Tensor], float, float]:
    """Group matrix and displacement residual, the closed form; the distance to the group matrices; the error."""
    shapes = structure.shapes(weight.shape)
    if not structure.is_regular:
        kernel = orbit_means(weight, structure)
        plain = structure.with_rank(0, residual="lowrank")
        away = float((weight - expand({"kernel": kernel}, plain, weight.shape)).norm())
        return {"kernel": kernel}, away, away
    rows = diagonals(weight, structure).flatten(2)  # (o, n, columns·taps)
    means = rows.mean(1, keepdim=True)
    rows, kernel = rows - means, means.reshape(shapes["kernel"])
    away = float(rows.norm())
    if not structure.displacement:
        return {"kernel": kernel}, away, away
    u, s, vh = truncated_svd(rows, structure.displacement)
    # gates of root mean square 1, as the constant gate of the kernel, so that kernel and filters train on one scale
    scale = structure.acting.order**0.5
    gates = (u * scale).transpose(1, 2).reshape(shapes["gates"])
    filters = (s[..., None] * vh / scale).reshape(shapes["filters"])
    lost = float(rows.baddbmm_(u * s[:, None], vh, alpha=-1).norm())  # a re-indexing of the error
    return {"kernel": kernel, "gates": gates, "filters": filters}, away, lost


def _alternate(weight: Tensor, structure: Structure, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Group part and low rank by turns, each exact for what the other leaves."""
    only_group = structure.with_rank(structure.displacement, residual="displacement")
    group, error = start, float("inf")
    for _ in range(SWEEPS):
        rest = weight - expand(group, only_group, weight.shape)
        low = start_factors(rest, structure, Metric())
        rest = weight - factor_weight(low, structure, weight.shape)
        group = _group_part(rest, only_group)[0]
        before, error = error, float((rest - expand(group, only_group, weight.shape)).norm())
        if error >= before * (1 - 1e-6):
            break
    return {**group, **low}


def svd_error(weight: Tensor, stored: int, *, conv_groups: int = 1) -> float:
    """The control: relative error of plain truncated SVD with at most `stored` numbers; 1 where not even rank 1 fits.

    For a convolution the better of the two views is taken, out × in·taps and out·ky × in·kx. A grouped convolution
    has one matrix, and the same rank, in each of its groups.
    """
    exact = check_weight(weight)
    exact = exact.to(exactness(exact))
    apart = exact.reshape(conv_groups, exact.shape[0] // conv_groups, *exact.shape[1:])
    views = [apart.flatten(2)]
    if views_of(exact.shape)[-1]:
        views.append(apart.transpose(2, 3).flatten(3).flatten(1, 2))
    total = float(exact.square().sum())
    errors = []
    for view in views:
        rank = stored // (conv_groups * sum(view.shape[1:]))
        errors.append((trailing_energy(small_gram(view), rank) / total) ** 0.5 if total else 0.0)
    return min(errors)
