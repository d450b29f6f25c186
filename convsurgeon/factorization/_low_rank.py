"""Best approximation of matrices by products of thin ones."""

from __future__ import annotations

import torch
from torch import Tensor

from convsurgeon.factorization._blocks import Blocks, parts, power_of_two, refuse_unless_finite

# a component whose factors would be this much smaller than the largest one's, so its singular
# value 1e-6 of the largest, keeps one factor large: both small would hardly learn
_FAINT = 1e-3
# of entries whose magnitudes differ by no more than rounding may, the first one decides the sign
_NEARLY = 1 - 1e-6

# Shape letters: B batch, R rows, C columns, N the longer side and n the shorter, k components kept.


@torch.no_grad()
def low_rank(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approximate each matrix by a product `left @ right` of inner size `rank`.

    The truncated singular value decomposition is the closest such product in the Frobenius norm
    (Eckart and Young, 1936). The singular values are split evenly over both factors, so that
    neither starts training much larger than the other. Components beyond the rank of the matrix
    get one factor of zeros and one of the largest component's size: exact, and alive under
    gradient descent. A component's sign is that which makes the largest entry of its factor on the
    matrix's shorter side positive.

    The singular vectors on that side are the eigenvectors of the small Gram matrix, which for
    kernels (one side is `O`, or a handful of taps) is several times cheaper than a full
    decomposition; values below about 1e-8 of the largest are lost to rounding. Whatever the dtype,
    the arithmetic is float64, block by block: in float32 those below 3e-4 would be lost.

    Shape:
        - matrices: `(..., R, C)`
        - left: `(..., R, rank)`, right: `(..., rank, C)`, in the dtype of `matrices`

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    rows, columns = matrices.shape[-2:]
    flat_BRC = matrices.reshape(-1, rows, columns)
    left, right = flat_BRC.new_empty(len(flat_BRC), rows, rank), flat_BRC.new_empty(len(flat_BRC), rank, columns)
    tall_BNn, long_BNk, short_Bnk = (flat_BRC, left, right.mT) if rows >= columns else (flat_BRC.mT, right.mT, left)
    scale, kept = power_of_two(flat_BRC), min(rank, rows, columns)
    for part in parts(len(flat_BRC), rows * columns):
        blocks = Blocks(tall_BNn[part], scale)
        basis_Bnk, root_Bk = _leading(blocks.gram(), kept)
        short_Bnk[part, :, :kept] = basis_Bnk * root_Bk[:, None] * scale**0.5
        basis_Bnk *= scale**0.5 / root_Bk[:, None]
        for some, lines, block in blocks:
            long_BNk[part][some, lines, :kept] = block @ basis_Bnk[some]
        if kept < rank:
            left[part, :, kept:] = 0
            right[part, kept:] = _spare(rank - kept, columns, root_Bk[:, 0] * scale**0.5)
    batch = matrices.shape[:-2]
    return left.view(*batch, rows, rank), right.view(*batch, rank, columns)


def _leading(gram_Bnn: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the first eigenvectors of Gram matrices, and the square roots of the singular values they belong to."""
    values_Bk, basis_Bnk = leading_vectors(gram_Bnn, kept)
    root_Bk = values_Bk.sqrt().sqrt()
    largest_B1 = torch.where(root_Bk[:, :1] > 0, root_Bk[:, :1], 1.0)
    return basis_Bnk, torch.where(root_Bk > _FAINT * largest_B1, root_Bk, largest_B1)


def leading_vectors(gram_Bnn: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of Gram matrices, `(B, kept)`, and their eigenvectors with settled signs.

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    refuse_unless_finite(gram_Bnn.diagonal(dim1=-2, dim2=-1))
    values_Bn, vectors_Bnn = torch.linalg.eigh(gram_Bnn)
    basis_Bnk = vectors_Bnn[..., -kept:].flip(-1)
    magnitudes = basis_Bnk.abs()
    decisive = (magnitudes >= _NEARLY * magnitudes.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    basis_Bnk *= basis_Bnk.gather(1, decisive).sign()
    return values_Bn[..., -kept:].flip(-1).clamp_min(0), basis_Bnk


def _spare(count: int, columns: int, size_B: Tensor) -> Tensor:
    """Return `count` rows of one non-zero entry each, whose size is that of the largest component."""
    units = torch.eye(columns, dtype=size_B.dtype, device=size_B.device)
    return units[torch.arange(count, device=size_B.device) % columns] * size_B[:, None, None]


@torch.no_grad()
def rank_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate each matrix by an outer product `left[..., :, None] * right[..., None, :]`.

    Shape:
        - matrices: `(..., R, C)`
        - left: `(..., R)`, right: `(..., C)`

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    left, right = low_rank(matrices, 1)
    return left[..., 0], right[..., 0, :]


@torch.no_grad()
def rank_keeping(matrices: Tensor, share: float) -> int:
    """Return the smallest rank whose best approximations keep a share of all the matrices' energy together.

    The energy of a matrix is its squared Frobenius norm, the sum of its squared singular values; one rank
    serves all matrices. Zeros need rank 1.

    Shape:
        - matrices: `(..., R, C)`; the result is from 1 to `min(R, C)`

    Args:
        share: of the energy, from 0 to 1.

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.

    >>> rank_keeping(torch.diag(torch.tensor([3.0, 1.0, 0.5])), 0.9)
    2
    """
    rows, columns = matrices.shape[-2:]
    flat_BRC = matrices.reshape(-1, rows, columns)
    tall_BNn = flat_BRC if rows >= columns else flat_BRC.mT
    scale = power_of_two(flat_BRC)
    energy_n = torch.zeros(min(rows, columns), dtype=torch.float64, device=matrices.device)
    for part in parts(len(flat_BRC), rows * columns):
        gram_Bnn = Blocks(tall_BNn[part], scale).gram()
        refuse_unless_finite(gram_Bnn.diagonal(dim1=-2, dim2=-1))
        energy_n += torch.linalg.eigvalsh(gram_Bnn).flip(-1).clamp_min(0).sum(dim=0)
    kept_n = energy_n.cumsum(0)
    # the last sum and the share of it are rounded differently
    return int((kept_n < share * kept_n[-1] * (1 - 1e-12)).sum().clamp_max(len(kept_n) - 1)) + 1
