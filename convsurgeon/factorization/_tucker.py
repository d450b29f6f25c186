"""Tucker's decomposition of a kernel along its input and its output channels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from convsurgeon.factorization._blocks import Blocks, power_of_two
from convsurgeon.factorization._low_rank import leading_vectors

# a sweep that gains less than this share of the energy is the last
_ENOUGH = 1e-9
# and so is the one with which so many multiply-adds are done, about half a second: the second for 512 x 512
# of 3x3, the 16th for half of that; on noise, the slowest of kernels, all further ones gain .4 and .05 % of energy
_WORK = 4 * 10**9
# components of less than this share of the largest one's size keep two factors large, as in `low_rank`
_FAINT = 1e-6

# Shape letters: K kernel positions, I and O input and output channels, a and b components kept of them,
# N the channels of one side and M those of the other.


@torch.no_grad()
def tucker(kernel_OIK: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate a kernel by ``sum_ab out[o, b] * core[b, a, k] * in[a, i]``.

    The truncated higher-order singular value decomposition (De Lathauwer et al., 2000) loses at most twice the
    energy (squared Frobenius norm) that the best such kernel loses. From there one side is improved for the
    other as it is, in turns, each time in closed form, so that the error never rises: higher-order orthogonal
    iteration. It ends in a local optimum, which on large kernels it comes near to only; no method is known that
    always finds the global one. A kernel of these ranks is met exactly.

    The energy is split evenly over the three factors. Arithmetic is float64, block by block.

    Shape:
        - kernel_OIK: `(O, I, K)`
        - out: `(O, rank_out)`, core: `(rank_out, rank_in, K)`, in: `(rank_in, I)`, in the kernel's dtype

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    scale = power_of_two(kernel_OIK)
    by_output, by_input = (Blocks(kernel_OIK.permute(2, *sides), scale) for sides in ((0, 1), (1, 0)))
    in_Ia = _best_basis(_gram(by_output), rank_in)[1]
    energy = 0.0
    for _ in range(max(1, _WORK // (2 * kernel_OIK.numel() * (rank_in + rank_out)))):
        size_b, out_Ob = _best_basis(_gram_through(by_output, in_Ia, kernel_OIK.shape[0]), rank_out)
        size_a, in_Ia = _best_basis(_gram_through(by_input, out_Ob, kernel_OIK.shape[1]), rank_in)
        before, energy = energy, float(size_a.square().sum())
        if energy - before <= _ENOUGH * energy:
            break
    third, spread_a, spread_b = scale ** (1 / 3), _third_root(size_a), _third_root(size_b)
    core_Kba = kernel_OIK.new_empty(kernel_OIK.shape[2], rank_out, rank_in)
    for taps, seen_KOa in _through(by_output, in_Ia, kernel_OIK.shape[0]):
        core_Kba[taps] = out_Ob.T @ seen_KOa * (third / spread_a / spread_b[:, None])
    out_Ob, in_Ia = out_Ob * (third * spread_b), in_Ia * (third * spread_a)
    return out_Ob.to(kernel_OIK.dtype), core_Kba.permute(1, 2, 0), in_Ia.T.to(kernel_OIK.dtype)


def _best_basis(gram_NN: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the sizes of one side's main directions, `(kept,)`, and the directions, `(N, kept)`."""
    values_1k, basis_1Nk = leading_vectors(gram_NN[None], kept)
    return values_1k[0].sqrt(), basis_1Nk[0]


def _gram(blocks: Blocks) -> Tensor:
    """Return the products of all columns with one another, `(M, M)`, over rows and taps."""
    return _sum(rows.T @ rows for rows in (block.flatten(0, 1) for _, _, block in blocks))


def _through(blocks: Blocks, basis_Mb: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield some taps and what all their rows, of `M` columns, are in a basis: `(K, rows, b)`."""
    for taps, lines, block in blocks:
        if lines.start == 0:
            seen_KNb = block.new_empty(len(block), rows, basis_Mb.shape[1])
        seen_KNb[:, lines] = block @ basis_Mb
        if lines.stop == rows:
            yield taps, seen_KNb


def _gram_through(blocks: Blocks, basis_Mb: Tensor, rows: int) -> Tensor:
    """Return the products of all rows with one another, `(rows, rows)`, as seen in a basis of the columns."""
    seen = (seen_KNb.transpose(0, 1).flatten(1) for _, seen_KNb in _through(blocks, basis_Mb, rows))
    return _sum(part @ part.T for part in seen)


def _sum(grams: Iterator[Tensor]) -> Tensor:
    total = next(grams)
    for gram in grams:
        total += gram
    return total


def _third_root(size_k: Tensor) -> Tensor:
    """Return what each component's direction is scaled by; faint ones as the largest, which keeps them alive."""
    largest = torch.where(size_k[:1] > 0, size_k[:1], 1.0)
    return torch.where(size_k > _FAINT * largest, size_k, largest) ** (1 / 3)
