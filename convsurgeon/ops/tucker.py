"""Fewer input channels, fewer output channels, and the kernel between them: Tucker's decomposition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from convsurgeon.factorization import rank_keeping, tucker
from convsurgeon.ops._base import AbstractCheapConv, as_padding, dense_only
from convsurgeon.ops._ranks import Rank, check_rank, fit_rank, is_share_of_energy, known_rank, rank_not_known
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, H W input size, P Q output size,
# K kernel positions (kh * kw), A and C channels between the parts: of the input's side and the output's.


@final
@register
class TuckerConv2d(AbstractCheapConv):
    """A 1x1 to `A` channels, the donor's kernel from `A` to `C` channels, and a 1x1 to all outputs.

    The dense kernel factors as ``w[o, i, k] = sum_ac expand[o, c] * core[c, a, k] * reduce[a, i]``.
    The core carries stride, padding and dilation, the last 1x1 the bias.

    At the cost of eight groups it kept .84 of the energy of a trained VGG-16's 3x3 kernels. Three convolutions
    for one are slower than their MACs say, 4 times fewer: in onnxruntime (fp32, one thread) 2.6 times as fast as
    dense for 64 channels at 56 px, 3.1 times for 256 at 14 px, and 1.8 times at stride 2
    (`python docs/benchmarks/op_latency.py`).

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*A*H*W + A*C*K*P*Q + C*O*P*Q` MACs and `I*A + A*C*K + C*O` weights, against `I*O*K*P*Q` and `I*O*K`
        for the dense kernel. Two fifths of the full ranks, the default, are 4 times fewer where a 3x3
        keeps the channels. The first 1x1 runs at input size: at stride 2 it costs four times as much.

    Reference:
        Kim et al., 2015, arXiv:1511.06530.

    Examples:
        >>> import torch
        >>> op = TuckerConv2d.from_conv(torch.nn.Conv2d(8, 16, 3, padding=1), {"rank": 0.5})
        >>> op.options["rank_in"], op.options["rank_out"], op(torch.zeros(2, 8, 5, 5)).shape
        (4, 8, torch.Size([2, 16, 5, 5]))
    """

    name: ClassVar[str] = "tucker"
    summary: ClassVar[str] = "1x1 to few channels, kxk among few, then 1x1"
    reference: ClassVar[str] = "Kim et al., 2015, arXiv:1511.06530"
    cost: ClassVar[str] = "I*A*H*W + A*C*K*P*Q + C*O*P*Q MACs, I*A + A*C*K + C*O weights, A = rank_in, C = rank_out"
    keeps: ClassVar[str] = (
        "the A and C main directions of the input and of the output channels; 59 % of the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = (
        "three convolutions for one: 2.6x as fast at 3.9x fewer MACs; stride 2: 1.8x, since the first runs at "
        "input size"
    )
    last: ClassVar[str] = "expand"

    @dataclass(frozen=True)
    class Options:
        """How many channels stand between the parts: `16`, `0.4` of the full rank, or `90%` of the energy.

        `rank_in` and `rank_out` are those of one side, and `rank` that of a side of which nothing else is said.
        With `rank=90%` the kernel keeps that share at least; `rank_in=90%` is the share kept along that side alone.
        """

        rank: Rank = 0.4
        rank_in: Rank | None = None
        rank_out: Rank | None = None

        def __post_init__(self) -> None:
            for name, rank in vars(self).items():
                if rank is not None:
                    check_rank(rank, f"tucker: option {name}")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        self.reduce = nn.Conv2d(spec.in_channels, options.rank_in, 1, bias=False)
        self.core = nn.Conv2d(
            options.rank_in,
            options.rank_out,
            spec.kernel_size,
            stride=spec.stride,
            padding=as_padding(spec.padding),
            dilation=spec.dilation,
            bias=False,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]
        )
        self.expand = nn.Conv2d(options.rank_out, spec.out_channels, 1, bias=spec.bias)

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Turn the ranks into numbers, of which neither is more than the other lets pass."""
        channels = {"rank_in": spec.in_channels, "rank_out": spec.out_channels}
        ranks = {}
        for (name, full), others, axis in zip(channels.items(), reversed(channels.values()), (1, 0), strict=True):
            asked = options.rank if (own := getattr(options, name)) is None else own
            keeping = None if weight is None else _keeping(weight.movedim(axis, 0).flatten(1), of_half=own is None)
            ranks[name] = fit_rank(asked, min(full, others * spec.taps), keeping)
        if not any(is_share_of_energy(rank) for rank in ranks.values()):
            ranks["rank_in"] = min(ranks["rank_in"], ranks["rank_out"] * spec.taps)
            ranks["rank_out"] = min(ranks["rank_out"], ranks["rank_in"] * spec.taps)
        return replace(options, **ranks)

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and a share of energy without a kernel to take it from."""
        fitted = cls.fit_options(spec, options)
        return dense_only(spec) or rank_not_known(fitted.rank_in) or rank_not_known(fitted.rank_out)

    @classmethod
    def is_closest(cls, options: Any) -> bool:
        """Of kernels of these ranks a better one may be missed."""
        return False

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of the three parts; the first one runs at input size."""
        fitted = cls.fit_options(spec, cls.parse_options(options))
        rank_in, rank_out = known_rank(fitted.rank_in), known_rank(fitted.rank_out)
        p, q = spec.output_size(height, width)
        at_output = rank_in * spec.taps + spec.out_channels
        return spec.in_channels * rank_in * height * width + rank_out * at_output * p * q

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit the three parts to a dense kernel: the main directions of its inputs, of its outputs, and the rest.

        Starting from the truncated higher-order singular value decomposition, one side is improved for the
        other in turns, in closed form, until nothing is gained: a local optimum of the distance (Frobenius
        norm), at most twice the smallest one squared. What is exactly of these ranks is met exactly.
        """
        expand_OC, core_CAK, reduce_AI = tucker(weight.flatten(2), self.core.in_channels, self.core.out_channels)
        self.expand.weight.copy_(expand_OC[:, :, None, None])
        self.core.weight.copy_(core_CAK.reshape(self.core.weight.shape))
        self.reduce.weight.copy_(reduce_AI[:, :, None, None])
        if bias is not None and self.expand.bias is not None:
            self.expand.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the product of the three parts."""
        expand_OC, reduce_AI = self.expand.weight[:, :, 0, 0], self.reduce.weight[:, :, 0, 0]
        return torch.einsum("oc,cahw,ai->oihw", expand_OC, self.core.weight, reduce_AI)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.expand(self.core(self.reduce(x)))
        return out


def _keeping(matrix: Tensor, *, of_half: bool) -> Callable[[float], int]:
    """Return how many directions keep a share of the energy; with `of_half` they lose half of what may be lost."""
    return lambda share: rank_keeping(matrix, (1 + share) / 2 if of_half else share)
