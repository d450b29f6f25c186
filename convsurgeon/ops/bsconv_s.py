"""Blueprint separable convolution in a subspace (BSConv-S): two pointwise, then depthwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor, nn

from convsurgeon.factorization import blueprint_weights, rank_keeping, subspace_blueprints
from convsurgeon.ops._base import AbstractCheapConv, dense_only
from convsurgeon.ops._parts import spatial_part
from convsurgeon.ops._ranks import Rank, check_rank, fit_rank, known_rank, rank_not_known
from convsurgeon.ops._registry import register
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, M rank, H W input size, P Q output size,
# K kernel positions (kh * kw).


@final
@register
class BSConvS2d(AbstractCheapConv):
    """A 1x1 into a few channels, a 1x1 out of them, then a depthwise convolution.

    It is `bsconv` whose pointwise part is itself a product of `rank` M, so the dense kernel factors
    as ``w[o, i, k] = blueprint[o, k] * sum_m point[o, m] * subspace[m, i]``. It keeps a part of what
    `bsconv` keeps, all of it at rank `min(I, O)`; it is cheaper below `I*O / (I + O)`. Neither 1x1
    has a bias, so padding before or after them is the same, in every mode.

    A rank given as a share of energy is a share of what `bsconv` keeps.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `(I + O)*M*H*W + O*K*P*Q` MACs and `(I + O)*M + O*K` weights, against `I*O*K*P*Q` and `I*O*K`
        for the dense kernel. Both pointwise parts run at input resolution. The paper's penalty that
        keeps `subspace` orthonormal in training is not part of it.

    Reference:
        Haase and Amthor, 2020, arXiv:2003.13549.

    Examples:
        >>> import torch
        >>> conv = nn.Conv2d(8, 16, 3, padding=1)
        >>> op = BSConvS2d.from_conv(conv, {"rank": 3})
        >>> op(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    name: ClassVar[str] = "bsconv_s"
    summary: ClassVar[str] = "1x1 to few channels, 1x1, then kxk depthwise"
    reference: ClassVar[str] = "Haase and Amthor, 2020, arXiv:2003.13549"
    cost: ClassVar[str] = "(I + O)*M*H*W + O*K*P*Q MACs, (I + O)*M + O*K weights, M = rank"
    keeps: ClassVar[str] = (
        "a part of what bsconv keeps, all of it at rank min(I, O); 32 % of the energy of a trained ResNet-20"
    )
    slow: ClassVar[str] = "stride 2: both 1x1 run at input size; dearer than bsconv above rank I*O / (I + O)"
    last: ClassVar[str] = "blueprint"

    @dataclass(frozen=True)
    class Options:
        """How many channels the subspace has; 0.25 is a quarter of the fewer of inputs and outputs."""

        rank: Rank = 0.25

        def __post_init__(self) -> None:
            check_rank(self.rank, "bsconv_s: option rank")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        rank, channels = known_rank(options.rank), spec.out_channels
        self.subspace = nn.Conv2d(spec.in_channels, rank, 1, bias=False)
        self.point = nn.Conv2d(rank, channels, 1, bias=False)
        self.blueprint = spatial_part(spec, channels, channels, groups=channels, bias=spec.bias)

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Turn the rank into a number; a share of energy is that of the filters' best blueprints."""
        keeping = None if weight is None else lambda share: rank_keeping(blueprint_weights(weight.flatten(2)), share)
        return replace(options, rank=fit_rank(options.rank, min(spec.in_channels, spec.out_channels), keeping))

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and a share of energy without weights."""
        return dense_only(spec) or rank_not_known(cls.fit_options(spec, options).rank)

    @classmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds of the three parts; both 1x1 run at input size."""
        rank = known_rank(cls.fit_options(spec, cls.parse_options(options)).rank)
        p, q = spec.output_size(height, width)
        pointwise = (spec.in_channels + spec.out_channels) * rank * height * width
        return pointwise + spec.out_channels * spec.taps * p * q

    @classmethod
    def is_closest(cls, options: Any) -> bool:
        """No: the factors are solved for in turn."""
        return False

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit the three factors to a dense kernel.

        For given blueprints the closest 1x1 parts (Frobenius norm) are a truncated SVD, for given
        1x1 parts the closest blueprints an SVD per filter. Both are done in turn from `bsconv`'s
        blueprints on, and no step is farther from the kernel than the one before. What is found is a
        local optimum, not surely the closest kernel of all; it is for those that the op can represent.
        """
        subspace_MI, point_OM, blueprint_OK = subspace_blueprints(weight.flatten(2), self.subspace.out_channels)
        self.subspace.weight.copy_(subspace_MI[:, :, None, None])
        self.point.weight.copy_(point_OM[:, :, None, None])
        self.blueprint.weight.copy_(blueprint_OK.view_as(self.blueprint.weight))
        if bias is not None and self.blueprint.bias is not None:
            self.blueprint.bias.copy_(bias)

    def as_dense(self) -> Tensor:
        """Return the product of the 1x1 parts, times the blueprints filter by filter."""
        point_OI = self.point.weight.flatten(1) @ self.subspace.weight.flatten(1)
        return point_OI[:, :, None, None] * self.blueprint.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        out: Tensor = self.blueprint(self.point(self.subspace(x)))
        return out
