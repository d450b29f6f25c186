"""Blueprint separable convolution, unconstrained (BSConv-U): pointwise, then depthwise."""

from __future__ import annotations

from typing import Any, ClassVar, final

from torch import Tensor, nn

from convsurgeon.factorization import rank_one
from convsurgeon.ops._base import AbstractCheapConv, as_padding, dense_only
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw).


@final
@register
class BSConv2d(AbstractCheapConv):
    """A pointwise convolution followed by a depthwise one.

    Every output filter is one 2-d blueprint scaled per input channel, so the dense kernel factors
    as ``w[o, i, k] = point[o, i] * blueprint[o, k]``. The 1x1 has no bias, so padding with zeros
    before or after it is the same.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*O*H*W + O*K*P*Q` MACs and `I*O + O*K` weights, against `I*O*K*P*Q` and `I*O*K` for the
        dense kernel. The pointwise part runs at input resolution: at stride 2 it costs as much as
        four dense taps.

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
    last: ClassVar[str] = "blueprint"

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        self.point = nn.Conv2d(spec.in_channels, spec.out_channels, 1, bias=False)
        self.blueprint = nn.Conv2d(
            spec.out_channels,
            spec.out_channels,
            spec.kernel_size,
            stride=spec.stride,
            padding=as_padding(spec.padding),
            dilation=spec.dilation,
            groups=spec.out_channels,
            bias=spec.bias,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions."""
        return dense_only(spec)

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts; the 1x1 runs at input size."""
        p, q = spec.output_size(height, width)
        return spec.in_channels * spec.out_channels * height * width + spec.out_channels * spec.taps * p * q

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both factors to a dense kernel, filter by filter.

        Each filter, seen as an `I` x `K` matrix, is replaced by its best rank-one approximation,
        the closest kernel (Frobenius norm) this op can represent (Eckart and Young, 1936).
        """
        point_OI, blueprint_OK = rank_one(weight.flatten(2))
        self.point.weight.copy_(point_OI[:, :, None, None])
        self.blueprint.weight.copy_(blueprint_OK.view_as(self.blueprint.weight))
        if bias is not None and self.blueprint.bias is not None:
            self.blueprint.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the outer product of both parts, filter by filter."""
        return self.point.weight * self.blueprint.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.blueprint(self.point(x))
        return out
