"""Depthwise, then pointwise: the depthwise separable convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor

from convsurgeon.factorization import low_rank, rank_keeping
from convsurgeon.ops._base import dense_only
from convsurgeon.ops._ranks import Rank, check_rank, fit_rank, known_rank, rank_not_known
from convsurgeon.ops._registry import register
from convsurgeon.ops._spatial_pointwise import AbstractSpatialPointwise
from convsurgeon.spec import ConvSpec


@final
@register
class DepthwiseConv2d(AbstractSpatialPointwise):
    """One spatial filter per input channel, or `rank` of them, then a 1x1 convolution.

    The dense kernel factors as ``w[o, i, k] = sum_r point[o, i, r] * depth[i, r, k]``, one term by
    default. Rank `min(O, K)` represents every kernel. A trained VGG-16's 3x3 kernels keep .48 of
    their energy at rank 1.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `rank*(I*K*P*Q + I*O*P*Q)` MACs and `rank*(I*K + I*O)` weights, against `I*O*K*P*Q` and
        `I*O*K` for the dense kernel: nearly K / rank times fewer where O is large. Beyond rank 1
        onnxruntime leaves its fast depthwise path: 64 channels at 56x56 took .34 ms at rank 1, 1.12
        at rank 2 and 1.54 at rank 3, 2.2 dense (3x3, fp32, one thread).

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
    cost: ClassVar[str] = "rank*(I*K + I*O)*P*Q MACs, rank*(I*K + I*O) weights"
    keeps: ClassVar[str] = (
        "of each input channel one spatial pattern, scaled for every filter; 37 % of the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = "rank above 1: no fast depthwise path in onnxruntime (3.3x the time)"

    @dataclass(frozen=True)
    class Options(AbstractSpatialPointwise.Options):
        """How many filters per input channel, and where the stride sits."""

        rank: Rank = 1

        def __post_init__(self) -> None:
            check_rank(self.rank, "depthwise: option rank")

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Turn the rank into a number; a share of energy is that of all input channels together."""
        keeping = None if weight is None else lambda share: rank_keeping(weight.flatten(2).transpose(0, 1), share)
        return replace(options, rank=fit_rank(options.rank, min(spec.out_channels, spec.taps), keeping))

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and a share of energy without weights."""
        return dense_only(spec) or rank_not_known(cls.fit_options(spec, options).rank)

    @classmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return one group per input channel."""
        return spec.in_channels

    @classmethod
    def spatial_channels(cls, spec: ConvSpec, options: Any) -> int:
        """Return `rank` channels per input channel, side by side."""
        return spec.in_channels * known_rank(options.rank)

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both parts to a dense kernel, input channel by input channel.

        Each input channel's weights, an `O` x `K` matrix, are replaced by their best approximation
        of that rank: the closest kernel (Frobenius norm) that this op can represent.
        """
        rank = self.spatial.out_channels // self.in_channels
        point_IOR, depth_IRK = low_rank(weight.flatten(2).transpose(0, 1), rank)
        self.pointwise.weight.copy_(point_IOR.transpose(0, 1).flatten(1)[:, :, None, None])
        self.spatial.weight.copy_(depth_IRK.reshape_as(self.spatial.weight))
        self.copy_bias(bias)
