"""Fewer terms, each an outer product of three vectors: the canonical polyadic decomposition of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from convsurgeon.factorization import full_rank, polyadic, terms_keeping
from convsurgeon.ops._base import AbstractCheapConv, dense_only
from convsurgeon.ops._parts import spatial_part
from convsurgeon.ops._ranks import Rank, check_rank, fit_rank, known_rank, rank_not_known
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# of channels that are no multiple of this, onnxruntime has no fast depthwise path: 58 took 1.5 times as long as 60
_MULTIPLE = 4

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), R channels between the parts: terms of the sum.


@final
@register
class CpConv2d(AbstractCheapConv):
    """A 1x1 to `R` channels, one spatial filter on each, and a 1x1 to all outputs.

    The dense kernel factors as ``w[o, i, k] = sum_r expand[o, r] * spatial[r, k] * reduce[r, i]``: where
    `depthwise` has one spatial filter for every input channel and `bsconv` one for every output channel, it
    has one for every mixture. The spatial part carries stride, padding and dilation, the last 1x1 the bias.

    In onnxruntime (fp32, one thread) it was 3.7 times as fast as dense for 64 channels at 56 px, 4.3 times for
    256 at 14 px, and 1.7 times at stride 2 (`python docs/benchmarks/op_latency.py`).

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `R*(I*H*W + K*P*Q + O*P*Q)` MACs and `R*(I + K + O)` weights, against `I*O*K*P*Q` and `I*O*K` for the
        dense kernel. A tenth of the full rank, the product of the two smallest of I, O and K, is the default: 4.5
        to 5 times fewer where a 3x3 keeps 64 channels or more, 3.5 times with 16. The first 1x1 runs at input size: at
        stride 2 it costs four times as much. Shares of the full rank or of the energy are rounded up to a multiple of
        4 channels; for one of the energy the decomposition is done about ten times, half a minute or more for 256
        channels.

    Reference:
        Lebedev et al., 2014, arXiv:1412.6553; with the kernel's positions together: Astrid and Lee, 2017,
        arXiv:1701.07148.

    Examples:
        >>> import torch
        >>> op = CpConv2d.from_conv(torch.nn.Conv2d(8, 16, 3, padding=1), {"rank": 6})
        >>> op.spatial.weight.shape, op(torch.zeros(2, 8, 5, 5)).shape
        (torch.Size([6, 1, 3, 3]), torch.Size([2, 16, 5, 5]))
    """

    name: ClassVar[str] = "cp"
    summary: ClassVar[str] = "1x1 to few channels, kxk depthwise, then 1x1"
    reference: ClassVar[str] = "Lebedev et al., 2014, arXiv:1412.6553; Astrid and Lee, 2017, arXiv:1701.07148"
    cost: ClassVar[str] = "R*(I*H*W + K*P*Q + O*P*Q) MACs, R*(I + K + O) weights, R = rank"
    keeps: ClassVar[str] = (
        "R mixtures of input channels, each with one spatial pattern; 70 % of the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = "stride 2: the first 1x1 runs at input size (1.7x as fast as dense, 3.7x to 4.3x else)"
    last: ClassVar[str] = "expand"

    @dataclass(frozen=True)
    class Options:
        """How many terms there are: `16`, `0.1` of the full rank, or `90%` of the energy."""

        rank: Rank = 0.1

        def __post_init__(self) -> None:
            check_rank(self.rank, "cp: option rank")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        rank = known_rank(options.rank)
        self.reduce = nn.Conv2d(spec.in_channels, rank, 1, bias=False)
        self.spatial = spatial_part(spec, rank, rank, groups=rank, bias=False)
        self.expand = nn.Conv2d(rank, spec.out_channels, 1, bias=spec.bias)

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Turn the rank into a number; for a share of energy the decomposition is done for several."""
        keeping = None if weight is None else lambda share: terms_keeping(weight.flatten(2), share)
        return replace(options, rank=fit_rank(options.rank, _full_rank(spec), keeping, multiple=_MULTIPLE))

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and a share of energy without weights."""
        return dense_only(spec) or rank_not_known(cls.fit_options(spec, options).rank)

    @classmethod
    def is_closest(cls, options: Any) -> bool:
        """Of kernels of this rank a better one may be missed."""
        return False

    @classmethod
    def is_exact(cls, spec: ConvSpec, options: Any) -> bool:
        """At full rank; below it not every kernel of that rank is found again."""
        return bool(cls.fit_options(spec, options).rank == _full_rank(spec))

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of the three parts; the first one runs at input size."""
        rank = known_rank(cls.fit_options(spec, cls.parse_options(options)).rank)
        p, q = spec.output_size(height, width)
        return rank * (spec.in_channels * height * width + (spec.taps + spec.out_channels) * p * q)

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit the three parts to a dense kernel.

        Each part is solved for the others in turns, then all descend together, towards a local optimum of the distance
        (Frobenius norm). The search is cut short: going on with it may gain some percent of what is lost, and most of
        it where little is. A kernel that is of this rank is found again where the
        rank is at most the number of input and of output channels and the terms are well apart.
        """
        out_OR, in_IR, position_KR = polyadic(weight.flatten(2), self.reduce.out_channels)
        self.expand.weight.copy_(out_OR[:, :, None, None])
        self.reduce.weight.copy_(in_IR.T[:, :, None, None])
        self.spatial.weight.copy_(position_KR.T.reshape(self.spatial.weight.shape))
        if bias is not None and self.expand.bias is not None:
            self.expand.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the product of the three parts."""
        expand_OR, reduce_RI = self.expand.weight[:, :, 0, 0], self.reduce.weight[:, :, 0, 0]
        return torch.einsum("or,rhw,ri->oihw", expand_OR, self.spatial.weight[:, 0], reduce_RI)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.expand(self.spatial(self.reduce(x)))
        return out


def _full_rank(spec: ConvSpec) -> int:
    return full_rank(spec.out_channels, spec.in_channels, spec.taps)
