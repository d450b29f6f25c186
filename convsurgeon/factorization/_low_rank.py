"""Best approximation of matrices by products of thin ones."""

from __future__ import annotations

import torch
from torch import Tensor

# a component whose factors would be this much smaller than the largest one's, so its singular
# value 1e-6 of the largest, keeps one factor large: both small would hardly learn
_FAINT = 1e-3


@torch.no_grad()
def low_rank(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approximate each matrix by a product `left @ right` of inner size `rank`.

    The truncated singular value decomposition is the closest such product in the Frobenius norm
    (Eckart and Young, 1936). The singular values are split evenly over both factors, so that
    neither starts training much larger than the other. Components beyond the rank of the matrix
    get one factor of zeros and one of the largest component's size: exact, and alive under
    gradient descent.

    The singular vectors come from the eigenvectors of the smaller Gram matrix in float64, which
    for kernels (one side is `O`, or a handful of taps) is several times cheaper than a full
    decomposition; values below about 1e-8 of the largest are lost to rounding.

    Shape:
        - matrices: `(..., R, C)`
        - left: `(..., R, rank)`, right: `(..., rank, C)`, in the dtype of `matrices`
    """
    work = matrices.double()
    rows, columns = work.shape[-2:]
    kept = min(rank, rows, columns)
    gram = work.mT @ work if rows >= columns else work @ work.mT
    values, vectors = torch.linalg.eigh(gram)
    basis = vectors[..., -kept:].flip(-1)
    root = values[..., -kept:].flip(-1).clamp_min(0).sqrt().sqrt()
    largest = torch.where(root[..., :1] > 0, root[..., :1], 1.0)
    root = torch.where(root > _FAINT * largest, root, largest)
    if rows >= columns:
        left, right = (work @ basis) / root[..., None, :], basis.mT * root[..., :, None]
    else:
        left, right = basis * root[..., None, :], (basis.mT @ work) / root[..., :, None]
    if kept < rank:
        spare = torch.arange(rank - kept, device=work.device) % columns
        units = torch.eye(columns, dtype=work.dtype, device=work.device)[spare]
        left = torch.cat([left, left.new_zeros(*left.shape[:-1], rank - kept)], dim=-1)
        right = torch.cat([right, units * largest[..., None]], dim=-2)
    return left.to(matrices.dtype), right.to(matrices.dtype)


def rank_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate each matrix by an outer product `left[..., :, None] * right[..., None, :]`.

    Shape:
        - matrices: `(..., R, C)`
        - left: `(..., R)`, right: `(..., C)`
    """
    left, right = low_rank(matrices, 1)
    return left[..., 0], right[..., 0, :]
