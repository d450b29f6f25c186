"""The rewrite: a copy of the model in which ops stand where the plan says so.

A copy made by `copy.deepcopy` puts, for every object, whatever its memo holds for it. The ops are
put there under the convolutions they replace, so each appears under all names and in every list,
dict or attribute that held the convolution, and no dense weight that goes is ever copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon import ops
from convsurgeon.errors import NothingToConvertError, PlanError, SurveyError, UnsupportedConvError
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.record import read_record, update_record
from convsurgeon.spec import ConvSpec
from convsurgeon.surgery._copies import ExampleInputs, copy_module, copy_value, expect_module
from convsurgeon.surgery._donors import Donor, find_donor, plain_convolution
from convsurgeon.surgery._functional import Names
from convsurgeon.surgery._guard import check_outputs, compare_outputs
from convsurgeon.surgery._marks import pass_marks_on
from convsurgeon.surgery._outside import untouched_outside
from convsurgeon.surgery._plan import Decision, Plan, decide, with_fitted_options
from convsurgeon.surgery._selectors import FilterFn
from convsurgeon.surgery._sites import describe, shared_weights, walk
from convsurgeon.surgery._survey import look
from convsurgeon.surgery._weights import WEIGHT_WRITERS
from convsurgeon.surgery._wrappers import module_of, unwrap

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


@torch.inference_mode(False)
def rewrite(
    model: nn.Module,
    to: str | Plan = "depthwise",
    *,
    keep: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
    pointwise: str | None = None,
    options: Any = None,
    filter_fn: FilterFn | None = None,
    example_inputs: ExampleInputs | None = None,
    report: Report = be_silent,
) -> nn.Module:
    """Return a copy of a model with cheap convolutions, each started from the dense kernel it replaces.

    The copy keeps the class, the names, and every untouched weight; the model itself is not touched.
    The arguments are those of `plan`; `to` may also be a plan, which is then carried out as it is.

    Args:
        to: the name of an op, or a `Plan`.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Model and
            student are run on it, in eval and in train mode, and their outputs must have the same
            structure, ranks, dtypes and sizes. Without one, images of some sizes are tried.
        report: is told how many convolutions are replaced, and what was compared and could not be.

    Raises:
        NothingToConvertError: if no convolution would be converted.
        PlanError: if a given plan does not fit the model, or comes with selectors besides.
        GuardError: if the outputs differ in shape; it names the first module that does.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> print(rewrite(net, "depthwise")[2])
        DepthwiseConv2d(
          8→8, 3x3, stride_on=spatial, rank=1
          (spatial): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), groups=8, bias=False)
          (pointwise): Conv2d(8, 8, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    model = module_of(model, report=report)
    if isinstance(to, Plan):
        if keep or only or mapping or pointwise or options or filter_fn:
            raise PlanError("a plan is carried out as it is; change its decisions instead of giving selectors")
        the_plan, expected = to, None
    else:
        found, expected = look(model, example_inputs)
        the_plan = decide(
            found,
            model,
            to,
            keep=keep,
            only=only,
            mapping=mapping,
            pointwise=pointwise,
            options=options,
            filter_fn=filter_fn,
        )
    student = _carry_out(model, the_plan, initialize=True, report=report)
    checked = compare_outputs(model, student, example_inputs, expected=expected)
    report(Progress("rewrite", message=str(checked)))
    return student


@torch.inference_mode(False)
def rebuild(model: nn.Module, the_plan: Plan) -> nn.Module:
    """Return what `rewrite` would, with the ops' parameters as they come from memory: weights must follow."""
    return _carry_out(model, the_plan, initialize=False, report=be_silent)


def plan_of(student: nn.Module) -> Plan | None:
    """Return the plan that made a student, or None for a model that was not rewritten.

    That of a wrapped student, such as an `nn.DataParallel` of it, has the names that its convolutions have there.

    Raises:
        SurveyError: for what is no model.
    """
    inside, path = unwrap(student)
    expect_module(inside)
    data = read_record(inside).get("plan")
    if data is None:
        return None
    prefix = "".join(f"{name}." for name in path)
    found = Plan.from_dict(data)
    return _renamed(found, student, lambda fqn: f"{prefix}{fqn}".rstrip(".")) if path else found


def _carry_out(model: nn.Module, the_plan: Plan, *, initialize: bool, report: Report) -> nn.Module:
    model = module_of(model, report=be_silent)
    with untouched_outside(model):
        replacements = _find_donors(model, the_plan)
    memo: dict[int, Any] = {}
    fitted: dict[tuple[str, ...], Decision] = {}
    # the first op in a process makes torch import sympy, which adds a warnings filter of its own
    with warnings.catch_warnings():
        for done, (decision, donor, replaced) in enumerate(replacements):
            assert decision.op is not None
            report(Progress("replace", done, len(replacements), message=decision.fqn))
            try:
                op = ops.get(decision.op).from_conv(donor.conv, decision.options, initialize=initialize)
            except UnsupportedConvError as error:
                raise UnsupportedConvError(f"{decision.fqn}: {error}") from error
            memo[id(replaced)] = op
            fitted[decision.fqns] = with_fitted_options(decision, op)
    report(Progress("replace", len(replacements), len(replacements)))
    the_plan = replace(the_plan, decisions=tuple(fitted.get(each.fqns, each) for each in the_plan.decisions))
    for _, donor, replaced in replacements:
        if isinstance(replaced, nn.Module):
            _take_over(replaced, memo[id(replaced)], memo, dropped=donor.dropped)
    _follow_bound_methods(model, memo)
    student = copy_module(model, memo)
    for _, donor, replaced in replacements:
        pass_marks_on(replaced, donor.conv, memo[id(replaced)], memo)
    for decision, _, replaced in replacements:
        _see_to_it(student, decision, memo[id(replaced)], is_module=isinstance(replaced, nn.Module))
    _register_where_kernels_were(student)
    _record(model, student, the_plan)
    return student


def _find_donors(model: nn.Module, the_plan: Plan) -> list[tuple[Decision, Donor, nn.Module | Tensor]]:
    """Return, for each decision to convert, what the op starts from and what it takes the place of."""
    modules = {fqns: module for module, fqns in walk(model)}
    tied, registered = shared_weights(model), set(model.modules())
    by_name = {fqn: fqns for fqns in modules for fqn in fqns}
    kernels = Names(model)
    if not the_plan.converted:
        raise NothingToConvertError(f"the plan for {the_plan.model} converts nothing; change a decision in it")
    replacements: list[tuple[Decision, Donor, nn.Module | Tensor]] = []
    for decision in the_plan.decisions:
        kernel = kernels.kernels.get(kernels.by_name.get(decision.fqns[0], -1))
        if kernel is not None:
            if decision.op is not None:
                replacements.append((decision, _functional_donor(decision, kernel, kernels), kernel))
            continue
        if decision.op is None and "(" in decision.fqns[0]:
            continue  # a call without a name of its own
        fqns = by_name.get(decision.fqns[0])
        if fqns is None or set(fqns) != set(decision.fqns):
            raise PlanError(
                f"the plan was made for {the_plan.model} and decides about {' = '.join(decision.fqns)!r}; "
                f"{type(model).__name__} has no such convolution; make a plan for this model"
            )
        if decision.op is not None:
            replacements.append(
                (decision, _module_donor(decision, modules[fqns], tied, registered=registered), modules[fqns])
            )
    return replacements


def _module_donor(decision: Decision, module: nn.Module, tied: dict[int, str], *, registered: set[nn.Module]) -> Donor:
    if not isinstance(module, nn.Conv2d):
        raise PlanError(f"{decision.fqn} is a {type(module).__name__}; only a Conv2d can become {decision.op}")
    donor = find_donor(module)
    obstacle = donor if isinstance(donor, str) else None
    if obstacle is None:
        obstacle = describe(module, decision.fqns, tied, registered=module in registered, donor=donor).obstacle
    if obstacle is not None or isinstance(donor, str):
        raise PlanError(f"{decision.fqn} cannot become {decision.op}: {obstacle}")
    _check_geometry(decision, donor.spec)
    return donor


def _functional_donor(decision: Decision, kernel: Tensor, names: Names) -> Donor:
    """Return a convolution of the plan's geometry around the kernel of a functional one."""
    spec = decision.spec
    assert spec is not None
    expected = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel_size)
    if set(names.fqns[id(kernel)]) != set(decision.fqns) or tuple(kernel.shape) != expected:
        raise PlanError(
            f"{decision.fqn} is {'x'.join(map(str, kernel.shape))} here and {'x'.join(map(str, expected))} in the "
            "plan; make a plan for this model"
        )
    return Donor(plain_convolution(spec, kernel, training=True), spec, inside=True)


