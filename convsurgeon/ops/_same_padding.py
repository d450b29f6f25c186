"""Padding as TensorFlow's `same`: how much depends on the size of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.spec import ConvSpec


class SamePadding(nn.Module):
    """A forward pre-hook that pads an input with zeros so that `ceil(size / stride)` outputs come out.

    Networks that were ported from TensorFlow need it where the stride is above one: EfficientNets,
    NFNets, BiT. A hook, so that the op keeps its place and its name in the network.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = spec.kernel_size, spec.stride, spec.dilation

    def __call__(self, op: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of the op with the input padded; it is no part of the op that a trace could name."""
        x, *others = args
        return (self.pad(x), *others)

    def pad(self, x: Tensor) -> Tensor:
        """Pad `(..., H, W)` at both sides, the odd pixel at the end."""
        top, bottom = self._sides(x.shape[-2], axis=0)
        left, right = self._sides(x.shape[-1], axis=1)
        return nn.functional.pad(x, (left, right, top, bottom))

    def _sides(self, size: Any, *, axis: int) -> tuple[Any, Any]:
        kernel, stride, dilation = self.kernel_size[axis], self.stride[axis], self.dilation[axis]
        outputs = (size + stride - 1) // stride
        # sym_max takes sizes that are symbols of an export or proxies of a trace
        total = torch.sym_max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        return total // 2, total - total // 2
