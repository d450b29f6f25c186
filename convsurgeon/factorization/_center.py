"""What is left of a kernel where some of its channels keep only the weight at the center."""

from __future__ import annotations

import torch
from torch import Tensor

from convsurgeon.factorization._blocks import refuse_unless_finite
from convsurgeon.factorization._low_rank import low_rank

# Shape letters: O and I output and input channels, G groups, o and i channels of a group, C spatial channels.


@torch.no_grad()
def keep_groups_and_center(weight_OIHW: Tensor, groups: int, center: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Keep whole what connects inputs and outputs of the same group, and of all else the center.

    Every weight is kept or lost by itself, so that keeping all there is room for is the closest kernel
    (Frobenius norm).

    Shape:
        - weight_OIHW: `(O, I, kh, kw)`
        - grouped: `(O, I / groups, kh, kw)`, point: `(O, I)`, zero within a group

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    refuse_unless_finite(weight_OIHW)
    grouped_GoiHW = _of_same_group(weight_OIHW, groups)
    point_OI = weight_OIHW[:, :, center[0], center[1]].clone(memory_format=torch.contiguous_format)
    _of_same_group(point_OI, groups).zero_()
    return grouped_GoiHW.flatten(0, 1), point_OI


def _of_same_group(tensor: Tensor, groups: int) -> Tensor:
    """Return, for `(O, I, ...)`, the view `(G, o, i, ...)` of what connects channels of one group."""
    outputs, inputs = (tensor.shape[axis] // groups for axis in (0, 1))
    grouped = tensor.view(groups, outputs, groups, inputs, *tensor.shape[2:])
    return grouped.diagonal(dim1=0, dim2=2).movedim(-1, 0)


@torch.no_grad()
def low_rank_and_center(weight_OIHW: Tensor, channels: int, center: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Replace what the first channels feed by a product of inner size `channels`; of all others keep the center.

    The two parts share no weight: the truncated singular value decomposition of the one and all of the
    other that there is room for are together the closest kernel (Frobenius norm).

    Shape:
        - weight_OIHW: `(O, I, kh, kw)`
        - spatial: `(C, C, kh, kw)`, point: `(O, I)`, of which the first C columns mix what `spatial` gives

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    refuse_unless_finite(weight_OIHW)
    point_OI = weight_OIHW[:, :, center[0], center[1]].clone()
    mixed_OC, spatial = low_rank(weight_OIHW[:, :channels].flatten(1), channels)
    point_OI[:, :channels] = mixed_OC
    return spatial.view(channels, channels, *weight_OIHW.shape[2:]), point_OI
