"""Pointwise, then group convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor

from convsurgeon.factorization import low_rank
from convsurgeon.ops._base import dense_only
from convsurgeon.ops._groups import check_groups, largest_divisor, no_two_groups
from convsurgeon.ops._pointwise_spatial import AbstractPointwiseSpatial
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), G groups, M channels that a group reads and gives (O / G), X rows of its
# matrix (M * K).


@final
@register
class PointwiseGroupConv2d(AbstractPointwiseSpatial):
    """A 1x1 that mixes the channels, then a group convolution: the mirror of `group`.

    With `M = O / groups` channels a group, the dense kernel factors, group of outputs by group, as
    ``w[o, i, k] = sum_m spatial[o, m, k] * point[m, i]``: a rank-M product. As the 1x1 has no bias,
    padding before or after it is the same, in every mode. A trained VGG-16's 3x3 kernels keep .89
    and .81 of their energy in 4 and 8 groups, which is more than `group` keeps.

    Where `groups` does not divide the output channels, the largest divisor below it is taken.
    In fp32 a group convolution is fast only with 16 or more channels a group; measure. At a stride
    the 1x1 runs at input resolution, where `group`'s runs at output resolution.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*O*H*W + O*M*K*P*Q` MACs and `I*O + O*M*K` weights, against `I*O*K*P*Q` and `I*O*K`
        for the dense kernel.

    Reference:
        Krizhevsky et al., 2012; 1x1 before a group convolution: Xie, Girshick et al., 2017, arXiv:1611.05431.

    Examples:
        >>> import torch
        >>> conv = torch.nn.Conv2d(16, 12, 3, padding=1)
        >>> op = PointwiseGroupConv2d.from_conv(conv, {"groups": 8})
        >>> op.options["groups"], op(torch.zeros(2, 16, 5, 5)).shape
        (6, torch.Size([2, 12, 5, 5]))
    """

    name: ClassVar[str] = "pointwise_group"
    summary: ClassVar[str] = "1x1, then kxk in groups"
    reference: ClassVar[str] = "Xie, Girshick, Dollár, Tu, He, 2017, arXiv:1611.05431"
    cost: ClassVar[str] = "I*O*H*W + O*M*K*P*Q MACs, I*O + O*M*K weights, M = O / groups"
    keeps: ClassVar[str] = (
        "of each group of filters M directions of all input channels: more than group; 56 % of the energy of "
        "a trained ResNet-20"
    )
    slow: ClassVar[str] = "fewer than 16 channels a group (fp32); stride 2: the 1x1 runs at input size"
    last: ClassVar[str] = "spatial"

    @dataclass(frozen=True)
    class Options:
        """How many groups."""

        groups: int = 8

        def __post_init__(self) -> None:
            check_groups(self.groups, "pointwise_group")

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Lower `groups` to the largest number that divides the output channels."""
        groups = cls.spatial_groups(spec, options)
        return options if groups == 1 else replace(options, groups=groups)

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and where only one of the groups asked for would be left."""
        if reason := dense_only(spec):
            return reason
        if cls.spatial_groups(spec, options) == 1:
            return no_two_groups(spec.out_channels, options.groups, "output")
        return None

    @classmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return the largest divisor of the output channels that is at most `groups`."""
        return largest_divisor(spec.out_channels, options.groups)

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both parts to a dense kernel, group by group.

        The weights that make one group of outputs, an `M*K` x `I` matrix, are replaced by their best
        rank-M approximation: the closest kernel (Frobenius norm) that this op can represent.
        """
        groups = self.spatial.groups
        rows_GXI = weight.flatten(2).transpose(1, 2).reshape(groups, -1, self.in_channels)
        spatial_GXM, point_GMI = low_rank(rows_GXI, self.out_channels // groups)
        self.point.weight.copy_(point_GMI.flatten(0, 1)[:, :, None, None])
        spatial_OKM = spatial_GXM.reshape(self.out_channels, -1, spatial_GXM.shape[-1])
        self.spatial.weight.copy_(spatial_OKM.transpose(1, 2).reshape_as(self.spatial.weight))
        self.copy_bias(bias)
