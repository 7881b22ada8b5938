"""Dense linear algebra that more than one room needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import GMError

ALL = 128  # rows below which all eigenvectors are as quick as some
PIECES = 6  # of a large Gram matrix, of which it is made
LARGEST = 1e6  # ridge, by which every positive semidefinite matrix can be factored
DOUBLE = (torch.float32, torch.float64)  # what LAPACK computes in


def usual_strides(tensor: Tensor) -> Tensor:
    """A view whose gradient has the strides of a contiguous tensor, also on axes of length 1, where others do as well.

    DistributedDataParallel compares strides on those too, and copies gradients (with a warning) that have others.
    """
    return tensor.squeeze().view(tensor.shape)


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
    basis, _ = torch.linalg.qr(matrix.mT @ leading_vectors(matrix @ matrix.mT, rank))  # (*b, m, r)
    u, s, inner = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u, s, inner @ basis.mT


def leading_vectors(gram: Tensor, rank: int) -> Tensor:  # (*b, n, n) symmetric -> (*b, n, r)
    """Eigenvectors of the `rank` largest eigenvalues, ascending.

    On the CPU LAPACK is asked for these alone, which takes a fraction of the time of all; torch has no such call.
    """
    n = gram.shape[-1]
    if gram.device.type != "cpu" or gram.dtype not in DOUBLE or n < ALL or 8 * rank > n or gram.requires_grad:
        return torch.linalg.eigh(gram)[1][..., -rank:]
    from scipy.linalg import LinAlgError, eigh

    chosen: dict[str, Any] = {"subset_by_index": (n - rank, n - 1), "driver": "evr", "check_finite": False}
    # symmetric, so that its transpose is itself in the order of LAPACK, which then copies nothing
    try:
        found = [eigh(each.numpy().T, lower=True, **chosen)[1] for each in gram.reshape(-1, n, n)]
    except LinAlgError:  # inverse iteration has no guarantee
        return torch.linalg.eigh(gram)[1][..., -rank:]
    vectors = torch.stack([torch.from_numpy(each) for each in found])
    return vectors.reshape(*gram.shape[:-1], rank)


def trailing_energy(gram: Tensor, rank: int) -> float:  # (b, n, n) positive semidefinite
    """The sum of all eigenvalues but the `rank` largest, over all matrices of the batch.

    Where few are left out, Lanczos iteration finds those, and they are taken from the trace; not where nearly nothing
    would remain of it.
    """
    n = gram.shape[-1]
    if gram.device.type == "cpu" and n >= ALL and 0 < 16 * rank < n:
        whole = float(gram.diagonal(dim1=-2, dim2=-1).double().sum())
        leading = _leading_values(gram, rank)
        lost = 0.0 if leading is None else whole - float(leading.double().sum())
        if lost > 1e-3 * whole:
            return lost
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)  # ascending
    return float(energies[:, : max(n - rank, 0)].sum())


def _leading_values(gram: Tensor, rank: int) -> Tensor | None:  # (b, n, n), on the CPU -> (b, rank)
    """The largest eigenvalues by Lanczos iteration; None where it does not converge, or for a matrix of zeros."""
    from scipy.sparse.linalg import ArpackError, eigsh

    start = torch.randn(
        gram.shape[-1], generator=torch.Generator().manual_seed(0), dtype=gram.dtype, device="cpu"
    ).numpy()
    options: dict[str, Any] = {"tol": 1e-6, "v0": start, "return_eigenvectors": False}
    try:
        return torch.stack([torch.from_numpy(eigsh(each.numpy(), rank, **options)) for each in gram])
    except ArpackError:
        return None


def gram_matrix(rows: Tensor) -> Tensor:  # (*b, n, m) -> (*b, m, m)
    """XᵀX. Where it is large only what lies on and above the diagonal is multiplied, block row by block row."""
    m = rows.shape[-1]
    if len(_block_rows(m)) == 1:
        return rows.mT @ rows
    found = rows.new_zeros(*rows.shape[:-2], m, m)
    add_gram_(found, rows)
    return mirrored_(found)


def add_gram_(total: Tensor, rows: Tensor) -> None:  # (*b, m, m), (*b, n, m)
    """Add XᵀX to a matrix, which is `mirrored_` when all are added. None of its size is made besides."""
    for start, end in _block_rows(rows.shape[-1]):
        total[..., start:end, start:].add_(rows[..., start:end].mT @ rows[..., start:])


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:  # (*b, m, k), (*b, n, m), (*b, n, k)
    """Add LᵀR to a matrix, where it is large without another of its size."""
    for start, end in _block_rows(left.shape[-1]):
        total[..., start:end, :].add_(left[..., start:end].mT @ right)


def mirrored_(total: Tensor) -> Tensor:  # (*b, m, m)
    """What `add_gram_` left out, below the diagonal, copied from above it."""
    for start, end in _block_rows(total.shape[-1]):
        total[..., end:, start:end] = total[..., start:end, end:].mT
    return total


def _block_rows(m: int) -> list[tuple[int, int]]:
    """Where the block rows of an (m, m) matrix begin and end: one of them where it is small."""
    step = m if m < PIECES * ALL else -(-m // PIECES)
    return [(start, min(start + step, m)) for start in range(0, m, max(1, step))]


def small_gram(matrix: Tensor) -> Tensor:  # (*b, n, m) -> (b, n, n) or (b, m, m), whichever is smaller
    """The Gram matrix of rows or columns, whichever are fewer, always with one axis for all matrices."""
    found = gram_matrix(matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix)
    return found.flatten(0, -3) if matrix.dim() > 2 else found[None]


def spectral_norm(matrix: Tensor) -> Tensor:  # (*b, n, m) -> (*b,)
    """The largest singular value, from the smaller Gram matrix, in which it loses no digits.

    >>> spectral_norm(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
    tensor(4.)
    """
    gram = small_gram(matrix)
    iterated = gram.device.type == "cpu" and gram.dtype in DOUBLE and gram.shape[-1] >= ALL
    found = _leading_values(gram, 1) if iterated else None
    values = torch.linalg.eigvalsh(gram) if found is None else found
    return values[:, -1].clamp_min(0).sqrt().reshape(matrix.shape[:-2])


def count_above(matrix: Tensor, scale: Tensor, tolerance: float) -> Tensor:  # (*b, n, m), (*b,) -> (*b,)
    """How many singular values are above tolerance × scale, where `scale` is about the largest one or more.

    Where the square of the tolerance is well above the rounding of the dtype they are counted on the smaller Gram
    matrix G, for a large one without computing them: G − (tolerance × scale)² = L D Lᵀ has as many positive eigenvalues
    as D has, and each block of D of size two has one. Otherwise by their singular values.

    Source: Sylvester's law of inertia; Bunch and Kaufman 1977, Mathematics of Computation 31, for the blocks.

    >>> count_above(torch.diag(torch.tensor([5.0, 1.0, 1e-3])), torch.tensor(5.0), 0.01)
    tensor(2)
    """
    if tolerance**2 < 100 * max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps:
        return (torch.linalg.svdvals(matrix) > tolerance * scale[..., None]).sum(-1)
    gram, level = small_gram(matrix), (tolerance * scale.reshape(-1, 1)).square()
    if gram.shape[-1] < ALL:
        found = (torch.linalg.eigvalsh(gram) > level).sum(-1)
    else:
        shifted = gram - torch.diag_embed(level.expand(gram.shape[:-1]))
        factors, pivots, _ = torch.linalg.ldl_factor_ex(shifted)
        single = (factors.diagonal(dim1=-2, dim2=-1) > 0) & (pivots > 0)
        found = single.sum(-1) + (pivots < 0).sum(-1) // 2
    return found.reshape(matrix.shape[:-2])


def ridged(matrices: Tensor, ridge: float) -> Tensor:  # (*b, n, n)
    """Symmetric matrices with `ridge` times their mean diagonal added to it, so that they can be factored."""
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    tiny = torch.finfo(matrices.dtype).tiny
    found = matrices.clone()
    found.diagonal(dim1=-2, dim2=-1).add_(ridge * mean + tiny)
    return found


def cholesky(matrices: Tensor, ridge: float = 1e-12) -> Tensor:  # (*b, n, n), lower
    """Cholesky factors of positive semidefinite matrices, with the least ridge that lets them exist.

    Raises:
        GMError: the matrices hold NaN or infinity, or are far from positive semidefinite.
    """
    while ridge < LARGEST:
        factors, failed = torch.linalg.cholesky_ex(ridged(matrices, ridge))
        if not bool(failed.any()):
            return factors
        ridge *= 100
    raise GMError("numbers here grew or shrank beyond what can be computed with; scale the weights")