def _check_geometry(decision: Decision, spec: ConvSpec) -> None:
    if spec != decision.spec:
        raise PlanError(f"{decision.fqn} is {spec} here and {decision.spec} in the plan; make a plan for this model")


def _take_over(donor: nn.Module, op: AbstractCheapConv, memo: dict[int, Any], *, dropped: frozenset[str]) -> None:
    """Give an op the hooks of the convolution it replaces, and what else the user hung on it.

    Args:
        dropped: names of what stays behind: it went into the weight.
    """
    own = op._forward_pre_hooks.copy()
    for name in _HOOKS:
        op.__dict__[name] = copy_value(donor.__dict__[name], memo, owner="a hook")
    for key, hook in donor._forward_pre_hooks.items():
        if isinstance(hook, WEIGHT_WRITERS):
            op._forward_pre_hooks.pop(key, None)
    op._forward_pre_hooks.update(own)  # its own padding comes last
    standard = nn.Conv2d(1, 1, 1, device="meta").__dict__
    for name, value in donor.__dict__.items():
        if name not in standard and name not in op.__dict__ and name not in dropped:
            op.__dict__[name] = copy_value(value, memo, owner=name)
    op._non_persistent_buffers_set |= donor._non_persistent_buffers_set
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in donor.__dict__[kind].items():
            if name not in ("weight", "bias") and name not in dropped:
                op.__dict__[kind][name] = copy_value(value, memo, owner=name)


