"""The mirror of the paper's shape: a dense 1x1, then a cheap spatial convolution."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.ops._base import AbstractCheapConv, dense_only
from convsurgeon.ops._parts import spatial_part
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), C channels between the parts, G groups, M channels that a group
# reads (C / G), N that it gives (O / G).


class AbstractPointwiseSpatial(AbstractCheapConv):
    """A 1x1 without bias, then a spatial convolution with groups, which is the submodule named by `last`.

    Nothing stands between the two, so the op is linear and equals a dense convolution with kernel
    ``w[o, i, k] = sum_m spatial[o, m, k] * point[group(o), m, i]``. As the 1x1 has no bias, padding
    before or after it is the same, in every mode. The spatial part carries the stride, so the 1x1
    runs at input resolution.
    """

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        channels, groups = self.middle_channels(spec, options), self.spatial_groups(spec, options)
        self.point = nn.Conv2d(spec.in_channels, channels, 1, bias=False)
        self.add_module(self.last, spatial_part(spec, channels, spec.out_channels, groups=groups, bias=spec.bias))

    @classmethod
    @abstractmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return the groups of the spatial part; they divide `out_channels`."""

    @classmethod
    def middle_channels(cls, spec: ConvSpec, options: Any) -> int:
        """Return the channels that the 1x1 gives; a multiple of the spatial part's groups."""
        return spec.out_channels

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions."""
        return dense_only(spec)

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts; the 1x1 runs at input size."""
        options = cls.fit_options(spec, cls.parse_options(options))
        p, q = spec.output_size(height, width)
        channels = cls.middle_channels(spec, options)
        per_output = channels // cls.spatial_groups(spec, options) * spec.taps
        return spec.in_channels * channels * height * width + spec.out_channels * per_output * p * q

    @property
    def spatial_weight(self) -> Tensor:
        """The kernel of the spatial part, `(O, M, kh, kw)`."""
        weight: Tensor = getattr(self, self.last).weight
        return weight

    def as_dense(self) -> Tensor:
        """Return the product of both parts, group by group."""
        groups = getattr(self, self.last).groups
        channels = self.spatial_weight.shape[1]
        spatial_GNMK = self.spatial_weight.reshape(groups, -1, channels, math.prod(self.kernel_size))
        point_GMI = self.point.weight.reshape(groups, channels, self.in_channels)
        dense = torch.einsum("gnmk,gmi->gnik", spatial_GNMK, point_GMI)
        return dense.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = getattr(self, self.last)(self.point(x))
        return out

    def copy_bias(self, bias: Tensor | None) -> None:
        """Take over the dense bias, unchanged: it is added after everything."""
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
