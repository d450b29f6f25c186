"""A dense kernel that was written to an op: the op's own parameters take it, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from convsurgeon.errors import KernelWriteError

if TYPE_CHECKING:
    from convsurgeon.ops._base import AbstractCheapConv

# how far from what was written, relative to its norm, counts as rounding
_ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def kernel_parameters(op: AbstractCheapConv) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters that the kernel is made of: all but the bias."""
    return [(name, parameter) for name, parameter in op.named_parameters() if parameter is not op.bias]


@torch.no_grad()
def take_kernel(op: AbstractCheapConv, kernel: Tensor, *, cast: bool = False) -> None:
    """Let an op's parameters hold a dense kernel `(O, I, kh, kw)`, exactly but for rounding.

    A kernel that is the op's own but for one factor per output channel, or per input channel, is taken by the
    part that reads or gives these channels; any other by `init_from`.

    Args:
        cast: whether the parameters but the bias get the kernel's dtype and device first, as by `weight.data = ...`.

    Raises:
        KernelWriteError: if the op cannot hold it; its parameters are then as before.
    """
    expected = (op.out_channels, op.in_channels // op.groups, *op.kernel_size)
    if tuple(kernel.shape) != expected:
        have, want = ("x".join(map(str, shape)) for shape in (kernel.shape, expected))
        raise KernelWriteError(f"{_name(op)}: the kernel written to weight is {have}, expected {want}")
    if not kernel.is_floating_point():
        raise KernelWriteError(f"{_name(op)}: the kernel written to weight is {kernel.dtype}, expected floating point")
    with _restored_unless_taken(op), torch.autocast(kernel.device.type, enabled=False):
        rounding = max(_ROUNDING.get(each, 1e-5) for each in (kernel.dtype, op.as_dense().dtype))
        if cast:
            _cast(op, kernel)
        if not kernel.is_meta:
            _take(op, kernel, rounding)


def take_bias(op: AbstractCheapConv, bias: Tensor | None) -> None:
    """Make a tensor `(O,)`, or None, the bias of the part that carries it.

    Raises:
        KernelWriteError: for another shape.
    """
    if bias is not None and tuple(bias.shape) != (op.out_channels,):
        have = "x".join(map(str, bias.shape)) or "a scalar"
        raise KernelWriteError(f"{_name(op)}: the tensor assigned to bias is {have}, expected {op.out_channels}")
    part = getattr(op, op.last)
    if bias is not None and not isinstance(bias, nn.Parameter):
        frozen = part.bias is not None and not part.bias.requires_grad
        bias = nn.Parameter(bias.detach(), requires_grad=not frozen)
    part.bias = bias


def _take(op: AbstractCheapConv, written: Tensor, rounding: float) -> None:
    held = op.as_dense().detach()
    if torch.equal(held.to(written.dtype), written):
        return
    if not written.isfinite().all():
        raise KernelWriteError(f"{_name(op)}: the kernel written to weight has values that are not finite")
    kernel = written.to(held)
    off = float("inf")
    before = _state(op)
    for attempt in (_scale_outputs, _scale_inputs, _refit):
        for _ in attempt(op, held, kernel):
            off = min(off, _distance(op.as_dense(), kernel))
            if off <= rounding:
                return
            _restore(before)
    own = ", ".join(name for name, _ in kernel_parameters(op))
    raise KernelWriteError(
        f"{_name(op)} cannot hold the kernel that was written to weight (it would be off by {min(off, 1):.2g} of its "
        f"norm), so nothing was changed; write to its own parameters ({own}), or to the convolution before rewrite()"
    )


def _scale_outputs(op: AbstractCheapConv, held: Tensor, kernel: Tensor) -> Iterator[None]:
    """Scale the part that gives the output, by the factors of the output channels."""
    factor_O = _factors(held, kernel, dims=(1, 2, 3))
    part = getattr(op, op.last)
    if _is_own_convolution(part) and part.out_channels == op.out_channels:
        part.weight.copy_(part.weight.to(factor_O.dtype) * factor_O.view(-1, 1, 1, 1))
        yield


def _scale_inputs(op: AbstractCheapConv, held: Tensor, kernel: Tensor) -> Iterator[None]:
    """Scale one part that reads the input, by the factors of the input channels."""
    factor_I = _factors(held, kernel, dims=(0, 2, 3))
    for part in filter(_is_own_convolution, op.modules()):
        if part.in_channels == op.in_channels:
            per_group = factor_I.view(part.groups, 1, -1, 1, 1)
            grouped = part.weight.unflatten(0, (part.groups, -1))  # type: ignore[no-untyped-call]
            part.weight.copy_((grouped.to(factor_I.dtype) * per_group).flatten(0, 1))
            yield


def _refit(op: AbstractCheapConv, held: Tensor, kernel: Tensor) -> Iterator[None]:
    op.init_from(kernel, None if op.bias is None else op.bias.detach().clone())
    yield


def _is_own_convolution(part: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(part, nn.Conv2d) and isinstance(part._parameters.get("weight"), nn.Parameter)


def _factors(held: Tensor, kernel: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    """Return by what each channel was multiplied, in the sense of least squares."""
    have, want = _precise(held), _precise(kernel)
    energy = have.square().sum(dims)
    return torch.where(energy > 0, (have * want).sum(dims) / energy, 1.0)


def _distance(held: Tensor, kernel: Tensor) -> float:
    """Return how far a kernel is from the wanted one, relative to the norm of that."""
    have, want = _precise(held), _precise(kernel)
    error, norm = float((have - want).norm()), float(want.norm())
    return error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _cast(op: AbstractCheapConv, kernel: Tensor) -> None:
    bias = op.bias
    for tensor in (*op.parameters(), *op.buffers()):
        if tensor is not bias and tensor.is_floating_point():
            made = torch.empty_like(tensor, device=kernel.device) if tensor.is_meta else tensor
            tensor.data = made.to(kernel).detach()


@contextmanager
def _restored_unless_taken(op: AbstractCheapConv) -> Iterator[None]:
    before = _state(op)
    try:
        yield
    except BaseException:
        _restore(before)
        raise


def _state(op: AbstractCheapConv) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().clone()) for tensor in (*op.parameters(), *op.buffers())]


def _restore(state: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in state:
        if (tensor.dtype, tensor.device) != (values.dtype, values.device):
            tensor.data = values
        else:
            tensor.copy_(values)


def _name(op: AbstractCheapConv) -> str:
    return f"{type(op).__name__}({op.spec})"
