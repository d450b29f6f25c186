"""What a plan costs and gains: parameters and multiply-adds, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convsurgeon import ops
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery._copies import ExampleInputs, call, shadow
from convsurgeon.surgery._outside import untouched_outside
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
    if site.op is not None:
        after = _cost_as(site.op, site, site.options, observed=found.observed)
        return replace(after, params_before=after.params_after, macs_before=after.macs_after)
    if decision.op is None:
        macs = site.macs or 0 if found.observed else None
        return Cost(spec.params, spec.params, macs, macs, macs)
    return _cost_as(decision.op, site, decision.options, observed=found.observed)


def _cost_as(name: str, site: Site, values: Mapping[str, Any], *, observed: bool) -> Cost:
    """Return what a dense convolution costs before, and as that op after."""
    spec, op = site.spec, ops.get(name)
    assert spec is not None
    options = op.parse_options(values)
    params = count_params(op.build(spec, options, device="meta"))
    if not observed:
        return Cost(spec.params, params)
    true = sum(op.macs(*spec.unpadded(*size), options) for size in site.input_sizes)
    hot = sum(op.one_hot_macs(*spec.unpadded(*size), options) for size in site.input_sizes)
    return Cost(spec.params, params, site.macs or 0, true, true + hot)


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one forward pass: `true` ones, and what a counter sees with one-hot taps."""

    true: int
    counted: int


class _NoTracker:
    """In the place of the tracker that tells which module runs."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class FlopCounter(FlopCounterMode):
    """Counts whatever runs, without the hooks for who runs it: they fail where a forward takes a gradient."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _NoTracker()


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> Macs:
    """Run a model once and count the multiply-adds of every convolution and matrix product.

    The count is for the example input as it is: give batch 1. The model is not touched.
    """
    copy = shadow(model)
    hot = 0

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal hot
        assert isinstance(module, AbstractCheapConv)
        x = args[0] if args else kwargs["x"]
        batch, height, width = x.shape[0] if x.dim() == 4 else 1, x.shape[-2], x.shape[-1]
        hot += int(batch) * module.one_hot_macs(*module.spec.unpadded(int(height), int(width)), module.options)

    for module in copy.modules():
        if isinstance(module, AbstractCheapConv):
            # before the op's own padding
            module.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    with untouched_outside(model), FlopCounter() as counter:
        call(copy, example_inputs)
    counted = counter.get_total_flops() // 2
    return Macs(counted - hot, counted)


def example_like(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Return a standard normal input with the model's device and dtype; no global RNG is used."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(device=first.device, dtype=first.dtype)


def totals(the_plan: Plan, found: Survey) -> Cost:
    """Return the cost of all 2-d convolutions of a model under a plan; what it does not mention is kept."""
    decisions = {frozenset(decision.fqns): decision for decision in the_plan.decisions}
    kept = Decision((), None, None, "", "")
    return Cost.sum([cost_of(site, decisions.get(frozenset(site.fqns), kept), found) for site in found.sites])
