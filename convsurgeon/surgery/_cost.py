"""What a plan costs and gains: parameters and multiply-adds, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convsurgeon import ops
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery._copies import ExampleInputs, call, shadow
from convsurgeon.surgery._plan import Decision, Plan
from convsurgeon.surgery._sites import Site
from convsurgeon.surgery._survey import Survey


@dataclass(frozen=True)
class Cost:
    """Parameters and MACs of a set of convolutions before and after; MACs are None without a run.

    `counted_macs_after` adds the frozen one-hot taps, which a MAC counter sees and a runtime may execute.
    """

    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    counted_macs_after: int | None = None

    @classmethod
    def sum(cls, costs: Sequence[Cost]) -> Cost:
        """Add costs up; one unknown makes the sum unknown."""

        def total(values: list[int | None]) -> int | None:
            known = [value for value in values if value is not None]
            return sum(known) if len(known) == len(values) else None

        return cls(
            sum(cost.params_before for cost in costs),
            sum(cost.params_after for cost in costs),
            total([cost.macs_before for cost in costs]),
            total([cost.macs_after for cost in costs]),
            total([cost.counted_macs_after for cost in costs]),
        )


def cost_of(site: Site, decision: Decision, found: Survey) -> Cost:
    """Return the cost of one convolution under a decision."""
    spec = site.spec
    if spec is None:
        return Cost(0, 0, *([0] * 3 if found.observed else []))
    if site.op is not None or decision.op is None:
        macs = site.macs or 0 if found.observed else None
        return Cost(spec.params, spec.params, macs, macs, macs)
    op = ops.get(decision.op)
    options = op.parse_options(decision.options)
    params = count_params(op.build(spec, options, device="meta"))
    if not found.observed:
        return Cost(spec.params, params)
    true = sum(op.macs(spec, *size, options) for size in site.input_sizes)
    hot = sum(op.one_hot_macs(spec, *size, options) for size in site.input_sizes)
    return Cost(spec.params, params, site.macs or 0, true, true + hot)


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one forward pass: `true` ones, and what a counter sees with one-hot taps."""

    true: int
    counted: int


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> Macs:
    """Run a model once and count the multiply-adds of every convolution and matrix product.

    The count is for the example input as it is: give batch 1. The model is not touched.
    """
    copy = shadow(model)
    hot = 0

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal hot
        assert isinstance(module, AbstractCheapConv)
        batch, _, height, width = args[0].shape
        hot += int(batch) * module.one_hot_macs(module.spec, int(height), int(width), module.options)

    for module in copy.modules():
        if isinstance(module, AbstractCheapConv):
            module.register_forward_pre_hook(note)
    with FlopCounterMode(display=False) as counter:
        call(copy, example_inputs)
    counted = counter.get_total_flops() // 2
    return Macs(counted - hot, counted)


def example_like(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Return a standard normal input of that shape with the model's device and dtype; no global RNG is used."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(device=first.device, dtype=first.dtype)


def totals(the_plan: Plan, found: Survey) -> Cost:
    """Return the cost of all 2-d convolutions of a model under a plan."""
    pairs = zip(found.sites, the_plan.decisions, strict=True)
    return Cost.sum([cost_of(site, decision, found) for site, decision in pairs])
