"""Dense linear algebra that more than one room needs."""

from __future__ import annotations

import torch
from torch import Tensor


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


def ridged(matrices: Tensor, ridge: float) -> Tensor:  # (*b, n, n)
    """Symmetric matrices with `ridge` times their mean diagonal added to it, so that they can be factored."""
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    tiny = torch.finfo(matrices.dtype).tiny
    return matrices + torch.diag_embed((ridge * mean + tiny).expand(matrices.shape[:-1]))


def cholesky(matrices: Tensor, ridge: float = 1e-12) -> Tensor:  # (*b, n, n), lower
    """Cholesky factors of positive semidefinite matrices, with the least ridge that lets them exist."""
    while True:
        factors, failed = torch.linalg.cholesky_ex(ridged(matrices, ridge))
        if not bool(failed.any()):
            return factors
        ridge *= 100
