"""Depthwise, then pointwise: the depthwise separable convolution."""

from __future__ import annotations

from typing import Any, ClassVar, final

from torch import Tensor

from convsurgeon.factorization import rank_one
from convsurgeon.ops._registry import register
from convsurgeon.ops._spatial_pointwise import AbstractSpatialPointwise
from convsurgeon.spec import ConvSpec


@final
@register
class DepthwiseConv2d(AbstractSpatialPointwise):
    """One spatial filter per input channel, then a 1x1 convolution.

    The dense kernel factors as ``w[o, i, k] = point[o, i] * depth[i, k]``.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*K*P*Q + I*O*P*Q` MACs and `I*K + I*O` weights, against `I*O*K*P*Q` and `I*O*K`
        for the dense kernel: nearly K times fewer where O is large.

    Reference:
        Howard et al., 2017, arXiv:1704.04861; as a replacement in Xie et al., 2019, arXiv:1909.13063.

    Examples:
        >>> import torch
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> op = DepthwiseConv2d.from_conv(conv)
        >>> op(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    name: ClassVar[str] = "depthwise"
    summary: ClassVar[str] = "kxk depthwise, then 1x1"
    reference: ClassVar[str] = "Howard et al., 2017, arXiv:1704.04861"

    @classmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return one group per input channel."""
        return spec.in_channels

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both parts to a dense kernel, input channel by input channel.

        Each input channel's weights, an `O` x `K` matrix, are replaced by their best rank-one
        approximation: the closest kernel (Frobenius norm) that this op can represent.
        """
        point_IO, depth_IK = rank_one(weight.flatten(2).transpose(0, 1))
        self.pointwise.weight.copy_(point_IO.T[:, :, None, None])
        self.spatial.weight.copy_(depth_IK.view_as(self.spatial.weight))
        self.copy_bias(bias)
