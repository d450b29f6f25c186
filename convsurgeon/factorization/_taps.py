"""Which single position of its kernel each input channel keeps: the shift of a shift convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from convsurgeon.factorization._blocks import Blocks, power_of_two, refuse_unless_finite

# Positions are numbered row by row: tap = row * kernel_width + column.


@torch.no_grad()
def highest_energy_taps(weight_OIHW: Tensor) -> Tensor:
    """Return, for each input channel, the position that carries most of the kernel's energy.

    Keeping one position per input channel and all of its weights is the closest kernel (Frobenius
    norm) that a shift convolution can represent: what is lost is the energy of the other positions.

    Shape:
        - weight_OIHW: `(O, I, kh, kw)`
        - result: `(I,)`, int64, values in `0 .. kh * kw - 1`

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    weight_OIK = weight_OIHW.flatten(2)
    energy_IK = torch.zeros(weight_OIK.shape[1:], dtype=torch.float64, device=weight_OIK.device)
    for _, channels, block in Blocks(weight_OIK, power_of_two(weight_OIK)):
        energy_IK[channels] += block.square().sum(dim=0)
    refuse_unless_finite(energy_IK)
    return energy_IK.argmax(dim=1)


def fixed_taps(channels: int, kernel_height: int, kernel_width: int) -> Tensor:
    """Return the paper's positions: channel `c` goes to column `c mod kw` and row `(c div kw) mod kh`.

    The last `channels mod (kh * kw)` channels stay at the center (arXiv:1909.13063, section 3).

    >>> fixed_taps(11, 3, 3).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 4]
    """
    positions = kernel_height * kernel_width
    taps = torch.arange(channels) % positions
    center = (kernel_height // 2) * kernel_width + kernel_width // 2
    taps[channels - channels % positions :] = center
    return taps


def one_hot_kernel(taps_I: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    """Return the depthwise kernel `(I, 1, kh, kw)` that is one at each channel's position, float32."""
    hot = torch.nn.functional.one_hot(taps_I.long(), kernel_height * kernel_width)
    return hot.to(torch.float32).view(-1, 1, kernel_height, kernel_width)
