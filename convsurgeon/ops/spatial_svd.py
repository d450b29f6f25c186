"""A column of kernel positions, then a row: the kernel separated along its height and its width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from convsurgeon.factorization import low_rank
from convsurgeon.ops._base import as_padding, dense_only
from convsurgeon.ops._low_rank import AbstractLowRank
from convsurgeon.ops._ranks import Rank, check_rank
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# Y X kernel height and width, R the rank.


@final
@register
class SpatialSVDConv2d(AbstractLowRank):
    """A `Y`x1 convolution to `R` channels, then a 1x`X` convolution.

    The dense kernel factors as ``w[o, i, y, x] = sum_r vertical[r, i, y] * horizontal[o, r, x]``. Each
    part carries its own axis of stride, padding and dilation: in all of torch's modes, padding both axes
    is padding one after the other.

    At the cost of eight groups it kept .86 of the energy of a trained VGG-16's 3x3 kernels. In onnxruntime (fp32,
    one thread) it was 2.8 times as fast as dense for 64 channels at 56 px, 3.9 times for 256 at 14 px, and
    2.5 times at stride 2 (`python docs/benchmarks/op_latency.py`).

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `R*I*Y*P*W + R*O*X*P*Q` MACs and `R*(I*Y + O*X)` weights, against `I*O*Y*X*P*Q` and `I*O*Y*X` for
        the dense kernel. The vertical part runs at the input's width: at stride 2 it costs twice as much.
        An eighth of the full rank `min(I*Y, O*X)`, the default, is 4 times fewer where a 3x3 keeps the
        channels.

    Reference:
        Jaderberg, Vedaldi and Zisserman, 2014, arXiv:1405.3866; the closed form is that of Tai et al.,
        2015, arXiv:1511.06067.

    Examples:
        >>> import torch
        >>> op = SpatialSVDConv2d.from_conv(torch.nn.Conv2d(8, 16, 3, padding=1))
        >>> op.options["rank"], op(torch.zeros(2, 8, 5, 5)).shape
        (3, torch.Size([2, 16, 5, 5]))
    """

    name: ClassVar[str] = "spatial_svd"
    summary: ClassVar[str] = "kx1 to few channels, then 1xk"
    reference: ClassVar[str] = "Jaderberg, Vedaldi and Zisserman, 2014, arXiv:1405.3866"
    cost: ClassVar[str] = "R*I*Y*P*W + R*O*X*P*Q MACs, R*(I*Y + O*X) weights, R = rank, K = Y*X"
    keeps: ClassVar[str] = (
        "the R main products of a vertical and a horizontal pattern; 60 % of the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = (
        "stride 2: the vertical part runs at the input's width (2.5x as fast as dense, 2.8x to 3.9x else)"
    )
    last: ClassVar[str] = "horizontal"

    @dataclass(frozen=True)
    class Options:
        """How many channels stand between the two parts: `16`, `0.125` of the full rank, or `90%` of energy."""

        rank: Rank = 0.125

        def __post_init__(self) -> None:
            check_rank(self.rank, "spatial_svd: option rank")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        # "same" and "valid" are so along either axis
        rows, columns = spec.padding if isinstance(spec.padding, tuple) else (None, None)
        self.vertical = nn.Conv2d(
            spec.in_channels,
            options.rank,
            (spec.kernel_size[0], 1),
            stride=(spec.stride[0], 1),
            padding=as_padding(spec.padding if rows is None else (rows, 0)),
            dilation=(spec.dilation[0], 1),
            bias=False,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )
        self.horizontal = nn.Conv2d(
            options.rank,
            spec.out_channels,
            (1, spec.kernel_size[1]),
            stride=(1, spec.stride[1]),
            padding=as_padding(spec.padding if columns is None else (0, columns)),
            dilation=(1, spec.dilation[1]),
            bias=spec.bias,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        """Return a row for every input channel and row of the kernel, `I*Y` x `O*X`."""
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    @classmethod
    def matrix_size(cls, spec: ConvSpec) -> tuple[int, int]:
        """Return `I*Y` and `O*X`."""
        return spec.in_channels * spec.kernel_size[0], spec.out_channels * spec.kernel_size[1]

    @classmethod
    def refuse(cls, spec: ConvSpec) -> str | None:
        """Refuse grouped and 1x1 convolutions."""
        return dense_only(spec)

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts; the vertical one runs at the input's width."""
        p, q = spec.output_size(height, width)
        rows, columns = cls.matrix_size(spec)
        return cls.rank_of(spec, options) * (rows * p * width + columns * p * q)

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both parts to a dense kernel at once.

        The kernel as an `I*Y` x `O*X` matrix is replaced by its best rank-R approximation: the closest
        kernel (Frobenius norm) that this op can represent (Tai et al., 2015, theorem 1).
        """
        vertical_CR, horizontal_RD = low_rank(self.as_matrix(weight), self.vertical.out_channels)
        rank, height, width = self.vertical.out_channels, *self.kernel_size
        self.vertical.weight.copy_(vertical_CR.T.reshape(rank, self.in_channels, height, 1))
        self.horizontal.weight.copy_(horizontal_RD.reshape(rank, self.out_channels, 1, width).transpose(0, 1))
        if bias is not None and self.horizontal.bias is not None:
            self.horizontal.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the product of both parts."""
        return torch.einsum("riy,orx->oiyx", self.vertical.weight[..., 0], self.horizontal.weight[:, :, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.horizontal(self.vertical(x))
        return out
