"""Blueprint separable convolution, unconstrained (BSConv-U): pointwise, then depthwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor

from convsurgeon.factorization import low_rank, rank_keeping
from convsurgeon.ops._base import dense_only
from convsurgeon.ops._pointwise_spatial import AbstractPointwiseSpatial
from convsurgeon.ops._ranks import Rank, check_rank, fit_rank, known_rank, rank_not_known
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, R rank, H W input size, P Q output size,
# K kernel positions (kh * kw).


@final
@register
class BSConv2d(AbstractPointwiseSpatial):
    """A pointwise convolution followed by a depthwise one.

    Every output filter is one 2-d blueprint scaled per input channel, or a sum of `rank` such, so
    the dense kernel factors as ``w[o, i, k] = sum_r point[o, r, i] * blueprint[o, r, k]``, one term
    by default. With more the second convolution has one group of `rank` channels per filter. Rank
    `min(I, K)` represents every kernel. A trained VGG-16's 3x3 kernels keep .60 of their energy at
    rank 1. The 1x1 has no bias, so padding with zeros before or after it is the same.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `rank*(I*O*H*W + O*K*P*Q)` MACs and `rank*(I*O + O*K)` weights, against `I*O*K*P*Q` and
        `I*O*K` for the dense kernel. The pointwise part runs at input resolution: at stride 2 it
        costs as much as four dense taps. Beyond rank 1 onnxruntime leaves its fast depthwise path: 64
        channels at 56x56 took .35 ms at rank 1, 1.29 at rank 2 and 2.11 at rank 3, 2.2 dense (3x3,
        fp32, one thread).

    Reference:
        Haase and Amthor, 2020, arXiv:2003.13549.

    Examples:
        >>> import torch
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> op = BSConv2d.from_conv(conv)
        >>> op(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    name: ClassVar[str] = "bsconv"
    summary: ClassVar[str] = "1x1, then kxk depthwise"
    reference: ClassVar[str] = "Haase and Amthor, 2020, arXiv:2003.13549"
    cost: ClassVar[str] = "rank*(I*O*H*W + O*K*P*Q) MACs, rank*(I*O + O*K) weights"
    keeps: ClassVar[str] = (
        "of each filter one spatial pattern, scaled for every input channel; 39 % of the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = (
        "stride 2: the 1x1 runs at input size; rank above 1: no fast depthwise path in onnxruntime (3.7x the time)"
    )
    last: ClassVar[str] = "blueprint"

    @dataclass(frozen=True)
    class Options:
        """How many blueprints per filter."""

        rank: Rank = 1

        def __post_init__(self) -> None:
            check_rank(self.rank, "bsconv: option rank")

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Turn the rank into a number; a share of energy is that of all filters together."""
        keeping = None if weight is None else lambda share: rank_keeping(weight.flatten(2), share)
        return replace(options, rank=fit_rank(options.rank, min(spec.in_channels, spec.taps), keeping))

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and a share of energy without weights."""
        return dense_only(spec) or rank_not_known(cls.fit_options(spec, options).rank)

    @classmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return one group per output channel."""
        return spec.out_channels

    @classmethod
    def middle_channels(cls, spec: ConvSpec, options: Any) -> int:
        """Return `rank` channels per output channel, side by side."""
        return spec.out_channels * known_rank(options.rank)

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both factors to a dense kernel, filter by filter.

        Each filter, seen as an `I` x `K` matrix, is replaced by its best approximation of that
        rank, the closest kernel (Frobenius norm) this op can represent (Eckart and Young, 1936).
        """
        point_OIR, blueprint_ORK = low_rank(weight.flatten(2), self.blueprint.weight.shape[1])
        self.point.weight.copy_(point_OIR.mT.flatten(0, 1)[:, :, None, None])
        self.blueprint.weight.copy_(blueprint_ORK.view_as(self.blueprint.weight))
        self.copy_bias(bias)
