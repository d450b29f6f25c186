"""Float64 arithmetic on tensors of any dtype without a float64 copy of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from convsurgeon.errors import UnsupportedConvError

BLOCK = 1 << 19
"""How many numbers are worked on at a time: 4 MB in float64."""


def parts(count: int, numbers_each: int) -> Iterator[slice]:
    """Cut `count` things into slices of at most `BLOCK` numbers, or of one thing where that is more.

    >>> list(parts(5, BLOCK // 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, BLOCK // max(1, numbers_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class Blocks:
    """`matrices / scale` in float64, in blocks of whole rows, as often as wanted.

    What fits into one block is converted once, the rest each time.

    Yields:
        The slice of matrices, the slice of rows, and the block that they make.
    """

    def __init__(self, matrices_BNn: Tensor, scale: float) -> None:
        self._matrices_BNn, self._scale = matrices_BNn, scale
        self._converted = list(self._convert()) if matrices_BNn.numel() <= BLOCK else None

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        return self._convert() if self._converted is None else iter(self._converted)

    def gram(self) -> Tensor:
        """Return each scaled matrix's Gram matrix, transpose times itself."""
        count, _, side = self._matrices_BNn.shape
        result = torch.zeros(count, side, side, dtype=torch.float64, device=self._matrices_BNn.device)
        for some, _, block in self:
            result[some].baddbmm_(block.mT, block)
        return result

    def _convert(self) -> Iterator[tuple[slice, slice, Tensor]]:
        count, rows, columns = self._matrices_BNn.shape
        for some in parts(count, rows * columns):
            for lines in parts(rows, (some.stop - some.start) * columns):
                # the order in memory is kept: to rearrange a block takes longer than to multiply it
                block = self._matrices_BNn[some, lines].to(torch.float64)
                yield some, lines, block if self._scale == 1 else block / self._scale


def power_of_two(tensor: Tensor) -> float:
    """Return about the largest magnitude of a float64 tensor, and 1 for narrower types and for zeros.

    Divided by it, the squares of large and small numbers stay within range; those of narrower types do so anyhow.
    """
    if tensor.dtype != torch.float64 or tensor.numel() == 0:
        return 1.0
    largest = max(abs(float(extreme)) for extreme in tensor.aminmax())
    return math.ldexp(1.0, math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0


def refuse_unless_finite(tensor: Tensor) -> None:
    """Refuse kernels in which a number is NaN or infinite: no other kernel is closest to such a one.

    Args:
        tensor: the kernel, or sums over its squares, which are finite where it is.

    Raises:
        UnsupportedConvError: if a number is not finite.
    """
    if not bool(tensor.isfinite().all()):
        raise UnsupportedConvError(
            "its weight holds NaN or infinite numbers, so that no kernel is closest to it; "
            "mend the weight, or keep this convolution"
        )
