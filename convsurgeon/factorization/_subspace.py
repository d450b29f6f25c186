"""Blueprints whose channel weights share a small subspace: the factors of BSConv-S."""

from __future__ import annotations

import torch
from torch import Tensor

from convsurgeon.factorization._blocks import Blocks, parts, power_of_two
from convsurgeon.factorization._low_rank import low_rank, rank_one

_SWEEPS = 40
# a sweep that gains less than this part of what is kept is the last
_GAIN = 1e-5
# a filter whose size is this much below the largest one's keeps one factor large, so that it can learn
_FAINT = 1e-3

# Shape letters: O filters, I input channels, K kernel positions, M size of the subspace, b filters of a part.


@torch.no_grad()
def subspace_blueprints(weight_OIK: Tensor, rank: int, *, sweeps: int = _SWEEPS) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate filters by ``w[o, i, k] = sum_m point[o, m] * subspace[m, i] * blueprint[o, k]``.

    With blueprints of length one the kernel that is closest (Frobenius norm) has the channel weights
    ``t[o, i] = sum_k w[o, i, k] * blueprint[o, k]``, and keeps the energy of their best rank-M
    approximation: for fixed blueprints a truncated SVD of `t` is the optimum. For a fixed subspace
    the best blueprint of a filter is the first right singular vector of the filter projected onto
    it. Both are solved in turn, from the blueprints of `rank_one`, so that the energy kept never
    falls; it ends where neither step gains, which need not be the best kernel of all. A kernel of
    this form is reproduced exactly.

    Each filter's size is split evenly over its blueprint and its channel weights, their singular
    values evenly over `point` and `subspace`.

    Shape:
        - weight_OIK: `(O, I, K)`
        - subspace: `(rank, I)`, point: `(O, rank)`, blueprint: `(O, K)`, in its dtype

    Args:
        sweeps: how often both steps are done at most.

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    scale, dtype = power_of_two(weight_OIK), weight_OIK.dtype
    blueprint_OK = _blueprints(weight_OIK, None)
    point_OM, subspace_MI = low_rank(_channel_weights(weight_OIK, blueprint_OK, scale), rank)
    kept = _energy(point_OM, subspace_MI)
    for _ in range(sweeps):
        blueprint_OK = _blueprints(weight_OIK, torch.linalg.qr(subspace_MI.mT).Q.mT)
        point_OM, subspace_MI = low_rank(_channel_weights(weight_OIK, blueprint_OK, scale), rank)
        before, kept = kept, _energy(point_OM, subspace_MI)
        if kept <= before * (1 + _GAIN):
            break
    weights_OI = point_OM @ subspace_MI
    size_O1 = weights_OI.norm(dim=1, keepdim=True).sqrt()
    largest = size_O1.max() if size_O1.any() else size_O1.new_ones(())
    size_O1 = torch.where(size_O1 > _FAINT * largest, size_O1, largest)
    point_OM, subspace_MI = low_rank(weights_OI / size_O1 * scale**0.5, rank)
    return subspace_MI.to(dtype), point_OM.to(dtype), (blueprint_OK * size_O1 * scale**0.5).to(dtype)


@torch.no_grad()
def blueprint_weights(weight_OIK: Tensor) -> Tensor:
    """Return the channel weights `(O, I)`, float64, that stand before each filter's best blueprint of length one."""
    return _channel_weights(weight_OIK, _blueprints(weight_OIK, None), 1.0)


def _blueprints(weight_OIK: Tensor, basis_MI: Tensor | None) -> Tensor:
    """Return each filter's best blueprint, of length one, in float64; in the subspace, where one is given."""
    filters, channels, positions = weight_OIK.shape
    best_OK = torch.empty(filters, positions, dtype=torch.float64, device=weight_OIK.device)
    for part in parts(filters, channels * positions):
        some_bIK = weight_OIK[part]
        seen = some_bIK.to(torch.float64) if basis_MI is None else _project(some_bIK, basis_MI)
        best_OK[part] = rank_one(seen)[1]
    length_O1 = best_OK.norm(dim=1, keepdim=True)
    # of what is zero every direction keeps as much
    return torch.where(length_O1 > 0, best_OK / length_O1, positions**-0.5)


def _project(weight_bIK: Tensor, basis_MI: Tensor) -> Tensor:
    result = torch.zeros(len(weight_bIK), len(basis_MI), weight_bIK.shape[-1]).to(basis_MI)
    for some, channels, block in Blocks(weight_bIK, 1.0):
        result[some] += basis_MI[:, channels] @ block
    return result


def _channel_weights(weight_OIK: Tensor, blueprint_OK: Tensor, scale: float) -> Tensor:
    result = blueprint_OK.new_empty(weight_OIK.shape[:2])
    for some, channels, block in Blocks(weight_OIK, scale):
        result[some, channels] = (block @ blueprint_OK[some, :, None])[..., 0]
    return result


def _energy(left_OM: Tensor, right_MI: Tensor) -> float:
    # the factors are orthogonal: low_rank's are singular vectors
    return float((left_OM.norm(dim=0) * right_MI.norm(dim=1)).square().sum())
