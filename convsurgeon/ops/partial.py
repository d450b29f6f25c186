"""Partial convolution: a spatial kernel for a part of the channels, then 1x1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from convsurgeon.errors import OptionError
from convsurgeon.factorization import low_rank_and_center
from convsurgeon.ops._base import AbstractCheapConv, as_padding, dense_only
from convsurgeon.ops._center import CenterView, at_center, center_of
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), C channels with a spatial kernel.


@final
@register
class PartialConv2d(AbstractCheapConv):
    """A dense convolution among the first `C` channels, which leaves the others as they are, then a 1x1.

    With `C = I div share` the dense kernel factors as ``w[o, i, k] = sum_c point[o, c] * spatial[c, i, k]``
    for the first C input channels, a product of rank C, and as ``(k == center) * point[o, i]`` for the others.
    The spatial part carries the stride; channels without one go on as what the kernel's center meets.
    The center of an even kernel is the position before the middle.

    The parts are sliced and concatenated. With the untouched channels as one-hot kernels of a group convolution
    onnxruntime (fp32, one thread) took 1.4 to 1.9 times as long; with two 1x1 and a sum 2 % less, but a norm would
    not fold into that (`python docs/benchmarks/op_latency.py`).

    The first channels have no merit but their place: a network made for this op learns to use them so. Others
    could be chosen for what they weigh, but would have to be gathered at every call.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `(C*C*K + I*O)*P*Q` MACs and `C*C*K + I*O` weights, against `I*O*K*P*Q` and `I*O*K` for the dense
        kernel: at 3x3 and a quarter of the channels 5.8 times fewer where they stay as many.

    Reference:
        Chen et al., 2023, arXiv:2303.03667.

    Examples:
        >>> import torch
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> op = PartialConv2d.from_conv(conv)
        >>> op.spatial.weight.shape, op(torch.zeros(2, 8, 5, 5)).shape
        (torch.Size([2, 2, 3, 3]), torch.Size([2, 16, 5, 5]))
    """

    name: ClassVar[str] = "partial"
    summary: ClassVar[str] = "kxk among the first channels only, then 1x1"
    reference: ClassVar[str] = "Chen et al., 2023, arXiv:2303.03667"
    cost: ClassVar[str] = "(C*C*K + I*O)*P*Q MACs, C*C*K + I*O weights, C = I / share"
    keeps: ClassVar[str] = (
        "what the first C channels feed, and the center weight of all others; 23 % of the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = "nowhere known; slices and a concatenation are its price"
    last: ClassVar[str] = "pointwise"

    @dataclass(frozen=True)
    class Options:
        """One in how many input channels has a spatial kernel."""

        share: int = 4

        def __post_init__(self) -> None:
            if self.share < 2:
                raise OptionError(f"partial: option share must be at least 2, got {self.share}")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        channels = spec.in_channels // options.share
        self.spatial = nn.Conv2d(
            channels,
            channels,
            spec.kernel_size,
            stride=spec.stride,
            padding=as_padding(spec.padding),
            dilation=spec.dilation,
            bias=False,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )
        self.center = CenterView(spec, strided=True)
        self.pointwise = nn.Conv2d(spec.in_channels, spec.out_channels, 1, bias=spec.bias)

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Lower `share` to the number of input channels, so that one at least has a spatial kernel."""
        return replace(options, share=min(options.share, max(2, spec.in_channels)))

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and a single input channel."""
        if reason := dense_only(spec):
            return reason
        return "needs at least 2 input channels" if spec.in_channels < 2 else None

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts, which run at output size."""
        channels = spec.in_channels // int(cls.fit_options(spec, cls.parse_options(options)).share)
        p, q = spec.output_size(height, width)
        return (channels * channels * spec.taps + spec.in_channels * spec.out_channels) * p * q

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both parts to a dense kernel.

        What the first channels feed, an `O` x `C*K` matrix, is replaced by its best rank-C approximation,
        and of the others the weights at the center are kept: the closest kernel (Frobenius norm) that this
        op can represent.
        """
        spatial, point_OI = low_rank_and_center(weight, self.spatial.in_channels, center_of(self.kernel_size))
        self.spatial.weight.copy_(spatial)
        self.pointwise.weight.copy_(point_OI[:, :, None, None])
        if bias is not None and self.pointwise.bias is not None:
            self.pointwise.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the product of both parts, and the 1x1 at the center for the other channels."""
        channels = self.spatial.in_channels
        mixed, single = self.pointwise.weight[:, :channels], self.pointwise.weight[:, channels:]
        product = torch.einsum("oc,cihw->oihw", mixed[:, :, 0, 0], self.spatial.weight)
        return torch.cat([product, at_center(single, self.kernel_size)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        channels = self.spatial.in_channels
        first, others = x[..., :channels, :, :], x[..., channels:, :, :]
        out: Tensor = self.pointwise(torch.cat([self.spatial(first), self.center(others)], dim=-3))
        return out
