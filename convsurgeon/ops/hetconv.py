"""Heterogeneous kernels: every filter has a spatial kernel for some of its channels and 1x1 for the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from convsurgeon.factorization import keep_groups_and_center
from convsurgeon.ops._base import AbstractCheapConv, as_padding, dense_only
from convsurgeon.ops._center import CenterView, at_center, center_of
from convsurgeon.ops._groups import check_groups, largest_divisor
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), G groups (the paper's P), o and i channels of a group.


@final
@register
class HetConv2d(AbstractCheapConv):
    """A group convolution and a 1x1 convolution of the same image, added up.

    Every filter has a spatial kernel for one in `G` of its input channels, those of its own group, and 1x1
    kernels at the center for the others: ``w[o, i, k] = (group(o) == group(i)) * spatial[o, i, k]
    + (k == center) * point[o, i]``. The paper spreads a filter's spatial channels evenly and gives other
    ones to every filter; here they are neighbors, which is the same up to the order of channels.

    Where `groups` does not divide both numbers of channels, their largest common divisor below it is taken.
    The center of an even kernel is the position before the middle.

    Keeps a filter's own group whole, and of the other channels one weight in K. The output is a sum, so a norm that
    follows does not fold into one convolution and stays in an exported file. In onnxruntime (fp32, one thread, 64
    channels at 56 px to 256 at 14) it was 2.6 to 2.8 times as fast as dense (`python docs/benchmarks/op_latency.py`).

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*O*(K/G + 1)*P*Q` MACs and `I*O*(K/G + 1)` weights, against `I*O*K*P*Q` and `I*O*K` for the dense
        kernel: at 3x3 and four groups 2.8 times fewer, and never K times.

    Reference:
        Singh et al., 2019, arXiv:1903.04120.

    Examples:
        >>> import torch
        >>> conv = torch.nn.Conv2d(8, 12, 3, padding=1)
        >>> op = HetConv2d.from_conv(conv, {"groups": 6})
        >>> op.options["groups"], op(torch.zeros(2, 8, 5, 5)).shape
        (4, torch.Size([2, 12, 5, 5]))
    """

    name: ClassVar[str] = "hetconv"
    summary: ClassVar[str] = "kxk in groups plus 1x1 of all"
    reference: ClassVar[str] = "Singh et al., 2019, arXiv:1903.04120"
    cost: ClassVar[str] = "I*O*(K/G + 1)*P*Q MACs, I*O*(K/G + 1) weights, G = groups"
    keeps: ClassVar[str] = (
        "each filter's own group of input channels whole, and one weight in K of the others; 33 % of the "
        "energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = "a norm behind it is not folded, since the output is a sum"
    last: ClassVar[str] = "pointwise"

    @dataclass(frozen=True)
    class Options:
        """One in how many input channels has a spatial kernel."""

        groups: int = 4

        def __post_init__(self) -> None:
            check_groups(self.groups, "hetconv")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        self.spatial = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel_size,
            stride=spec.stride,
            padding=as_padding(spec.padding),
            dilation=spec.dilation,
            groups=options.groups,
            bias=False,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )
        self.center = CenterView(spec, strided=False)
        self.pointwise = nn.Conv2d(spec.in_channels, spec.out_channels, 1, stride=spec.stride, bias=spec.bias)

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Lower `groups` to the largest number that divides the channels on both sides."""
        groups = cls._largest_divisor(spec, options)
        return options if groups in (1, options.groups) else replace(options, groups=groups)

    @staticmethod
    def _largest_divisor(spec: ConvSpec, options: Any) -> int:
        return largest_divisor(math.gcd(spec.in_channels, spec.out_channels), int(options.groups))

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and where only one group would be left."""
        if reason := dense_only(spec):
            return reason
        if cls._largest_divisor(spec, options) > 1:
            return None
        channels = f"{spec.in_channels} input and {spec.out_channels} output channels"
        return f"no number of groups from 2 to {options.groups} divides {channels}"

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts."""
        groups = cls._largest_divisor(spec, cls.parse_options(options))
        p, q = spec.output_size(height, width)
        return spec.out_channels * (spec.in_channels // groups * spec.taps + spec.in_channels) * p * q

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep the weights that have a place: those within a group, and of all others the center.

        It is the closest kernel (Frobenius norm) that this op can represent. The 1x1 of channels that have
        a spatial kernel starts at zero, since the center is in that already.
        """
        grouped, point_OI = keep_groups_and_center(weight, self.spatial.groups, center_of(self.kernel_size))
        self.spatial.weight.copy_(grouped)
        self.pointwise.weight.copy_(point_OI[:, :, None, None])
        if bias is not None and self.pointwise.bias is not None:
            self.pointwise.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the sum of both parts, the 1x1 at the center."""
        groups = self.spatial.groups
        spatial_GoiHW = self.spatial.weight.unflatten(0, (groups, -1))  # type: ignore[no-untyped-call]
        same_GG = spatial_GoiHW.new_ones(groups).diag()
        spatial = torch.einsum("goihw,gf->gofihw", spatial_GoiHW, same_GG)
        return spatial.flatten(2, 3).flatten(0, 1) + at_center(self.pointwise.weight, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.spatial(x) + self.pointwise(self.center(x))
        return out
