"""What the center of a kernel sees of an image: for parts of an op that are 1x1, or that leave channels as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from convsurgeon.spec import ConvSpec, Pair


def center_of(kernel_size: Pair) -> Pair:
    """Return the row and the column of a kernel's center; of an even size it is the one before the middle.

    With `padding="same"`, whatever the size and without dilation, it stands on the output's own pixel.
    """
    return (kernel_size[0] - 1) // 2, (kernel_size[1] - 1) // 2


def at_center(point_OI11: Tensor, kernel_size: Pair) -> Tensor:
    """Return 1x1 weights `(O, I, 1, 1)` as a kernel `(O, I, kh, kw)` that is zero elsewhere."""
    (row, column), (height, width) = center_of(kernel_size), kernel_size
    return functional.pad(point_OI11, (column, width - 1 - column, row, height - 1 - row))


class CenterView(nn.Module):
    """Cuts and pads an image so that pixel for pixel it is what a kernel's center meets.

    For the usual kernels, padded so that the size stays, this is the image itself. `strided=False`
    leaves the stride to the 1x1 that follows.
    """

    def __init__(self, spec: ConvSpec, *, strided: bool) -> None:
        super().__init__()
        taps = zip(center_of(spec.kernel_size), spec.kernel_size, spec.dilation, spec.pads, strict=True)
        borders = [(before - tap * d, after - (k - 1 - tap) * d) for tap, k, d, (before, after) in taps]
        self.padding = tuple(max(0, border) for border in (*borders[1], *borders[0]))
        self.padding_mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        self.cut = tuple(tuple(max(0, -border) for border in pair) for pair in borders)
        self.stride = spec.stride if strided else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., H, W)` to what the center meets at every output, or at those of stride 1."""
        if any(self.padding):
            x = functional.pad(x, self.padding, mode=self.padding_mode)
        rows, columns = (_between(cut, step) for cut, step in zip(self.cut, self.stride, strict=True))
        whole = slice(None)
        return x if rows == columns == whole else x[..., rows, columns]

    def extra_repr(self) -> str:
        """Say what is done."""
        return f"padding={self.padding}, cut={self.cut}, stride={self.stride}"


def _between(cut: Any, step: int) -> slice:
    before, after = cut
    return slice(before or None, -after or None, None if step == 1 else step)
