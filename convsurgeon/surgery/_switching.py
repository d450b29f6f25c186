"""What becomes of kernels when a model is switched between train and eval mode: some fuse their branches then."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from convsurgeon.surgery._calls import Watch
from convsurgeon.surgery._copies import in_mode
from convsurgeon.surgery._functional import Names

# a train() of one's own freezes some layers
_FLAGS = ("requires_grad", "grad", "is_leaf")
_SWITCHED = "when the model is switched between train and eval mode"


def switch_modes(copied: nn.Module) -> dict[str, str]:
    """Switch a copy to eval, train and eval mode; return the kernels that this reads or replaces, with a reason."""
    names, before = Names(copied), convolutions(copied)
    watch = Watch(names.kernels, set(copied.modules()))
    with torch.no_grad(), watch:
        in_mode(copied, training=False)
        with contextlib.suppress(Exception):  # whatever a foreign train() raises
            in_mode(copied, training=True)
        in_mode(copied, training=False)
    found: dict[str, str] = {}
    for use in (*watch.others, *watch.convolutions):
        read = names.resolve(replace(use, is_convolution=False))
        if read.kernel is not None and read.function not in _FLAGS:
            where = f" ({read.where})" if read.where else ""
            found.setdefault(read.kernel, f"its weight is read in {read.function} {_SWITCHED}{where}")
    return found | replaced_convolutions(before, copied, when=_SWITCHED)


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return every convolution that is a submodule, under each of its names."""
    found = model.named_modules(remove_duplicate=False)
    return {fqn: module for fqn, module in found if isinstance(module, _ConvNd)}


def replaced_convolutions(before: Mapping[str, nn.Module], copied: nn.Module, *, when: str) -> dict[str, str]:
    """Return the kernels of the convolutions that stand no longer where they stood, with the reason to keep them."""
    now = convolutions(copied)
    gone = [fqn for fqn, module in before.items() if now.get(fqn) is not module]
    return {f"{fqn}.weight".lstrip("."): f"another module takes its place, or none, {when}" for fqn in gone}
