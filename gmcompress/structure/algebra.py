"""Weights of a structure: the dense weight of stored tensors, group diagonals, orbit means, nearest, distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import GMError
from ..groups import Group
from ..groups.group import Indices
from .description import Structure


def as_structure(structure: Structure | Group | str) -> Structure:
    """A structure as it is; a group or a string as the structure it names."""
    return Structure.parse(structure)


def index_tensor(indices: Indices, like: Tensor) -> Tensor:
    """A copy of an (immutable) index array as an int64 tensor, on the device of `like`."""
    return torch.tensor(indices, dtype=torch.int64, device=like.device)


def check_weight(weight: Tensor) -> Tensor:
    """The weight in float64, detached.

    Raises:
        GMError: it is no tensor of real numbers, or holds NaN or infinity.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise GMError(f"a weight is a tensor of real numbers, not {what}")
    place = "cpu" if weight.device.type == "mps" else weight.device  # which has no float64
    exact = weight.detach().to(place, torch.float64)
    if not torch.isfinite(exact).all():
        raise GMError(f"the weight of shape {tuple(weight.shape)} holds NaN or infinity")
    return exact


def split(weight: Tensor, structure: Structure) -> Tensor:  # (rows, columns, *taps) -> (o, |X|, i, points, carried)
    """The weight with its block axes apart and its taps flat."""
    o, i, carried = structure.blocks(weight.shape)
    return weight.reshape(o, weight.shape[0] // o, i, structure.points, carried)


def diagonals(weight: Tensor, structure: Structure | Group | str) -> Tensor:  # -> (o, n, i, points, carried)
    """Group-diagonal coordinates F[x, p] = W[x, x·p], a re-indexing; W is a group matrix ⇔ all rows of F are equal.

    Raises:
        GMError: the shape does not fit, or the rows are not the group itself.
    Source: GM paper, definition of displacement rank.
    """
    structure = as_structure(structure)
    structure.acting  # noqa: B018  raises where there is no group
    if not structure.is_regular:
        name = "" if structure.rows is None else structure.rows.name
        raise GMError(f"group diagonals need rows that are the group itself, not {name!r}")
    apart = split(weight, structure)
    index = index_tensor(structure._moved, weight)
    return apart.gather(3, index[None, :, None, :, None].expand_as(apart))


def expand(
    tensors: Mapping[str, Tensor],  # as named and shaped by Structure.shapes
    structure: Structure | Group | str,
    shape: Sequence[int],  # of the weight: (rows, columns, *taps)
    *,
    labels: Tensor | None = None,  # (|X|, points): structure.labels on the right device, where the caller keeps them
) -> Tensor:  # (rows, columns, *taps)
    """The dense weight of stored tensors, differentiable: W[x, p] = f(x⁻¹p) + Σ_k a_k(x) b_k(x⁻¹p), plus the factors.

    >>> expand({"kernel": torch.tensor([[[1.0, 2.0, 3.0]]])}, "C3", (3, 3)).tolist()
    [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]]
    """
    structure = as_structure(structure)
    if structure.separable is not None:
        return structure.separable.weight(tensors, shape)
    if structure.group is None:
        return factor_weight(tensors, structure, shape)
    o, i, carried = structure.blocks(shape)
    kernel = tensors["kernel"]
    labels = index_tensor(structure.labels, kernel) if labels is None else labels.long()
    rows = kernel.reshape(o, 1, i, -1)  # of group diagonals, orbits and carried taps as one axis: gathered fastest
    if "gates" in tensors:
        rank, order = tensors["gates"].shape[1:]
        gated = tensors["gates"].transpose(1, 2) @ tensors["filters"].reshape(o, rank, -1)
        rows = rows + gated.reshape(o, order, i, -1)
    places = labels
    if carried > 1:
        places = (labels[..., None] * carried + torch.arange(carried, device=labels.device)).flatten(1)
    target = (o, len(labels), i, places.shape[1])
    weight = rows.expand(*target[:3], -1).gather(3, places[None, :, None].expand(target))
    weight = weight.reshape(tuple(shape))
    return weight + factor_weight(tensors, structure, shape) if "left" in tensors else weight


def factor_weight(tensors: Mapping[str, Tensor], structure: Structure, shape: Sequence[int]) -> Tensor:
    """The factor part of a weight, left · right or block by block U_p diag(s_pq) V_qᵀ, of the weight's shape.

    Source: Lee et al. 2024, BLAST, equation 2.

    >>> ones = {"left": torch.ones(2, 1), "right": torch.ones(1, 2)}
    >>> factor_weight(ones | {"scales": torch.tensor([[[1.0], [2.0]]])}, Structure.parse("adapted:1:1x2"), (2, 2))
    tensor([[1., 2.],
            [1., 2.]])
    """
    left, right = tensors["left"].flatten(0, -2), tensors["right"].flatten(1)
    if structure.grid is None:
        return _from_view(left @ right, structure, shape)
    p, q = structure.grid
    rank, wide = right.shape
    scaled = tensors["scales"].transpose(1, 2)[..., None] * right.reshape(rank, q, wide // q)  # (P, r, Q, b)
    product = left.reshape(p, -1, rank) @ scaled.reshape(p, rank, wide)
    return _from_view(product.reshape(left.shape[0], wide), structure, shape)


def _from_view(matrix: Tensor, structure: Structure, shape: Sequence[int]) -> Tensor:
    """The weight of which this is the matrix, rows × columns·taps or, split, rows·ky × columns·kx."""
    if not structure.split:
        return matrix.reshape(tuple(shape))
    rows, columns, height, width = shape
    return matrix.reshape(rows, height, columns, width).transpose(1, 2).contiguous()


def orbit_means(weight: Tensor, structure: Structure | Group | str) -> Tensor:  # -> kernel, as in Structure.shapes
    """The mean of the weight over every orbit: the kernel of the Frobenius-nearest group matrix."""
    structure = as_structure(structure)
    if structure.is_regular:
        means = diagonals(weight, structure).mean(1)
    else:
        flat = split(weight, structure).transpose(1, 2).flatten(2, 3)  # (o, i, |X|·points, carried)
        labels = index_tensor(structure.labels, weight).flatten()
        sums = flat.new_zeros(*flat.shape[:2], structure.orbits, flat.shape[3]).index_add_(2, labels, flat)
        means = sums / torch.bincount(labels, minlength=structure.orbits)[:, None]
    return means.reshape(structure.shapes(weight.shape)["kernel"])


def nearest(weight: Tensor, structure: Structure | Group | str) -> Tensor:  # same shape and dtype
    """The Frobenius-nearest group matrix, the Reynolds average over the group; the structure's residuals play no part.

    Raises:
        GMError: the shape does not fit the structure, or the weight is not finite.

    >>> nearest(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), "C2").tolist()
    [[2.0, 3.0], [3.0, 2.0]]
    """
    structure = as_structure(structure)
    kernel = orbit_means(check_weight(weight), structure)
    return expand({"kernel": kernel}, structure, weight.shape).to(weight)


def distance(weight: Tensor, structure: Structure | Group | str, *, relative: bool = False) -> float:
    """d(W) = ‖W − nearest(W)‖, Frobenius, or d(W)/‖W‖; the mean over g of ‖ρ(g)W − Wρ(g)‖² is 2·d².

    >>> distance(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "C2", relative=True)
    1.0
    """
    exact = check_weight(weight)
    absolute = float((exact - nearest(exact, structure)).norm())
    return absolute / max(float(exact.norm()), torch.finfo(torch.float64).tiny) if relative else absolute
