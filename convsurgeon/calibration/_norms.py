"""Batch-norm statistics estimated anew on images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = dict[str, dict[str, Any]]


def norms_of(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms that use running statistics, by name."""
    return {
        fqn: module
        for fqn, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def estimate_statistics(network: nn.Module, batches: Sequence[Tensor]) -> None:
    """Replace the running statistics of all batch norms by averages over the images, in one pass.

    Only the norms are put into train mode, so that dropout stays off.

    Args:
        batches: of two images or more, since one may have no variance.
    """
    norms = norms_of(network).values()
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        seen = 0
        for images in batches:
            seen += len(images)
            for norm in norms:
                norm.momentum = len(images) / seen  # an average in which every image counts alike
            network(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def statistics_of(network: nn.Module) -> Statistics:
    """Return a copy of all running statistics."""
    return {fqn: copy.deepcopy(dict(norm._buffers)) for fqn, norm in norms_of(network).items()}


@torch.no_grad()
def put_statistics(network: nn.Module, statistics: Statistics) -> None:
    """Put running statistics back."""
    for fqn, norm in norms_of(network).items():
        for name, value in statistics[fqn].items():
            if value is not None:
                getattr(norm, name).copy_(value)
