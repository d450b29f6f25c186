"""Which positions of its kernel each input channel keeps: the shifts of a shift convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from convsurgeon.factorization._blocks import Blocks, power_of_two, refuse_unless_finite

# Positions are numbered row by row: tap = row * kernel_width + column.


@torch.no_grad()
def highest_energy_taps(weight_OIHW: Tensor, copies: int = 1) -> Tensor:
    """Return, for each input channel, the positions that carry most of the kernel's energy, the first the most.

    Keeping so many positions per input channel and all of their weights is the closest kernel
    (Frobenius norm) that a shift convolution can represent: what is lost is the energy of the
    other positions.

    Shape:
        - weight_OIHW: `(O, I, kh, kw)`
        - result: `(I * copies,)`, int64, values in `0 .. kh * kw - 1`, those of a channel side by side

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    return _energies(weight_OIHW).sort(dim=1, descending=True, stable=True).indices[:, :copies].flatten()


@torch.no_grad()
def balanced_taps(weight_OIHW: Tensor, copies: int = 1) -> Tensor:
    """Return the positions that keep most of the kernel's energy where each is taken equally often.

    Each input channel takes `copies` different positions, and no position is taken by more than one
    channel more than another. Of all such choices the one is returned whose energy is highest: the
    assignment problem, solved as a linear program, whose corners are whole numbers.

    Shape:
        - weight_OIHW: `(O, I, kh, kw)`
        - result: `(I * copies,)`, int64, values in `0 .. kh * kw - 1`, those of a channel side by side

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    import numpy as np
    from scipy import optimize, sparse

    energy_IK = _energies(weight_OIHW)
    channels, positions = energy_IK.shape
    gain = energy_IK.cpu().numpy() / max(float(energy_IK.max()), np.finfo(np.float64).tiny)
    fewest = channels * copies // positions
    most = -(-channels * copies // positions)
    of_channel = sparse.kron(sparse.eye(channels), np.ones((1, positions)))
    of_position = sparse.kron(np.ones((1, channels)), sparse.eye(positions))
    found = optimize.linprog(
        -gain.ravel(),
        A_eq=of_channel,
        b_eq=np.full(channels, copies),
        A_ub=sparse.vstack([of_position, -of_position]),
        b_ub=np.repeat([most, -fewest], positions),
        bounds=(0, 1),
        method="highs-ds",  # ends at a corner
        options={"dual_feasibility_tolerance": 1e-10},
    )
    assert found.success, found.message
    taken_IK = torch.from_numpy(found.x > 0.5).view(channels, positions)
    return taken_IK.nonzero()[:, 1].to(weight_OIHW.device)


def _energies(weight_OIHW: Tensor) -> Tensor:
    """Return the energy of each input channel at each position, `(I, K)`, float64, to some scale."""
    weight_OIK = weight_OIHW.flatten(2)
    energy_IK = torch.zeros(weight_OIK.shape[1:], dtype=torch.float64, device=weight_OIK.device)
    for _, channels, block in Blocks(weight_OIK, power_of_two(weight_OIK)):
        energy_IK[channels] += block.square().sum(dim=0)
    refuse_unless_finite(energy_IK)
    return energy_IK


def fixed_taps(channels: int, kernel_height: int, kernel_width: int, copies: int = 1) -> Tensor:
    """Return the paper's positions: channel `c` goes to column `c mod kw` and row `(c div kw) mod kh`.

    The last `channels mod (kh * kw)` channels stay at the center (arXiv:1909.13063, section 3).
    Further copies of a channel go to the positions that follow, row by row and round.

    >>> fixed_taps(11, 3, 3).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 4]
    >>> fixed_taps(3, 1, 3, copies=2).tolist()
    [0, 1, 1, 2, 2, 0]
    """
    positions = kernel_height * kernel_width
    taps = torch.arange(channels) % positions
    center = (kernel_height // 2) * kernel_width + kernel_width // 2
    taps[channels - channels % positions :] = center
    return ((taps[:, None] + torch.arange(copies)) % positions).flatten()


def one_hot_kernel(taps_C: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    """Return the depthwise kernel `(C, 1, kh, kw)` that is one at each channel's position, float32."""
    hot = torch.nn.functional.one_hot(taps_C.long(), kernel_height * kernel_width)
    return hot.to(torch.float32).view(-1, 1, kernel_height, kernel_width)
