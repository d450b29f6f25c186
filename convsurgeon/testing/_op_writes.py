"""The law of writes: what model code does to the weight of a convolution happens to the op, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import KernelWriteError
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec
from convsurgeon.testing._cases import Op
from convsurgeon.testing._checks import require, require_close, require_same_state, state_of
from convsurgeon.testing._op_law import both, dense_of, make_image, op_law


@op_law
def law_writes(op: Op, spec: ConvSpec, options: Any) -> None:
    """A write to `weight` or `bias` takes effect, or raises `KernelWriteError` and changes nothing.

    A factor for all of the kernel, or for each output channel, as a folded batch norm has it, must take effect.
    """
    noise = torch.randn(spec.out_channels, spec.in_channels, *spec.kernel_size, dtype=torch.float64)
    factors_O = torch.rand(spec.out_channels, 1, 1, 1, dtype=torch.float64) + 0.5
    for cheap in both(op, spec, options):
        _require_taken(cheap, spec, "doubled in place", lambda kernel: kernel.mul_(2))
        _require_taken(cheap, spec, "scaled by output channel", lambda kernel: kernel.mul_(factors_O))
        _require_taken_or_refused(cheap, spec, lambda kernel: kernel[:, -1].mul_(-0.5))
        _require_taken_or_refused(cheap, spec, lambda kernel: kernel.copy_(noise))
        image, bias = make_image(spec), nn.Parameter(torch.randn(spec.out_channels, dtype=torch.float64))
        expected = dense_of(cheap, spec)(image) - (0 if cheap.bias is None else cheap.bias.view(-1, 1, 1))
        cheap.bias = bias
        require_close(cheap(image), expected + bias.view(-1, 1, 1), "the output with another bias")


def _require_taken(cheap: AbstractCheapConv, spec: ConvSpec, what: str, write: Callable[[Tensor], Any]) -> None:
    kernel = cheap.as_dense().detach().clone()
    write(kernel)
    try:
        write(cheap.weight.data)
    except KernelWriteError as error:
        require(False, f"a kernel that is {what} is refused: {error}")
    require_close(cheap.as_dense().detach(), kernel, f"the kernel that was {what}")
    image = make_image(spec)
    require_close(cheap(image), dense_of(cheap, spec)(image), f"the output for a kernel that was {what}")


def _require_taken_or_refused(cheap: AbstractCheapConv, spec: ConvSpec, write: Callable[[Tensor], Any]) -> None:
    kernel, before = cheap.as_dense().detach().clone(), state_of(cheap)
    write(kernel)
    try:
        write(cheap.weight.data)
    except KernelWriteError:
        require_same_state(state_of(cheap), before, "a write that was refused")
    else:
        require_close(cheap.as_dense().detach(), kernel, "the kernel that was written")
