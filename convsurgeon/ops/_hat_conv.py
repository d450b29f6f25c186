"""A depthwise convolution that shifts each channel by an offset that can be learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.factorization import hat_kernel


class HatConv2d(nn.Module):
    """Reads each channel at an offset by bilinear interpolation, within the window of the convolution it stands for.

    `offset` is the row and the column of each channel, in taps (pixels times dilation) from the
    tap at `size // 2`. One that has left the window is folded back at its edge: clamped it would
    stay there for good, for lack of a gradient.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        height, width = conv.kernel_size[0], conv.kernel_size[1]
        self.kernel_size = (height, width)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._pads = list(conv._reversed_padding_repeated_twice)
        self.offset = nn.Parameter(torch.zeros(conv.out_channels, 2))

    @property
    def position(self) -> Tensor:
        """The row and column of each channel's place in the window, from 0, `(C, 2)`."""
        places = [_fold(self.offset[:, axis] + size // 2, size - 1) for axis, size in enumerate(self.kernel_size)]
        return torch.stack(places, dim=1)

    @property
    def weight(self) -> Tensor:
        """The depthwise kernel that the offsets make, `(C, 1, kh, kw)`."""
        return hat_kernel(self.position, *self.kernel_size)

    @torch.no_grad()
    def place(self, position_C2: Tensor) -> None:
        """Set the offsets so that each channel is read at that row and column of the window."""
        center = torch.tensor([size // 2 for size in self.kernel_size]).to(position_C2)
        self.offset.copy_(position_C2 - center)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, C, P, Q)`."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = nn.functional.pad(x, self._pads, mode=self.padding_mode), 0
        return nn.functional.conv2d(x, self.weight, None, self.stride, padding, self.dilation, self.groups)


def _fold(place_C: Tensor, last: int) -> Tensor:
    place_C = torch.where(place_C < 0, -place_C, place_C)
    place_C = torch.where(place_C > last, 2 * last - place_C, place_C)
    # unlike clamp, where passes the gradient of what is on the edge
    return torch.where(place_C < 0, 0.0, place_C)
