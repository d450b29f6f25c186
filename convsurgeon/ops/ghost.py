"""Ghost convolution: few channels by 1x1, then several cheap spatial filters for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor, nn

from convsurgeon.errors import OptionError
from convsurgeon.factorization import rank_one
from convsurgeon.ops._base import AbstractCheapConv, as_padding, dense_only
from convsurgeon.ops._groups import largest_divisor
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), M primary channels (O / ratio), S filters of each (ratio).


@final
@register
class GhostConv2d(AbstractCheapConv):
    """A 1x1 convolution to few primary channels, then `ratio` spatial filters on each.

    The dense kernel factors as ``w[o, i, k] = primary[o div ratio, i] * cheap[o, k]``: neighboring filters
    share what they read, and each has its own spatial pattern. GhostNet copies every primary channel as it
    is; here it has a filter too, of which a copy is a special case, and the filters carry the stride.

    Several filters on one channel are slow on large images: in onnxruntime (fp32, one thread) 64 channels at 56 px
    took 0.41 ms, and 0.32 ms as `bsconv`, which has twice the MACs; 256 at 14 px took 0.23 and 0.26 ms
    (`python docs/benchmarks/op_latency.py --channels 64 --size 56`).

    Where `ratio` does not divide the output channels, the largest divisor below it is taken.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*M*H*W + O*K*P*Q` MACs and `I*M + O*K` weights, against `I*O*K*P*Q` and `I*O*K` for the dense
        kernel: nearly K*ratio times fewer where I is large. The primary part runs at input resolution: at
        stride 2 it costs four times as much.

    Reference:
        Han et al., 2020, arXiv:1911.11907.

    Examples:
        >>> import torch
        >>> conv = torch.nn.Conv2d(8, 15, 3, padding=1)
        >>> op = GhostConv2d.from_conv(conv, {"ratio": 4})
        >>> op.options["ratio"], op(torch.zeros(2, 8, 5, 5)).shape
        (3, torch.Size([2, 15, 5, 5]))
    """

    name: ClassVar[str] = "ghost"
    summary: ClassVar[str] = "1x1 to few channels, then several kxk depthwise filters on each"
    reference: ClassVar[str] = "Han et al., 2020, arXiv:1911.11907"
    cost: ClassVar[str] = "I*M*H*W + O*K*P*Q MACs, I*M + O*K weights, M = O / ratio"
    keeps: ClassVar[str] = (
        "of each few neighboring filters what they read in common, and each one's spatial pattern; 28 % of "
        "the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = (
        "large images: several filters on one channel took 1.3x the time of bsconv at 56 px; stride 2: the "
        "1x1 runs at input size"
    )
    last: ClassVar[str] = "cheap"

    @dataclass(frozen=True)
    class Options:
        """How many outputs are made of one primary channel."""

        ratio: int = 2

        def __post_init__(self) -> None:
            if self.ratio < 2:
                raise OptionError(f"ghost: option ratio must be at least 2, got {self.ratio}")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        channels = spec.out_channels // options.ratio
        self.primary = nn.Conv2d(spec.in_channels, channels, 1, bias=False)
        self.cheap = nn.Conv2d(
            channels,
            spec.out_channels,
            spec.kernel_size,
            stride=spec.stride,
            padding=as_padding(spec.padding),
            dilation=spec.dilation,
            groups=channels,
            bias=spec.bias,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Lower `ratio` to the largest number that divides the output channels."""
        ratio = largest_divisor(spec.out_channels, options.ratio)
        return options if ratio in (1, options.ratio) else replace(options, ratio=ratio)

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and where every output would have a primary channel of its own."""
        if reason := dense_only(spec):
            return reason
        if largest_divisor(spec.out_channels, options.ratio) > 1:
            return None
        channels = f"{spec.out_channels} output channel{'s' if spec.out_channels > 1 else ''}"
        return f"no ratio from 2 to {options.ratio} divides {channels}"

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts; the 1x1 runs at input size."""
        channels = spec.out_channels // largest_divisor(spec.out_channels, cls.parse_options(options).ratio)
        p, q = spec.output_size(height, width)
        return spec.in_channels * channels * height * width + spec.out_channels * spec.taps * p * q

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both parts to a dense kernel, primary channel by primary channel.

        The filters made of one primary channel, an `S*K` x `I` matrix, are replaced by their best rank-one
        approximation: the closest kernel (Frobenius norm) that this op can represent. Which filters share
        a primary channel is not chosen: any other order than the donor's would have to be undone behind the
        op, where the norm follows.
        """
        channels = self.primary.out_channels
        cheap_MC, primary_MI = rank_one(weight.flatten(2).transpose(1, 2).reshape(channels, -1, self.in_channels))
        self.primary.weight.copy_(primary_MI[:, :, None, None])
        self.cheap.weight.copy_(cheap_MC.view_as(self.cheap.weight))
        if bias is not None and self.cheap.bias is not None:
            self.cheap.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the outer product of both parts, filter by filter."""
        ratio = self.out_channels // self.cheap.groups
        return self.primary.weight.repeat_interleave(ratio, dim=0) * self.cheap.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.cheap(self.primary(x))
        return out
