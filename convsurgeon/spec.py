"""The geometry of one convolution, frozen and without tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvSpec:
    """What one `nn.Conv2d` does to a shape, under `nn.Conv2d`'s own argument names.

    `padding="same"` with a stride, which torch does not have, is TensorFlow's: the input is padded so
    that the output has `ceil(size / stride)` pixels, the odd one at the end.

    Examples:
        >>> spec = ConvSpec(64, 128, (3, 3), stride=(2, 2), padding=(1, 1))
        >>> spec.output_size(56, 56)
        (28, 28)
        >>> spec.macs(56, 56) == 64 * 128 * 9 * 28 * 28
        True
        >>> print(spec)
        64→128, 3x3, stride 2, padding 1
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> ConvSpec:
        """Read the geometry off a convolution, or off an op, which has the same attributes.

        Raises:
            ValueError, TypeError, IndexError: if an attribute is no number and no pair of them.
        """
        return cls(
            in_channels=int(conv.in_channels),
            out_channels=int(conv.out_channels),
            kernel_size=as_pair(conv.kernel_size),
            stride=as_pair(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else as_pair(conv.padding),
            dilation=as_pair(conv.dilation),
            groups=int(conv.groups),
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )

    @classmethod
    def from_call(
        cls, in_channels: int, out_channels: int, kernel_size: Pair, arguments: Mapping[str, Any]
    ) -> ConvSpec:
        """Read the geometry off the arguments of a call of `torch.conv2d`, by their names.

        Raises:
            ValueError, TypeError: if an argument is no plain number.
        """
        padding = arguments.get("padding", 0)
        return cls(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=as_pair(arguments.get("stride", 1)),
            padding=padding if isinstance(padding, str) else as_pair(padding),
            dilation=as_pair(arguments.get("dilation", 1)),
            groups=int(arguments.get("groups", 1)),
            bias=arguments.get("bias") is not None,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConvSpec:
        """Rebuild a spec from `to_dict()`, whose pairs JSON has made lists."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1x1."""
        return self.kernel_size == (1, 1)

    @property
    def is_depthwise(self) -> bool:
        """Whether every input channel has a group of its own."""
        return self.groups == self.in_channels > 1

    @property
    def taps(self) -> int:
        """Kernel positions, `kh * kw`."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def params(self) -> int:
        """Weights and biases of the dense convolution."""
        weights = self.out_channels * (self.in_channels // self.groups) * self.taps
        return weights + (self.out_channels if self.bias else 0)

    @property
    def pads_by_size(self) -> bool:
        """Whether the padding depends on the input's size, as TensorFlow's `"same"` with a stride does."""
        return self.padding == "same" and self.stride != (1, 1)

    def unpadded(self, height: int, width: int) -> tuple[ConvSpec, int, int]:
        """Return geometry and input size with padding that depends on the size done beforehand.

        >>> spec, height, width = ConvSpec(8, 8, (3, 3), stride=(2, 2), padding="same").unpadded(8, 9)
        >>> spec.padding, height, width
        ((0, 0), 9, 11)
        """
        if not self.pads_by_size:
            return self, height, width
        sides = zip((height, width), self.kernel_size, self.stride, self.dilation, strict=True)
        height, width = (max((-(-size // s) - 1) * s + (k - 1) * d + 1, size) for size, k, s, d in sides)
        return replace(self, padding=(0, 0)), height, width

    @property
    def pads(self) -> tuple[Pair, Pair]:
        """Padding before and after, per axis; `"same"` pads the odd one out at the end, as torch does."""
        assert not self.pads_by_size, "how much is padded depends on the input: see unpadded()"
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if isinstance(self.padding, str):
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)
        return (self.padding[0], self.padding[0]), (self.padding[1], self.padding[1])

    def output_size(self, height: int, width: int) -> Pair:
        """Return the output's height and width for an input's, as `nn.Conv2d` gives them."""
        if self.pads_by_size:
            spec, height, width = self.unpadded(height, width)
            return spec.output_size(height, width)
        sizes = [
            (size + sum(pad) - d * (k - 1) - 1) // s + 1
            for size, pad, d, k, s in zip(
                (height, width), self.pads, self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]
        return sizes[0], sizes[1]

    def macs(self, height: int, width: int) -> int:
        """Return multiply-adds of the dense convolution for one image of that input size.

        One multiply-add counts 1, taps that fall on padding are counted, the bias is not.
        """
        p, q = self.output_size(height, width)
        return self.out_channels * (self.in_channels // self.groups) * self.taps * p * q

    def __str__(self) -> str:
        parts = [f"{self.in_channels}→{self.out_channels}", _by(self.kernel_size)]
        if self.stride != (1, 1):
            parts.append(f"stride {_short(self.stride)}")
        if isinstance(self.padding, str):
            parts.append(f"padding {self.padding}")
        elif self.padding != (0, 0):
            parts.append(f"padding {_short(self.padding)}")
        if self.dilation != (1, 1):
            parts.append(f"dilation {_short(self.dilation)}")
        if self.groups != 1:
            parts.append(f"groups {self.groups}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        return ", ".join(parts)


def as_pair(value: Any) -> Pair:
    """Return a length per axis as a pair, from whatever form of it torch takes.

    >>> as_pair(2), as_pair([2, 1]), as_pair([2])
    ((2, 2), (2, 1), (2, 2))
    """
    if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:  # numpy's integers and torch's, too
        return int(value), int(value)
    lengths = [int(length) for length in value]
    if len(lengths) not in (1, 2):
        raise ValueError(f"expected a number or a pair of them, got {value!r}")
    return lengths[0], lengths[-1]


def _by(pair: Pair) -> str:
    return f"{pair[0]}x{pair[1]}"


def _short(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else _by(pair)
