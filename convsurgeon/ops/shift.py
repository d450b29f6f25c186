"""Shift, then pointwise: every channel moves by whole pixels, then a 1x1 mixes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from convsurgeon.factorization import fixed_taps, highest_energy_taps, one_hot_kernel
from convsurgeon.ops._registry import register
from convsurgeon.ops._spatial_pointwise import AbstractSpatialPointwise
from convsurgeon.spec import ConvSpec


@final
@register
class ShiftConv2d(AbstractSpatialPointwise):
    """Each input channel is shifted to one position of the kernel's window, then a 1x1 follows.

    The dense kernel factors as ``w[o, i, k] = point[o, i] * (k == tap[i])``.

    The shift is a frozen one-hot depthwise convolution, in training and in the exported file: it
    takes any position, exports to an ordinary Conv, and ran faster on CPU runtimes than pads and
    slices did. It has no weights to learn and multiplies nothing that matters; a runtime may still
    execute its `I*K*P*Q` taps, which a MAC counter sees and which `one_hot_macs` states.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*O*P*Q` MACs and `I*O` weights, against `I*O*K*P*Q` and `I*O*K` for the dense kernel:
        K times fewer.

    Reference:
        Wu et al., 2017, arXiv:1711.08141; the fixed rule is that of Xie et al., 2019, arXiv:1909.13063.

    Examples:
        >>> import torch
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> op = ShiftConv2d.from_conv(conv)
        >>> op(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    name: ClassVar[str] = "shift"
    summary: ClassVar[str] = "shift each channel, then 1x1"
    reference: ClassVar[str] = "Wu et al., 2017, arXiv:1711.08141"

    @dataclass(frozen=True)
    class Options(AbstractSpatialPointwise.Options):
        """How the shift of each channel is chosen, and where the stride sits."""

        assignment: Literal["energy", "fixed"] = "energy"

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        weight = self.spatial.weight.detach()
        del self.spatial.weight
        self.spatial.register_buffer("weight", weight)
        self._set_taps(fixed_taps(spec.in_channels, *spec.kernel_size))

    @classmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return one group per input channel."""
        return spec.in_channels

    @classmethod
    def spatial_macs(cls, spec: ConvSpec, height: int, width: int, options: Any) -> int:
        """Return 0: moving data multiplies nothing."""
        return 0

    @classmethod
    def one_hot_macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the taps of the one-hot kernel, which a counter sees as multiply-adds."""
        options = cls.fit_options(spec, cls.parse_options(options))
        p, q = cls._spatial_size(spec, height, width, options)
        return spec.in_channels * spec.taps * p * q

    @property
    def taps(self) -> Tensor:
        """The position each input channel keeps, `(I,)`, numbered row by row."""
        return self.spatial.weight.flatten(1).argmax(dim=1)

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Choose each channel's position and keep the dense weights that stand there.

        With `assignment=energy` the position is the one that carries most of the channel's energy:
        the closest kernel (Frobenius norm) that this op can represent. With `assignment=fixed` it
        is the paper's, and the 1x1 is the closest for it.
        """
        if self.options["assignment"] == "energy":
            taps_I = highest_energy_taps(weight)
        else:
            taps_I = fixed_taps(self.in_channels, *self.kernel_size).to(weight.device)
        self._set_taps(taps_I)
        kept_OI = weight.flatten(2).gather(2, taps_I.expand(len(weight), -1)[..., None])[..., 0]
        self.pointwise.weight.copy_(kept_OI[:, :, None, None])
        self.copy_bias(bias)

    @torch.no_grad()
    def _set_taps(self, taps_I: Tensor) -> None:
        self.spatial.weight.copy_(one_hot_kernel(taps_I, *self.kernel_size))
