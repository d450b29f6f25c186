"""A few basis filters, then 1x1: the kernel as a matrix of lower rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from convsurgeon.factorization import low_rank
from convsurgeon.ops._base import as_padding, ungrouped_only
from convsurgeon.ops._low_rank import AbstractLowRank
from convsurgeon.ops._ranks import Rank, check_rank
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), R the rank.


@final
@register
class LowRankConv2d(AbstractLowRank):
    """A convolution to `R` channels with the donor's kernel size, then a 1x1 convolution.

    Every filter is a mixture of R basis filters: ``w[o, i, k] = sum_r point[o, r] * basis[r, i, k]``.
    The basis carries stride, padding and dilation, the 1x1 the bias.

    Keeps the main directions of all filters together. In onnxruntime (fp32, one thread, 64 channels at 56 px
    to 256 at 14) a 3x3 was 3.3 to 3.6 times as fast as dense, a 1x1 1.9 times
    (`python docs/benchmarks/op_latency.py`).

    A 1x1 convolution becomes two: it is the op for networks that consist of them. It is applied to
    them only where `pointwise=lowrank` or a mapping asks for it.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `R*(I*K + O)*P*Q` MACs and `R*(I*K + O)` weights, against `I*O*K*P*Q` and `I*O*K` for the dense
        kernel. A quarter of the full rank `min(O, I*K)`, the default, is 3.6 times fewer where a 3x3
        keeps the channels, and 2 times fewer where a 1x1 does.

    Reference:
        Zhang et al., 2014, arXiv:1411.4229.

    Examples:
        >>> import torch
        >>> op = LowRankConv2d.from_conv(torch.nn.Conv2d(8, 16, 3, padding=1), {"rank": "90%"})
        >>> op.options["rank"] < 16, op(torch.zeros(2, 8, 5, 5)).shape
        (True, torch.Size([2, 16, 5, 5]))
    """

    name: ClassVar[str] = "lowrank"
    summary: ClassVar[str] = "kxk to few channels, then 1x1; also two 1x1 for one"
    reference: ClassVar[str] = "Zhang et al., 2014, arXiv:1411.4229"
    cost: ClassVar[str] = "R*(I*K + O)*P*Q MACs, R*(I*K + O) weights, R = rank"
    keeps: ClassVar[str] = "the R main directions of all filters together; 55 % of the energy of a trained ResNet-20"
    slow: ClassVar[str] = "1x1 convolutions: two for one were 1.9x as fast at 2x fewer MACs"
    last: ClassVar[str] = "pointwise"

    @dataclass(frozen=True)
    class Options:
        """How many channels stand between the two parts: `16`, `0.25` of the full rank, or `90%` of the energy."""

        rank: Rank = 0.25

        def __post_init__(self) -> None:
            check_rank(self.rank, "lowrank: option rank")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        self.basis = nn.Conv2d(
            spec.in_channels,
            options.rank,
            spec.kernel_size,
            stride=spec.stride,
            padding=as_padding(spec.padding),
            dilation=spec.dilation,
            bias=False,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )
        self.pointwise = nn.Conv2d(options.rank, spec.out_channels, 1, bias=spec.bias)

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        """Return a row for every filter, `O` x `I*K`."""
        return weight.flatten(1)

    @classmethod
    def matrix_size(cls, spec: ConvSpec) -> tuple[int, int]:
        """Return `O` and `I*K`."""
        return spec.out_channels, spec.in_channels * spec.taps

    @classmethod
    def refuse(cls, spec: ConvSpec) -> str | None:
        """Refuse grouped convolutions."""
        return ungrouped_only(spec)

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of both parts, which run at output size."""
        p, q = spec.output_size(height, width)
        return cls.rank_of(spec, options) * sum(cls.matrix_size(spec)) * p * q

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit both parts to a dense kernel at once.

        The kernel as a matrix with a row for every filter is replaced by its best rank-R approximation:
        the closest kernel (Frobenius norm) that this op can represent (Eckart and Young, 1936).
        """
        point_OR, basis_RC = low_rank(self.as_matrix(weight), self.basis.out_channels)
        self.pointwise.weight.copy_(point_OR[:, :, None, None])
        self.basis.weight.copy_(basis_RC.view_as(self.basis.weight))
        if bias is not None and self.pointwise.bias is not None:
            self.pointwise.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the product of both parts."""
        return torch.einsum("or,rihw->oihw", self.pointwise.weight[:, :, 0, 0], self.basis.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.pointwise(self.basis(x))
        return out
