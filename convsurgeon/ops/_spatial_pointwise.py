"""The paper's shape of a cheap convolution: a cheap spatial one, then a dense 1x1."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from convsurgeon.ops._base import AbstractCheapConv, dense_only
from convsurgeon.ops._groups import no_two_groups
from convsurgeon.ops._parts import spatial_part
from convsurgeon.spec import ConvSpec, Pair

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), C channels between the parts, G groups, M channels that a group reads
# (I / G), N that it gives (C / G).


class AbstractSpatialPointwise(AbstractCheapConv):
    """A spatial convolution with groups, then a 1x1 that mixes its channels.

    Nothing stands between the two, so the op is linear and equals a dense convolution with kernel
    ``w[o, i, k] = sum_n point[o, group(i), n] * spatial[group(i), n, i, k]``. The norm and the
    activation that followed the dense convolution follow the 1x1. A subclass says how many groups
    there are and, by `spatial_channels`, how many channels stand between the parts: by default as
    many as go in.

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
        stride, point_stride = (spec.stride, 1) if options.stride_on == "spatial" else (1, spec.stride)
        groups, channels = self.spatial_groups(spec, options), self.spatial_channels(spec, options)
        self.spatial = spatial_part(spec, spec.in_channels, channels, groups=groups, bias=False, stride=stride)
        self.pointwise = nn.Conv2d(channels, spec.out_channels, 1, stride=point_stride, bias=spec.bias)

    @classmethod
    @abstractmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return the groups of the spatial part; they divide `in_channels`."""

    @classmethod
    def spatial_channels(cls, spec: ConvSpec, options: Any) -> int:
        """Return the channels that the spatial part gives; a multiple of its groups."""
        return spec.in_channels

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and where only one of the groups asked for would be left."""
        if reason := dense_only(spec):
            return reason
        asked = getattr(options, "groups", 1)
        return (
            no_two_groups(spec.in_channels, asked, "input") if cls.spatial_groups(spec, options) == 1 < asked else None
        )

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts."""
        options = cls.fit_options(spec, cls.parse_options(options))
        return cls.pointwise_macs(spec, height, width, options) + cls.spatial_macs(spec, height, width, options)

    @classmethod
    def pointwise_macs(cls, spec: ConvSpec, height: int, width: int, options: Any) -> int:
        """Return the multiply-adds of the 1x1, which runs at output size wherever the stride sits."""
        p, q = spec.output_size(height, width)
        return cls.spatial_channels(spec, options) * spec.out_channels * p * q

    @classmethod
    def spatial_macs(cls, spec: ConvSpec, height: int, width: int, options: Any) -> int:
        """Return the multiply-adds of the spatial part, at the resolution where it runs."""
        p, q = cls._spatial_size(spec, height, width, options)
        per_output = spec.in_channels // cls.spatial_groups(spec, options) * spec.taps
        return cls.spatial_channels(spec, options) * per_output * p * q

    @classmethod
    def _spatial_size(cls, spec: ConvSpec, height: int, width: int, options: Any) -> Pair:
        if options.stride_on == "spatial":
            return spec.output_size(height, width)
        pads, reach = spec.pads, [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        return height + sum(pads[0]) - reach[0], width + sum(pads[1]) - reach[1]

    def as_dense(self) -> Tensor:
        """Return the product of both parts, group by group."""
        groups = self.spatial.groups
        spatial_GNMK = self.spatial.weight.reshape(groups, -1, self.in_channels // groups, math.prod(self.kernel_size))
        point_OGN = self.pointwise.weight.reshape(self.out_channels, groups, -1)
        dense = torch.einsum("ogn,gnmk->ogmk", point_OGN, spatial_GNMK)
        return dense.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.pointwise(self.spatial(x))
        return out

    def copy_bias(self, bias: Tensor | None) -> None:
        """Take over the dense bias, unchanged: it is added after everything."""
        if bias is not None and self.pointwise.bias is not None:
            self.pointwise.bias.copy_(bias)