def _follow_bound_methods(model: nn.Module, memo: dict[int, Any]) -> None:
    """Let `self.run = self.conv.forward`, kept in a model, lead to the op that takes the convolution's place."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, MethodType) and isinstance(memo.get(id(value.__self__)), AbstractCheapConv):
                memo[id(value)] = getattr(memo[id(value.__self__)], value.__name__, value)


def _see_to_it(student: nn.Module, decision: Decision, op: AbstractCheapConv, *, is_module: bool) -> None:
    """Put an op where a plan wants it, if a `__deepcopy__` of the model's own has copied past the memo."""
    for fqn in decision.fqns:
        parent_name, _, name = fqn.rpartition(".")
        if student is op or fqn == "":
            continue
        try:
            parent = student.get_submodule(parent_name)
        except AttributeError as error:
            raise SurveyError(
                f"a copy of this {decision.fqn} cannot be found: a __deepcopy__ on the way gives a model without "
                f"{parent_name}; let it copy its submodules"
            ) from error
        if is_module:
            parent._modules[name] = op
        else:
            kind = "_buffers" if name in parent._buffers else "_parameters"
            parent.__dict__[kind][name] = op


def _register_where_kernels_were(student: nn.Module) -> None:
    """Move ops that stand where a parameter or a buffer was to the submodules, under the same names."""
    for module in list(student.modules()):
        for kind in ("_parameters", "_buffers"):
            tensors: dict[str, Any] = module.__dict__[kind]
            for name, value in list(tensors.items()):
                if isinstance(value, AbstractCheapConv):
                    del tensors[name]
                    module._non_persistent_buffers_set.discard(name)
                    module._modules[name] = value.train(module.training)


def _record(model: nn.Module, student: nn.Module, the_plan: Plan) -> None:
    """Let the network inside of a student's wrappers remember the plan, in the names that it has there."""
    inside, path = unwrap(student)
    own = _merged(plan_of(model), the_plan)
    if path:
        prefix = "".join(f"{name}." for name in path)
        own = _renamed(own, inside, lambda fqn: fqn.removeprefix(prefix))
    update_record(inside, plan=own.to_dict())


def _renamed(the_plan: Plan, model: nn.Module, rename: Callable[[str], str]) -> Plan:
    decisions = tuple(replace(decision, fqns=tuple(map(rename, decision.fqns))) for decision in the_plan.decisions)
    return replace(the_plan, model=type(model).__name__, decisions=decisions)


def _merged(before: Plan | None, after: Plan) -> Plan:
    """Return one plan that makes a twice rewritten student from the original model."""
    if before is None:
        return after
    earlier = {frozenset(decision.fqns): decision for decision in before.converted}
    decisions = [earlier.pop(frozenset(decision.fqns), decision) for decision in after.decisions]
    return replace(after, decisions=(*decisions, *earlier.values()))
