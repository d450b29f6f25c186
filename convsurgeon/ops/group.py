"""Group convolution, then pointwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor

from convsurgeon.factorization import low_rank
from convsurgeon.ops._groups import check_groups, largest_divisor
from convsurgeon.ops._registry import register
from convsurgeon.ops._spatial_pointwise import AbstractSpatialPointwise
from convsurgeon.spec import ConvSpec


@final
@register
class GroupConv2d(AbstractSpatialPointwise):
    """A group convolution that keeps the channels, then a 1x1 that mixes the groups.

    With `M = I / groups` channels a group, the dense kernel factors, group by group, as
    ``w[o, i, k] = sum_m point[o, m] * spatial[m, i, k]``: a rank-M product.

    Where `groups` does not divide the input channels, the largest divisor below it is taken.
    In fp32 a group convolution is fast only with 16 or more channels a group; measure.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*M*K*P*Q + I*O*P*Q` MACs and `I*M*K + I*O` weights, against `I*O*K*P*Q` and `I*O*K`
        for the dense kernel.

    Reference:
        Krizhevsky et al., 2012; as a replacement in Xie et al., 2019, arXiv:1909.13063.

    Examples:
        >>> import torch
        >>> conv = torch.nn.Conv2d(12, 16, 3, padding=1)
        >>> op = GroupConv2d.from_conv(conv, {"groups": 8})
        >>> op.options["groups"], op(torch.zeros(2, 12, 5, 5)).shape
        (6, torch.Size([2, 16, 5, 5]))
    """

    name: ClassVar[str] = "group"
    summary: ClassVar[str] = "kxk in groups, then 1x1"
    reference: ClassVar[str] = "Xie, Lin, Zhang, Luo, 2019, arXiv:1909.13063"
    cost: ClassVar[str] = "(I*M*K + I*O)*P*Q MACs, I*M*K + I*O weights, M = I / groups"
    keeps: ClassVar[str] = (
        "of each group of input channels M directions of all filters: more than depthwise, which is M = 1; 51 "
        "% of the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = "fewer than 16 channels a group (fp32)"

    @dataclass(frozen=True)
    class Options(AbstractSpatialPointwise.Options):
        """How many groups, and where the stride sits."""

        groups: int = 8

        def __post_init__(self) -> None:
            check_groups(self.groups, "group")

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Lower `groups` to the largest number that divides the input channels."""
        groups = cls.spatial_groups(spec, options)
        return options if groups in (1, options.groups) else replace(options, groups=groups)

    @classmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return the largest divisor of the input channels that is at most `groups`."""
        return largest_divisor(spec.in_channels, options.groups)

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both parts to a dense kernel, group by group.

        The weights that read one group of inputs, an `O` x `M*K` matrix, are replaced by their best
        rank-M approximation: the closest kernel (Frobenius norm) that this op can represent.
        """
        groups = self.spatial.groups
        group_GOC = weight.reshape(len(weight), groups, -1).transpose(0, 1)
        point_GOM, spatial_GMC = low_rank(group_GOC, self.in_channels // groups)
        self.pointwise.weight.copy_(point_GOM.transpose(0, 1).flatten(1)[:, :, None, None])
        self.spatial.weight.copy_(spatial_GMC.reshape_as(self.spatial.weight))
        self.copy_bias(bias)
