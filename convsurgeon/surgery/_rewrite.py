"""The rewrite: a copy of the model in which ops stand where the plan says so.

A copy made by `copy.deepcopy` puts, for every object, whatever its memo holds for it. The ops are
put there under the convolutions they replace, so each appears under all names and in every list,
dict or attribute that held the convolution, and no dense weight that goes is ever copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from convsurgeon import ops
from convsurgeon.errors import PlanError, UnsupportedConvError
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.record import read_record, update_record
from convsurgeon.spec import ConvSpec
from convsurgeon.surgery._copies import ExampleInputs, copy_module, copy_value
from convsurgeon.surgery._guard import check_outputs
from convsurgeon.surgery._plan import Decision, Plan, plan
from convsurgeon.surgery._selectors import FilterFn
from convsurgeon.surgery._sites import describe, shared_weights, walk

__all__ = ["check_outputs", "plan_of", "rebuild", "rewrite"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def rewrite(
    model: nn.Module,
    to: str | Plan = "depthwise",
    *,
    keep: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
    options: Any = None,
    filter_fn: FilterFn | None = None,
    example_inputs: ExampleInputs | None = None,
) -> nn.Module:
    """Return a copy of a model with cheap convolutions, each started from the dense kernel it replaces.

    The copy keeps the class, the names, and every untouched weight; the model itself is not touched.
    The arguments are those of `plan`; `to` may also be a plan, which is then carried out as it is.

    Args:
        to: the name of an op, or a `Plan`.
        example_inputs: where given, model and student are run on it, and their outputs must have the
            same structure, ranks, dtypes and sizes.

    Raises:
        NothingToConvertError: if no convolution would be converted.
        PlanError: if a given plan does not fit the model, or comes with selectors besides.
        GuardError: if the outputs on the example input differ in shape.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> print(rewrite(net, "depthwise")[2])
        DepthwiseConv2d(
          8→8, 3x3, stride_on=spatial
          (spatial): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), groups=8, bias=False)
          (pointwise): Conv2d(8, 8, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    if isinstance(to, Plan):
        if keep or only or mapping or options or filter_fn:
            raise PlanError("a plan is carried out as it is; change its decisions instead of giving selectors")
        the_plan = to
    else:
        the_plan = plan(
            model,
            to,
            keep=keep,
            only=only,
            mapping=mapping,
            options=options,
            filter_fn=filter_fn,
            example_inputs=example_inputs,
        )
    student = _carry_out(model, the_plan, initialize=True)
    if example_inputs is not None:
        check_outputs(model, student, example_inputs)
    return student


def rebuild(model: nn.Module, the_plan: Plan) -> nn.Module:
    """Return what `rewrite` would, with the ops' parameters as they come from memory: weights must follow."""
    return _carry_out(model, the_plan, initialize=False)


def plan_of(student: nn.Module) -> Plan | None:
    """Return the plan that made a student, or None for a model that was not rewritten."""
    data = read_record(student).get("plan")
    return None if data is None else Plan.from_dict(data)


def _carry_out(model: nn.Module, the_plan: Plan, *, initialize: bool) -> nn.Module:
    donors = _find_donors(model, the_plan)
    memo: dict[int, Any] = {}
    for decision, donor in donors:
        assert decision.op is not None
        try:
            op = ops.get(decision.op).from_conv(donor, decision.options, initialize=initialize)
        except UnsupportedConvError as error:
            raise UnsupportedConvError(f"{decision.fqn}: {error}") from error
        memo[id(donor)] = op
    for _, donor in donors:
        _take_over(donor, memo[id(donor)], memo)
    student = copy_module(model, memo)
    update_record(student, plan=_merged(plan_of(model), the_plan).to_dict())
    return student


def _find_donors(model: nn.Module, the_plan: Plan) -> list[tuple[Decision, nn.Conv2d]]:
    modules = {fqns: module for module, fqns in walk(model)}
    tied = shared_weights(model)
    by_name = {fqn: fqns for fqns in modules for fqn in fqns}
    donors = []
    for decision in the_plan.decisions:
        fqns = by_name.get(decision.fqns[0])
        if fqns is None or set(fqns) != set(decision.fqns):
            raise PlanError(
                f"the plan was made for {the_plan.model} and decides about {' = '.join(decision.fqns)!r}; "
                f"{type(model).__name__} has no such convolution; make a plan for this model"
            )
        if decision.op is None:
            continue
        module = modules[fqns]
        if not isinstance(module, nn.Conv2d):
            raise PlanError(f"{decision.fqn} is a {type(module).__name__}; only a Conv2d can become {decision.op}")
        if obstacle := describe(module, fqns, tied).obstacle:
            raise PlanError(f"{decision.fqn} cannot become {decision.op}: {obstacle}")
        if ConvSpec.from_conv(module) != decision.spec:
            raise PlanError(
                f"{decision.fqn} is {ConvSpec.from_conv(module)} here and {decision.spec} in the plan; "
                "make a plan for this model"
            )
        donors.append((decision, module))
    return donors


def _take_over(donor: nn.Conv2d, op: AbstractCheapConv, memo: dict[int, Any]) -> None:
    """Give an op the hooks of the convolution it replaces, and what else the user hung on it."""
    for name in _HOOKS:
        op.__dict__[name] = copy_value(donor.__dict__[name], memo, owner="a hook")
    standard = nn.Conv2d(1, 1, 1, device="meta").__dict__
    for name, value in donor.__dict__.items():
        if name not in standard and name not in op.__dict__:
            op.__dict__[name] = copy_value(value, memo, owner=name)
    op._non_persistent_buffers_set |= donor._non_persistent_buffers_set
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in donor.__dict__[kind].items():
            if name not in ("weight", "bias"):
                op.__dict__[kind][name] = copy_value(value, memo, owner=name)


def _merged(before: Plan | None, after: Plan) -> Plan:
    """Return one plan that makes a twice rewritten student from the original model."""
    if before is None:
        return after
    earlier = {frozenset(decision.fqns): decision for decision in before.converted}
    decisions = [earlier.pop(frozenset(decision.fqns), decision) for decision in after.decisions]
    return replace(after, decisions=(*decisions, *earlier.values()))
