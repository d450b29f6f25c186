"""Shift, then pointwise: every channel moves by whole pixels, then a 1x1 mixes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from convsurgeon.errors import OptionError
from convsurgeon.factorization import (
    balanced_taps,
    closest_hats,
    fit_on_features,
    fixed_taps,
    hat_weights,
    highest_energy_taps,
    one_hot_kernel,
    pursue_taps,
)
from convsurgeon.ops._base import dense_only
from convsurgeon.ops._hat_conv import HatConv2d
from convsurgeon.ops._registry import register
from convsurgeon.ops._spatial_pointwise import AbstractSpatialPointwise
from convsurgeon.spec import ConvSpec

# Shape letters: B batch, I in_channels, O out_channels, E expansion, C shifted channels (I * E),
# H W input size, P Q output size, K kernel positions (kh * kw).


@final
@register
class ShiftConv2d(AbstractSpatialPointwise):
    """Each input channel is shifted to one position of the kernel's window, or `expansion` ones, then a 1x1 follows.

    The dense kernel factors as ``w[o, i, k] = sum_e point[o, i, e] * (k == tap[i, e])``, one term by
    default; the copies of a channel have taps of their own. A trained VGG-16's 3x3 kernels keep .16
    of their energy at their best taps, .11 at the fixed ones.

    The shift is a frozen one-hot depthwise convolution, in training and in the exported file: it
    takes any position, exports to an ordinary Conv, and ran faster on CPU runtimes than pads and
    slices did. It has no weights to learn and multiplies nothing that matters; a runtime may still
    execute its `I*E*K*P*Q` taps, which a MAC counter sees and which `one_hot_macs` states.

    With `assignment=learned` (active shift) each channel has a real-valued offset that is trained,
    and `(k == tap[i])` becomes the hat function that interpolates between neighbouring taps. What
    is delivered has whole taps: `round_taps` rounds and freezes them, and `export` does it on its
    copy and says how far they moved. Train on after rounding where that costs accuracy.

    Shape:
        - Input: `(B, I, H, W)`, float.
        - Output: `(B, O, P, Q)`, the size `Conv2d` would give.

    Cost:
        `I*E*O*P*Q` MACs and `I*E*O` weights (learned: and `2*I` offsets), against `I*O*K*P*Q` and
        `I*O*K` for the dense kernel: K / E times fewer. With an expansion onnxruntime leaves its fast
        depthwise path: 64 channels at 56x56 took .33 ms, 1.13 with an expansion of 2, 2.2 dense (3x3,
        fp32, one thread).

    Reference:
        Wu et al., 2017, arXiv:1711.08141; the fixed rule is that of Xie et al., 2019, arXiv:1909.13063;
        learned offsets are those of Jeon and Kim, 2018, arXiv:1806.07370.

    Examples:
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> op = ShiftConv2d.from_conv(conv)
        >>> op(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    name: ClassVar[str] = "shift"
    summary: ClassVar[str] = "shift each channel, then 1x1"
    reference: ClassVar[str] = "Wu et al., 2017, arXiv:1711.08141"
    cost: ClassVar[str] = (
        "I*E*O*P*Q MACs, I*E*O weights, E = expansion; a runtime may execute the I*E*K*P*Q one-hot taps, too"
    )
    keeps: ClassVar[str] = "of each input channel E positions of the window; 16 % of the energy of a trained ResNet-20"
    slow: ClassVar[str] = "expansion above 1: no fast depthwise path in onnxruntime (3.4x the time)"

    @dataclass(frozen=True)
    class Options(AbstractSpatialPointwise.Options):
        """How the shifts of each channel are chosen, how many it has, and where the stride sits."""

        assignment: Literal["energy", "fixed", "balanced", "learned"] = "energy"
        expansion: int = 1

        def __post_init__(self) -> None:
            if self.expansion < 1:
                raise OptionError(f"shift: option expansion must be at least 1, got {self.expansion}")

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__(spec, options)
        channels, copies = spec.in_channels, options.expansion
        if options.assignment == "learned":
            self.add_module("spatial", HatConv2d(self.spatial))
        else:
            weight = self.spatial.weight.detach()
            del self.spatial.weight
            self.spatial.register_buffer("weight", weight)
        if options.assignment == "balanced":
            self._set_taps(torch.arange(channels * copies) % spec.taps)
        else:
            self._set_taps(fixed_taps(channels, *spec.kernel_size, copies))

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Lower `expansion` to the kernel's positions: more copies of a channel would be twice at one."""
        return replace(options, expansion=min(options.expansion, spec.taps))

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse grouped and 1x1 convolutions, and learned offsets of several copies."""
        if reason := dense_only(spec):
            return reason
        if options.assignment == "learned" and options.expansion > 1:
            return f"assignment=learned takes expansion=1, not {options.expansion}"
        return None

    @classmethod
    def is_closest(cls, options: Any) -> bool:
        """Of the kernels that the assignment allows; where offsets are learned, a better one may be missed."""
        return bool(options.assignment != "learned")

    @classmethod
    def spatial_groups(cls, spec: ConvSpec, options: Any) -> int:
        """Return one group per input channel."""
        return spec.in_channels

    @classmethod
    def spatial_channels(cls, spec: ConvSpec, options: Any) -> int:
        """Return `expansion` channels per input channel, side by side."""
        return spec.in_channels * int(options.expansion)

    @classmethod
    def spatial_macs(cls, spec: ConvSpec, height: int, width: int, options: Any) -> int:
        """Return 0: moving data multiplies nothing."""
        return 0

    @classmethod
    def one_hot_macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the taps of the one-hot kernel, which a counter sees as multiply-adds."""
        options = cls.fit_options(spec, cls.parse_options(options))
        p, q = cls._spatial_size(spec, height, width, options)
        return cls.spatial_channels(spec, options) * spec.taps * p * q

    @property
    def _hats(self) -> HatConv2d | None:
        spatial: nn.Module = self.spatial
        return spatial if isinstance(spatial, HatConv2d) else None

    @property
    def taps(self) -> Tensor:
        """The position each shifted channel keeps, or is nearest to, `(C,)`, numbered row by row."""
        return self.spatial.weight.flatten(1).argmax(dim=1)

    def round_taps(self) -> Tensor:
        """Round learned offsets to whole taps, in place, and freeze them; the 1x1 stays as it is.

        Shape:
            - result: `(C, 2)`, how far each was moved, in taps; zeros where offsets are not learned.
        """
        hats = self._hats
        if hats is None:
            return torch.zeros(len(self.spatial.weight), 2).to(self.spatial.weight)
        before_C2 = hats.position.detach()
        self._set_taps(self.taps)
        hats.offset.requires_grad_(False)
        return hats.position.detach() - before_C2

    def freeze_for_export(self) -> str | None:
        """Round learned offsets; say how far they moved."""
        moved_C = self.round_taps().abs().amax(dim=1)
        if not moved_C.any():
            return None
        count = int(moved_C.count_nonzero())
        return (
            f"{count} of {len(moved_C)} learned offsets were rounded to whole taps, "
            f"by {moved_C.mean():.2f} of a tap on average and {moved_C.max():.2f} at most"
        )

    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Choose each channel's positions and keep the dense weights that stand there.

        With `assignment=energy` the positions are those that carry most of the channel's energy:
        the closest kernel (Frobenius norm) that this op can represent. With `balanced` each position
        is taken by equally many channels, up to one, and that choice is the closest. With `fixed`
        they are the paper's, and the 1x1 is the closest for them. With `learned` each offset is where
        a hat is closest, in the middle between taps if need be; it is a local optimum.
        """
        if self._hats is not None:
            self._hats.place(closest_hats(weight))
            point_OC = hat_weights(weight, self._hats.weight[:, 0])
        else:
            taps_IE = self._choose(weight).view(self.in_channels, -1)
            self._set_taps(taps_IE.flatten())
            point_OC = weight.flatten(2).gather(2, taps_IE.expand(len(weight), -1, -1)).flatten(1)
        self.pointwise.weight.copy_(point_OC[:, :, None, None])
        self.copy_bias(bias)

    def choose_by_data(self, gram: Tensor, cross: Tensor) -> None:
        """Choose positions, and the 1x1, that err little on the data, by matching pursuit.

        Only with `assignment=energy`: fixed and balanced positions stay where they are, and learned
        offsets move by gradients.
        """
        if self.options["assignment"] != "energy":
            return
        positions = self.spatial.weight[0].numel()
        taps_IE = pursue_taps(gram, cross, positions, each=len(self.spatial.weight) // self.in_channels)
        features_C = (torch.arange(self.in_channels, device=gram.device)[:, None] * positions + taps_IE).flatten()
        point_OC = fit_on_features(gram, cross, features_C)
        with torch.no_grad():
            self._set_taps(taps_IE.flatten())
            self.pointwise.weight.copy_(point_OC[:, :, None, None])

    def _choose(self, weight: Tensor) -> Tensor:
        copies = len(self.spatial.weight) // self.in_channels
        if self.options["assignment"] == "energy":
            return highest_energy_taps(weight, copies)
        if self.options["assignment"] == "balanced":
            return balanced_taps(weight, copies)
        return fixed_taps(self.in_channels, *self.kernel_size, copies).to(weight.device)

    @torch.no_grad()
    def _set_taps(self, taps_C: Tensor) -> None:
        if self._hats is None:
            self.spatial.weight.copy_(one_hot_kernel(taps_C, *self.kernel_size))
        else:
            rows, columns = taps_C // self.kernel_size[1], taps_C % self.kernel_size[1]
            self._hats.place(torch.stack([rows, columns], dim=1).to(self._hats.offset.dtype))
