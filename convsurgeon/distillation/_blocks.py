"""Which submodules of a student are compared with the teacher's of the same names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import copy_module, in_mode

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def block_names(student: nn.Module, teacher: nn.Module, sample: Tensor) -> list[str]:
    """Return the names of the blocks around converted convolutions whose outputs can be compared.

    The block of an op is the innermost module around it that is no container and not the network itself, or
    the op where there is none. A block is left out if it is not called as often in both networks, or gives
    anything but one float tensor of the same shape in both.
    """
    wanted = list(
        dict.fromkeys(_block(student, fqn) for fqn, op in student.named_modules() if isinstance(op, AbstractCheapConv))
    )
    seen = [_shapes(network, wanted, sample) for network in (student, teacher)]
    return [name for name in wanted if seen[0][name] and seen[0][name] == seen[1][name]]


def _block(student: nn.Module, fqn: str) -> str:
    parts = fqn.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        if not isinstance(student.get_submodule(name), _CONTAINERS):
            return name
    return fqn


def _shapes(network: nn.Module, names: list[str], sample: Tensor) -> dict[str, list[tuple[int, ...] | None]]:
    probe = in_mode(copy_module(network), training=False)
    found: dict[str, list[tuple[int, ...] | None]] = {name: [] for name in names}
    modules = dict(probe.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:  # a functional convolution, which the teacher has no module for
            continue

        def note(_module: nn.Module, _args: Any, out: Any, name: str = name) -> None:
            floats = isinstance(out, Tensor) and out.is_floating_point()
            found[name].append(tuple(out.shape) if floats else None)

        modules[name].register_forward_hook(note)
    with torch.no_grad():
        probe(sample)
    return {name: [] if None in shapes else shapes for name, shapes in found.items()}
