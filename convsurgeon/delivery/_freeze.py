"""Ops in the form that is delivered: what was continuous while it was trained becomes what a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import copy_module


@dataclass(frozen=True)
class Frozen:
    """What taking the delivered form changed.

    Args:
        ops: a sentence for each op that changed, by its name in the network.
        max_rel: the largest difference it makes to an output, as a part of the largest: on up to eight of the
            images, where given, else on random inputs.
    """

    ops: Mapping[str, str] = field(default_factory=dict)
    max_rel: float = 0.0


def ops_of(model: nn.Module) -> dict[str, AbstractCheapConv]:
    """Return the ops of a model by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AbstractCheapConv)}


def freeze_ops(model: nn.Module) -> dict[str, str]:
    """Bring every op of a model into the form that is delivered, in place; return what that changed."""
    said = {name: op.freeze_for_export() for name, op in ops_of(model).items()}
    return {name: sentence for name, sentence in said.items() if sentence is not None}


def delivered_form(model: nn.Module) -> nn.Module:
    """Return the network that a file holds: a copy where an op is delivered in another form, else the model."""
    if not ops_of(model):
        return model
    copy = copy_module(model)
    return copy if freeze_ops(copy) else model


def largest_change(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]]) -> float:
    """Return the largest difference between outputs, as a part of each one's largest."""
    pairs = [(old.double(), new.double()) for (_, old), (_, new) in zip(before, after, strict=True) if old.numel()]
    return max((float((new - old).abs().max() / old.abs().max().clamp_min(1e-30)) for old, new in pairs), default=0.0)
