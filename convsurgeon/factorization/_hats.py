"""Shifts by parts of a pixel: kernels that interpolate between neighbouring positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convsurgeon.factorization._blocks import Blocks, parts, power_of_two, refuse_unless_finite

_STARTS = 9  # angles per cell
_TURNS = 200  # at most
_STILL = 1e-14

# Shape letters: O filters, I input channels, H W kernel size, K positions (H * W), N cells between four
# positions ((H - 1) * (W - 1)), S starts; a cell has 2 rows y, z and 2 columns x, w.


def hat_kernel(position_C2: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    """Return the depthwise kernel `(C, 1, kh, kw)` that reads at each channel's position by bilinear interpolation.

    Per axis it is the hat function ``max(0, 1 - |position - tap|)``; positions are row and column,
    from 0 to the kernel's size less one. At whole positions it is one-hot, and its gradient is the
    sum of those to both sides.

    >>> hat_kernel(torch.tensor([[0.0, 1.25]]), 1, 3).tolist()
    [[[[0.0, 0.75, 0.25]]]]
    """
    rows_CH, columns_CW = _hats(position_C2[:, 0], kernel_height), _hats(position_C2[:, 1], kernel_width)
    return (rows_CH[:, :, None] * columns_CW[:, None, :])[:, None]


def _hats(position_C: Tensor, taps: int) -> Tensor:
    distances = [(position_C - tap).abs() for tap in range(taps)]
    # unlike clamp, where passes the gradient at a distance of one
    return torch.stack([torch.where(distance <= 1, 1 - distance, 0.0) for distance in distances], dim=1)


@torch.no_grad()
def closest_hats(weight_OIHW: Tensor) -> Tensor:
    """Return for each input channel the position whose hat, times a weight per filter, is closest to the kernel.

    The energy that a hat `h` keeps is ``|W h|² / |h|²`` (Frobenius norm, `W` the channel's `O` x `K`
    weights). Between four positions a hat is a row part times a column part, and for one of them
    the best other is the larger eigenvector of a 2 x 2 matrix, or a whole position where that has
    two signs. They are solved for in turn, in each cell from nine starts; no step loses energy. For
    kernels of one row or column, and for those that are a hat, the first turn ends at the optimum;
    for others a better one may be missed.

    Shape:
        - weight_OIHW: `(O, I, kh, kw)`
        - result: `(I, 2)`, row and column, float64

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    filters, channels, height, width = weight_OIHW.shape
    weight_IOK, scale = weight_OIHW.flatten(2).transpose(0, 1), power_of_two(weight_OIHW)
    result = torch.empty(channels, 2, dtype=torch.float64, device=weight_OIHW.device)
    for part in parts(channels, filters * height * width):
        gram_IKK = Blocks(weight_IOK[part], scale).gram()
        refuse_unless_finite(gram_IKK.diagonal(dim1=-2, dim2=-1))
        result[part] = _best_positions(gram_IKK.view(-1, height, width, height, width))
    return result


def _best_positions(gram_IHWHW: Tensor) -> Tensor:
    # an axis of one position gets a second, which carries nothing
    pads = [extra for size in reversed(gram_IHWHW.shape[1:]) for extra in (0, int(size == 1))]
    gram_IHWHW = torch.nn.functional.pad(gram_IHWHW, pads)
    height, width = gram_IHWHW.shape[1:3]
    corners = [(top, left) for top in range(height - 1) for left in range(width - 1)]
    cells = [gram_IHWHW[:, y : y + 2, x : x + 2, y : y + 2, x : x + 2] for y, x in corners]
    gram_INyxzw = torch.stack(cells, dim=1)
    angle_INS = torch.linspace(0, math.pi / 2, _STARTS).to(gram_INyxzw).expand(*gram_INyxzw.shape[:2], -1)
    for _ in range(_TURNS):
        before = angle_INS
        across_INS, _ = _best_angle(gram_INyxzw, angle_INS, "insy,insz,inyxzw->insxw")
        angle_INS, energy_INS = _best_angle(gram_INyxzw, across_INS, "insx,insw,inyxzw->insyz")
        if (angle_INS - before).abs().max() < _STILL:
            break
    best_I1 = energy_INS.flatten(1).argmax(dim=1, keepdim=True)
    corner_I2 = torch.tensor(corners).to(gram_INyxzw)[best_I1[:, 0] // _STARTS]
    inside_INS2 = torch.stack([angle.sin() / (angle.sin() + angle.cos()) for angle in (angle_INS, across_INS)], dim=-1)
    return corner_I2 + inside_INS2.flatten(1, 2).gather(1, best_I1[..., None].expand(-1, -1, 2))[:, 0]


def _best_angle(gram_INyxzw: Tensor, other_INS: Tensor, contraction: str) -> tuple[Tensor, Tensor]:
    """Return the direction from one position to the next that keeps most for a given one across, and the energy."""
    other_INS2 = torch.stack([other_INS.cos(), other_INS.sin()], dim=-1)
    square = torch.einsum(contraction, other_INS2, other_INS2, gram_INyxzw)
    first, mixed, second = square[..., 0, 0], square[..., 0, 1], square[..., 1, 1]
    whole = (first < second) * (math.pi / 2 * torch.ones_like(first))
    angle = torch.where(mixed > 0, torch.atan2(2 * mixed, first - second) / 2, whole)
    cos, sin = angle.cos(), angle.sin()
    return angle, cos * cos * first + 2 * cos * sin * mixed + sin * sin * second


@torch.no_grad()
def hat_weights(weight_OIHW: Tensor, kernel_IHW: Tensor) -> Tensor:
    """Return the weights `(O, I)` before each channel's kernel that are closest to the dense one (Frobenius norm)."""
    kernel_IK = kernel_IHW.flatten(1).to(torch.float64)
    kernel_IK = kernel_IK / kernel_IK.square().sum(dim=1, keepdim=True)
    result = weight_OIHW.new_empty(weight_OIHW.shape[:2])
    for some, channels, block in Blocks(weight_OIHW.flatten(2), 1.0):
        result[some, channels] = (block * kernel_IK[channels]).sum(dim=-1).to(result.dtype)
    return result
