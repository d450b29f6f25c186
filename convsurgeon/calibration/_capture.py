"""What runs through one convolution: patches of the student's inputs, and the teacher's outputs, at the same places.

Shape letters: B images of a batch, N positions of an image, P Q output size, K kernel positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from convsurgeon.calibration._sites import CalibrationSite
from convsurgeon.ops import AbstractCheapConv


@dataclass(frozen=True)
class Places:
    """Which positions of a convolution's output are looked at: the same in teacher and student.

    Args:
        count: how many of each image, at most.
        seed: of their choice.
    """

    count: int
    seed: int

    def choose(self, size: tuple[int, int], batch: int, *, index: int, call: int) -> Tensor:
        """Return positions `(B, N)` in an output of that height and width, numbered row by row."""
        positions = size[0] * size[1]
        if positions <= self.count:
            return torch.arange(positions).expand(batch, positions)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 1_009 + call)
        return torch.rand(batch, positions, generator=generator).topk(self.count, dim=1).indices


def targets_of(
    teacher: nn.Module, sites: Sequence[CalibrationSite], batches: Iterable[Tensor], places: Mapping[str, Places]
) -> dict[str, list[list[Tensor]]]:
    """Run the teacher once and return, for each site, batch and call, its outputs `(B * N, O)` at its places."""
    found: dict[str, list[list[Tensor]]] = {site.fqn: [] for site in sites}

    def note(fqn: str, out_BOPQ: Tensor) -> None:
        index, calls = len(found[fqn]) - 1, found[fqn][-1]
        batch, _, *size = out_BOPQ.shape
        places_BN = places[fqn].choose((size[0], size[1]), batch, index=index, call=len(calls))
        calls.append(_rows(out_BOPQ, places_BN))

    with _watching(sites, note), torch.no_grad():
        for images in batches:
            for calls in found.values():
                calls.append([])
            teacher(images)
    return found


@contextlib.contextmanager
def _watching(sites: Sequence[CalibrationSite], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `note` with every output of the sites' convolutions in the teacher, before the user's own hooks."""
    kernels = {id(site.partner): site.fqn for site in sites if not isinstance(site.partner, nn.Module)}

    def hook(fqn: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, out: note(fqn, out)

    with contextlib.ExitStack() as stack:
        for site in sites:
            if isinstance(site.partner, nn.Module):
                handle = site.partner.register_forward_hook(hook(site.fqn), prepend=True)
                stack.callback(handle.remove)
        if kernels:
            stack.enter_context(_Functional(kernels, note))
        yield


class _Functional(TorchFunctionMode):
    """Notes the outputs, less the bias, of `torch.conv2d` on some kernels."""

    def __init__(self, kernels: Mapping[int, str], note: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._kernels, self._note = kernels, note

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            call = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            if fqn := self._kernels.get(id(call["weight"])):
                bias = call.get("bias")
                self._note(fqn, out if bias is None else out - bias.view(-1, 1, 1))
        return out


class _Enough(Exception):  # noqa: N818  the pass has shown what was wanted of it
    pass


def patches_of(
    student: nn.Module, site: CalibrationSite, batches: Iterable[Tensor], places: Places, *, calls: int
) -> Iterator[list[Tensor]]:
    """Run the student up to a site and yield, for each batch, patches `(B * N, I * K)` of its first calls' inputs."""
    found: list[Tensor] = []
    index = -1

    def look(op: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(_patches(site.op, args[0], places, index=index, call=len(found)))
        if len(found) == calls:
            raise _Enough

    handle = site.op.register_forward_pre_hook(look)  # after the op's own padding
    try:
        for images in batches:
            found, index = [], index + 1
            with contextlib.suppress(_Enough), torch.no_grad():
                student(images)
            yield found
    finally:
        handle.remove()


def _patches(op: AbstractCheapConv, x: Tensor, places: Places, *, index: int, call: int) -> Tensor:
    spec = op.spec
    if spec.pads_by_size:  # done by a hook before this one
        spec, *_ = spec.unpadded(*x.shape[-2:])
    else:
        (top, bottom), (left, right) = spec.pads
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        size = spec.output_size(*x.shape[-2:])
        x = functional.pad(x, (left, right, top, bottom), mode=mode) if top or bottom or left or right else x
    if op.spec.pads_by_size:
        size = spec.output_size(*x.shape[-2:])
    places_BN = places.choose(size, len(x), index=index, call=call).to(x.device)
    rows_BN, columns_BN = places_BN // size[1] * spec.stride[0], places_BN % size[1] * spec.stride[1]
    images_B1 = torch.arange(len(x), device=x.device)[:, None]
    taps = [
        x[images_B1, :, rows_BN + i * spec.dilation[0], columns_BN + j * spec.dilation[1]]
        for i in range(spec.kernel_size[0])
        for j in range(spec.kernel_size[1])
    ]
    return torch.stack(taps, dim=-1).flatten(2).flatten(0, 1)


def _rows(out_BOPQ: Tensor, places_BN: Tensor) -> Tensor:
    flat_BOn = out_BOPQ.flatten(2)
    index = places_BN.to(out_BOPQ.device)[:, None].expand(-1, flat_BOn.shape[1], -1)
    return flat_BOn.gather(2, index).mT.flatten(0, 1)
