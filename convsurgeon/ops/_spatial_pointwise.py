"""The paper's shape of a cheap convolution: a cheap spatial one, then a dense 1x1."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from convsurgeon.ops._base import AbstractCheapConv, as_padding, dense_only
from convsurgeon.spec import ConvSpec, Pair

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), G groups, M channels of a group (I / G).


class AbstractSpatialPointwise(AbstractCheapConv):
    """A spatial convolution with groups that keeps the channels, then a 1x1 that mixes them.

    Nothing stands between the two, so the op is linear and equals a dense convolution with kernel
    ``w[o, i, k] = sum_m point[o, group(i), m] * spatial[group(i), m, i, k]``. The norm and the
    activation that followed the dense convolution follow the 1x1.

    The stride sits on the spatial part, which is cheaper and equal; the paper puts it on the 1x1
    (option `stride_on=pointwise`; Xie, Lin, Zhang, Luo, 2019, arXiv:1909.13063).
    """

    last: ClassVar[str] = "pointwise"

    @dataclass(frozen=True)
    class Options:
        """What every op of this shape can be told."""

        stride_on: Literal["spatial", "pointwise"] = "spatial"

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        on_spatial = options.stride_on == "spatial"
        self.spatial = nn.Conv2d(
            spec.in_channels,
            spec.in_channels,
            spec.kernel_size,
            stride=spec.stride if on_spatial else 1,
            padding=as_padding(spec.padding),
            dilation=spec.dilation,
            groups=self.spatial_groups(spec, options),
            bias=False,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )
        stride: Any = 1 if on_spatial else spec.stride
        self.pointwise = nn.Conv2d(spec.in_channels, spec.out_channels, 1, stride=stride, bias=spec.bias)

    @classmethod
    @abstractmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return the groups of the spatial part; they divide `in_channels`."""

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and where only one of the groups asked for would be left."""
        if reason := dense_only(spec):
            return reason
        asked = getattr(options, "groups", 1)
        if cls.spatial_groups(spec, options) == 1 < asked:
            channels = f"{spec.in_channels} input channel{'s' if spec.in_channels > 1 else ''}"
            return f"no number of groups from 2 to {asked} divides {channels}"
        return None

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts."""
        options = cls.fit_options(spec, cls.parse_options(options))
        return cls.pointwise_macs(spec, height, width) + cls.spatial_macs(spec, height, width, options)

    @classmethod
    def pointwise_macs(cls, spec: ConvSpec, height: int, width: int) -> int:
        """Return the multiply-adds of the 1x1, which runs at output size wherever the stride sits."""
        p, q = spec.output_size(height, width)
        return spec.in_channels * spec.out_channels * p * q

    @classmethod
    def spatial_macs(cls, spec: ConvSpec, height: int, width: int, options: Any) -> int:
        """Return the multiply-adds of the spatial part, at the resolution where it runs."""
        p, q = cls._spatial_size(spec, height, width, options)
        per_output = spec.in_channels // cls.spatial_groups(spec, options) * spec.taps
        return spec.in_channels * per_output * p * q

    @classmethod
    def _spatial_size(cls, spec: ConvSpec, height: int, width: int, options: Any) -> Pair:
        if options.stride_on == "spatial":
            return spec.output_size(height, width)
        pads, reach = spec.pads, [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        return height + sum(pads[0]) - reach[0], width + sum(pads[1]) - reach[1]

    def as_dense(self) -> Tensor:
        """Return the product of both parts, group by group."""
        groups = self.spatial.groups
        channels = self.in_channels // groups
        spatial_GMMK = self.spatial.weight.reshape(groups, channels, channels, -1)
        point_OGM = self.pointwise.weight.reshape(-1, groups, channels)
        dense = torch.einsum("ogn,gnmk->ogmk", point_OGM, spatial_GMMK)
        return dense.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.pointwise(self.spatial(x))
        return out

    def copy_bias(self, bias: Tensor | None) -> None:
        """Take over the dense bias, unchanged: it is added after everything."""
        if bias is not None and self.pointwise.bias is not None:
            self.pointwise.bias.copy_(bias)
