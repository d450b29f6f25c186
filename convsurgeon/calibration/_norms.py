"""Batch-norm statistics estimated anew on images."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsurgeon.surgery import copy_module, in_mode

Statistics = dict[str, dict[str, Any]]


def norms_of(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms whose running statistics move in training, by name.

    Those that the network's own `train()` keeps in eval mode are left out.
    """
    in_training = in_mode(copy_module(network), training=True)
    frozen = {fqn for fqn, module in in_training.named_modules() if not module.training}
    return {
        fqn: module
        for fqn, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and fqn not in frozen
    }


@torch.no_grad()
def estimate_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of all batch norms by averages over the images, in one pass.

    Only the norms are put into train mode, so that dropout stays off. A norm that does not run, such as one of a head
    for training only, keeps what it has.

    Args:
        batches: of two images or more, since one may have no variance.
    """
    norms = norms_of(network)
    momenta = {fqn: norm.momentum for fqn, norm in norms.items()}
    before = _copied(norms)
    seen: dict[nn.Module, int] = {}

    def weigh(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[norm] = seen.get(norm, 0) + len(args[0])
        norm.momentum = len(args[0]) / seen[norm]  # type: ignore[assignment]  # an average in which each counts alike

    handles = [norm.register_forward_pre_hook(weigh) for norm in norms.values()]
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.train()
        for images in batches:
            network(images)
    finally:
        for handle in handles:
            handle.remove()
        for fqn, norm in norms.items():
            norm.momentum = momenta[fqn]
            norm.eval()
        _put(norms, {fqn: before[fqn] for fqn, norm in norms.items() if norm not in seen})


def statistics_of(network: nn.Module) -> Statistics:
    """Return a copy of all running statistics that move in training."""
    return _copied(norms_of(network))


def put_statistics(network: nn.Module, statistics: Statistics) -> None:
    """Put running statistics back."""
    _put(norms_of(network), statistics)


def _copied(norms: dict[str, _BatchNorm]) -> Statistics:
    return {fqn: copy.deepcopy(dict(norm._buffers)) for fqn, norm in norms.items()}


@torch.no_grad()
def _put(norms: dict[str, _BatchNorm], statistics: Statistics) -> None:
    for fqn, buffers in statistics.items():
        for name, value in buffers.items():
            if value is not None:
                getattr(norms[fqn], name).copy_(value)
