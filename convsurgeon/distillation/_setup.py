"""What a run needs besides networks and data: a device and its precision, and an optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convsurgeon.distillation._config import Training
from convsurgeon.distillation._muon import Muon
from convsurgeon.errors import DistillationError


def make_accelerator(config: Training) -> tuple[Any, str]:
    """Return Hugging Face's Accelerator for the device that was asked for, and the precision.

    Raises:
        DistillationError: if there is no such device, or it has no such precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # what an earlier run in this process chose must not decide for this one
    AcceleratorState._reset_state(True)
    on_cpu = config.device == "cpu"
    if config.device not in (None, "cpu", "cuda"):
        raise DistillationError(f"device must be cpu or cuda, got {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DistillationError("device cuda was asked for, and torch finds none; use --device cpu")
    device = PartialState(cpu=on_cpu).device
    precision = config.autocast(device)
    if precision == "fp16" and device.type == "cpu":
        raise DistillationError("precision fp16 needs a GPU; on a CPU use bf16 or no")
    return Accelerator(cpu=on_cpu, mixed_precision=precision), precision


def make_optimizer(config: Training, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimiser that was asked for."""
    if config.optimizer == "muon":
        return Muon(groups, momentum=config.momentum)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)


def has_seen_batches(teacher: nn.Module) -> bool:
    """Guess whether a network is trained where there is no validation data: batch norm has seen batches."""
    counts = [buffer for name, buffer in teacher.named_buffers() if name.endswith("num_batches_tracked")]
    return not counts or any(int(count) > 0 for count in counts)
