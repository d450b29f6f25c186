"""The settings of one training run, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from convsurgeon.distillation._augmentation import Augmentation
from convsurgeon.errors import OptionError

_STEEPEST_RISE = 80
PRECISIONS = ("auto", "no", "bf16", "fp16")
USUAL_RATES = {"sgd": (0.1, 0.9), "muon": (0.02, 0.95)}
"""Optimisers, each with its usual learning rate and momentum."""


@dataclass(frozen=True)
class Training:
    """Everything that decides how a run goes, apart from the networks and the data.

    Args:
        epochs: passes over the training data.
        batch_size: images a step, where the data is not in batches already.
        optimizer: `sgd` or `muon`.
        learning_rate: the peak of the cosine schedule.
        momentum: of the optimiser, with Nesterov's step.
        weight_decay: on weights; norms and biases have none.
        warmup: share of all steps in which the rate rises to its peak.
        seed: of the order of the data, the augmentation and the methods' own noise.
        precision: `bf16` or `fp16` autocast, `no`, or `auto`: bf16 where the processor multiplies in it.
        limit_batches: stop every pass after so many batches, for a quick look.
        augmentation: what is done to each training batch, or None.
    """

    method: str = "joint"
    objective: str = "kd"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 5
    batch_size: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    seed: int = 0
    device: str | None = None
    precision: str = "auto"
    limit_batches: int | None = None
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.limit_batches is not None and self.limit_batches < 1:
            raise OptionError(f"limit_batches must be at least 1, got {self.limit_batches}")
        if self.optimizer not in USUAL_RATES:
            raise OptionError(f"optimizer must be one of {', '.join(USUAL_RATES)}, got {self.optimizer!r}")
        if not self.learning_rate > 0:
            raise OptionError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum must be from 0 to below 1, got {self.momentum}")
        if not self.weight_decay >= 0:
            raise OptionError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise OptionError(f"warmup must be a share from 0 to 1, got {self.warmup}")
        if self.precision not in PRECISIONS:
            raise OptionError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON data."""
        data = asdict(self)
        own = {"method_options": self.method_options, "objective_options": self.objective_options}
        return {**data, **{name: dict(options) for name, options in own.items()}}

    def rate_at(self, step: int, steps: int) -> float:
        """Return a step's share of the peak learning rate: a linear rise, then half a cosine to zero.

        The rise is never steeper than to the peak in 80 steps: a short run stays below the peak, at which a
        network that is not settled yet would diverge. With `warmup` 0 there is no rise.
        """
        if not self.warmup:
            return 0.5 * (1 + math.cos(math.pi * step / steps))
        rise = max(1, round(self.warmup * steps))
        fall = 0.5 * (1 + math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)))
        return min(1.0, (step + 1) / max(rise, _STEEPEST_RISE)) * fall

    def autocast(self, device: torch.device) -> str:
        """Return what Accelerate calls mixed precision, with `auto` decided for that device."""
        if self.precision != "auto":
            return self.precision
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        # added in torch 2.11 or so; without it we cannot know, and fp32 is always right
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        multiplies = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        return "bf16" if device.type == "cpu" and multiplies else "no"
