"""How far a weight is from the group matrices in rank: the paper's displacement rank, and that of the generators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups import Group
from ..linalg import count_above, spectral_norm
from .algebra import as_structure, check_weight, diagonals, index_tensor, split
from .description import Structure


def displacement(weight: Tensor, structure: Structure | Group | str) -> Tensor:  # (o, n, columns·taps)
    """D(F) = F − PF with P the cyclic shift of the rows of the group diagonals; zero exactly on group matrices.

    Source: GM paper, definition of the displacement operator.
    """
    rows = diagonals(weight, structure).flatten(2)
    return rows - rows.roll(1, dims=1)


def displacement_rank(weight: Tensor, structure: Structure | Group | str, *, tolerance: float | None = None) -> int:
    """The paper's displacement rank: the largest rank over output blocks of the row-centred group diagonals.

    Singular values count above `tolerance` × the largest singular value of the block's F; by default the larger
    dimension × the machine epsilon of the weight's dtype. Not to be mixed with `generator_displacement_rank`.

    >>> displacement_rank(torch.eye(4) + torch.ones(4, 4), "C4")
    0
    """
    rows = diagonals(check_weight(weight), structure).flatten(2)
    scale = spectral_norm(rows)
    return numerical_rank(rows - rows.mean(1, keepdim=True), scale=scale, dtype=weight.dtype, tolerance=tolerance)


def generator_displacement(weight: Tensor, structure: Structure | Group | str, element: int) -> Tensor:
    """Δ_s(W) = W − ρ(s) W ρ(s)⁻¹, of the weight's shape: zero for all generators s exactly on structured weights."""
    structure = as_structure(structure)
    apart = split(weight, structure)
    group, sets = structure.acting, structure.rows
    back = int(group.inverse[group.check_elements([element])[0]])
    assert sets is not None
    rows = index_tensor(sets.action[back], weight)
    points = index_tensor(structure._moved[back], weight)
    return (apart - apart[:, rows][:, :, :, points]).reshape(weight.shape)


def generator_displacement_rank(
    weight: Tensor, structure: Structure | Group | str, *, tolerance: float | None = None
) -> int:
    """The largest rank over the group's generators s of Δ_s(W), as a matrix rows × (columns·taps).

    At most 2r for a group matrix plus a matrix of rank r; adds up under products, which `displacement_rank` does not.
    The tolerance is that of `displacement_rank`, relative to the largest singular value of W.
    """
    structure = as_structure(structure)
    exact = check_weight(weight)
    structure.blocks(exact.shape)
    moved = [generator_displacement(exact, structure, each).flatten(1) for each in structure.acting.generators]
    if not any(bool(each.any()) for each in moved):
        return 0
    scale = spectral_norm(exact.flatten(1))
    return max(numerical_rank(each, scale=scale, dtype=weight.dtype, tolerance=tolerance) for each in moved)


def numerical_rank(matrix: Tensor, *, scale: Tensor, dtype: torch.dtype, tolerance: float | None) -> int:
    """Largest number of singular values above tolerance × scale, over a batch of matrices."""
    if tolerance is None:
        tolerance = max(matrix.shape[-2:]) * torch.finfo(dtype).eps
    return int(count_above(matrix, scale, tolerance).max())
