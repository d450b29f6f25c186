"""The convolutions that ops are made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from convsurgeon.ops._base import as_padding
from convsurgeon.spec import ConvSpec


def spatial_part(
    spec: ConvSpec, in_channels: int, out_channels: int, *, groups: int, bias: bool, stride: Any = None
) -> nn.Conv2d:
    """Return a convolution with the donor's kernel size, padding, dilation, and stride unless another is given."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        spec.kernel_size,
        stride=spec.stride if stride is None else stride,
        padding=as_padding(spec.padding),
        dilation=spec.dilation,
        groups=groups,
        bias=bias,
        padding_mode=spec.padding_mode,  # type: ignore[arg-type]
    )
