"""The shape guard: a student's outputs are structured and sized as the teacher's, in both modes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convsurgeon.errors import GuardError, SurveyError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery._calls import Strangers
from convsurgeon.surgery._copies import ExampleInputs, call, copy_module, expect_module, in_mode, shadow
from convsurgeon.surgery._examples import at_least_two, describe_inputs, generated_inputs
from convsurgeon.surgery._expected import Expected
from convsurgeon.surgery._observation import written_kernels
from convsurgeon.surgery._outputs import Leaf, describe_output
from convsurgeon.surgery._outside import untouched_outside
from convsurgeon.surgery._passing_by import note_calls, ops_passed_by
from convsurgeon.surgery._switching import convolutions, replaced_convolutions, switch_modes
from convsurgeon.surgery._values import asks_what_layers_are, difference_with_the_same_kernels


@dataclass(frozen=True)
class GuardReport:
    """What was compared, and what could not be.

    Args:
        inputs: the input, in words; None if none was given and none was found that the model takes.
        data_dependent: sizes that depend on the data, and so were left out.
        not_called: ops that the student did not call, where the model called the convolution: control flow
            on values may turn another way.
        not_trained: why train mode was not compared, or None if it was.
        tensors: how many output tensors were compared in eval mode.
    """

    inputs: str | None
    data_dependent: tuple[str, ...] = ()
    not_called: tuple[str, ...] = ()
    not_trained: str | None = None
    tensors: int = 0

    def __str__(self) -> str:
        if self.inputs is None:
            return "the outputs were not compared: no input was given, and none was found that the model takes"
        if not self.tensors:
            return f"the outputs on {self.inputs} hold no tensor that could be compared"
        modes = "in eval and in train mode" if self.not_trained is None else "in eval mode"
        parts = [f"on {self.inputs} all outputs have the structure, dtypes and sizes of the original's {modes}"]
        if self.not_trained is not None:
            parts.append(f"train mode was not compared: {self.not_trained}")
        if self.data_dependent:
            parts.append(f"left out, since they depend on the data: {', '.join(self.data_dependent)}")
        if self.not_called:
            parts.append(f"not called in the student, which took another way: {', '.join(self.not_called)}")
        return "; ".join(parts)


def check_outputs(model: nn.Module, student: nn.Module, example_inputs: ExampleInputs | None = None) -> GuardReport:
    """Compare structure, ranks, dtypes and sizes of all outputs; neither module is touched.

    First in eval mode; then in train mode, with a batch of at least two, where the model itself runs
    that way. Sizes that depend on the data, such as the number of detections in an image, are left
    out and named: a size that differs is forgiven if it also changes when the model's own weights do.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; where
            none is given, images of some sizes are tried.

    Raises:
        GuardError: naming the output, and the first module that differs.
        SurveyError: if the model itself cannot take the input.
    """
    return compare_outputs(model, student, example_inputs, expected=None)


def compare_outputs(
    model: nn.Module, student: nn.Module, example_inputs: ExampleInputs | None, *, expected: Expected | None
) -> GuardReport:
    """Do what `check_outputs` does; what the model itself gives may be known already."""
    expect_module(model)
    expect_module(student)
    with untouched_outside(model):
        return _compare_outputs(model, student, example_inputs, expected=expected)


def _compare_outputs(
    model: nn.Module, student: nn.Module, example_inputs: ExampleInputs | None, *, expected: Expected | None
) -> GuardReport:
    inputs = example_inputs
    if expected is None:
        teacher = shadow(model, as_it_is=True)
        touched, before = switch_modes(teacher), convolutions(teacher)
        inputs, expected = _run_teacher(teacher, model, example_inputs)
        touched |= replaced_convolutions(before, teacher, when="when the model runs")
        touched |= dict.fromkeys(written_kernels(model, teacher), "its kernel is written to when the model runs")
        _refuse_touched_kernels(model, student, touched)
        del teacher, before
    if inputs is None or expected is None:
        return GuardReport(None)
    what = describe_inputs(inputs) if example_inputs is not None else f"a generated {describe_inputs(inputs)}"
    try:
        copied = shadow(student)
    except SurveyError as error:
        raise GuardError(
            f"the student cannot be copied, though the model can ({error.__cause__ and one_line(error.__cause__)}): "
            "a __deepcopy__ that builds a module anew does not know of its ops; let it copy what the module holds"
        ) from error
    except Exception as error:  # whatever a foreign train() raises
        raise GuardError(
            f"the student cannot be put into eval mode, as {type(model).__name__} can: {one_line(error)}; its train() "
            "or eval() uses a convolution's weight, which an op computes: --keep that convolution"
        ) from error
    calls = note_calls(copied)
    loose = _compare(copied, model, inputs, expected.output, what=what, training=False)
    passed_by = ops_passed_by(model, calls, inputs)
    if asks_what_layers_are(model) and (far := difference_with_the_same_kernels(model, student, inputs)):
        raise GuardError(
            f"the student's output on the example input {what} is {far:.0%} off that of {type(model).__name__} with "
            "the same kernels: its forward asks what its layers are, and an op is no nn.Conv2d; call the layers "
            "whatever they are"
        )
    if expected.in_training is not None:
        batch, in_training = at_least_two(inputs), f"{what}, in train mode"
        loose += _compare(copied, model, batch, expected.in_training, what=in_training, training=True)
    tensors = sum(leaf.shape is not None for leaf in expected.output)
    return GuardReport(what, tuple(dict.fromkeys(loose)), passed_by, expected.not_trained, tensors)


def _refuse_touched_kernels(model: nn.Module, student: nn.Module, touched: Mapping[str, str]) -> None:
    for fqn, op in student.named_modules() if touched else ():
        reason = touched.get(fqn, touched.get(f"{fqn}.weight".lstrip(".")))
        if isinstance(op, AbstractCheapConv) and reason is not None:
            raise GuardError(
                f"{fqn or '(root)'} of {type(model).__name__} cannot be replaced: {reason}; keep it: --keep {fqn!r}"
            )


def _run_teacher(
    teacher: nn.Module, model: nn.Module, example_inputs: ExampleInputs | None
) -> tuple[ExampleInputs | None, Expected | None]:
    if example_inputs is None:
        for inputs in generated_inputs(model):
            try:
                output = describe_output(call(teacher, inputs))
            except Exception:  # then it takes no such image
                continue
            return inputs, Expected.of(teacher, inputs, output=output)
        return None, None
    try:
        output = describe_output(call(teacher, example_inputs))
    except Exception as error:
        raise SurveyError(
            f"{type(model).__name__} itself fails on the example input {describe_inputs(example_inputs)}: "
            f"{one_line(error)}"
        ) from error
    return example_inputs, Expected.of(teacher, example_inputs, output=output)


def _compare(
    student: nn.Module, model: nn.Module, inputs: ExampleInputs, expected: list[Leaf], *, what: str, training: bool
) -> list[str]:
    """Return the sizes that depend on the data; whatever else differs is raised."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    strangers = Strangers({id(tensor): name for name, tensor in tensors})
    try:
        got = describe_output(call(in_mode(student, training=training), inputs, strangers))
    except Exception as error:
        where = _first_difference(model, student, inputs, training=training)
        raise GuardError(
            f"the student fails on the example input {what}, which {type(model).__name__} takes: "
            f"{one_line(error)}{where}"
        ) from error
    if strangers.met is not None:
        raise GuardError(
            f"the student still computes with {strangers.met} of the model itself: a closure, a weak reference or a "
            "hook leads there, which no copy can follow; keep the module in an attribute, and call that"
        )
    if got == expected:
        return []
    variants = _variants(model, inputs, expected, training=training)
    loose = []
    if [(leaf.path, leaf.kind) for leaf in got] != [(leaf.path, leaf.kind) for leaf in expected]:
        if any([(leaf.path, leaf.kind) for leaf in other] != _kinds(expected) for other in variants):
            return ["the structure of the output"]
        where = _first_difference(model, student, inputs, training=training)
        raise GuardError(f"the student's output{_structural(got, expected)} on the example input {what}{where}")
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        problem = _difference(want, have)
        if isinstance(problem, list):
            sizes = [other[index].shape or () for other in variants if _kinds(other) == _kinds(expected)]
            free = [dim for dim in problem if len({size[dim] for size in sizes if len(size) > dim}) > 1]
            if free == problem:
                loose += [f"output{want.path} dimension {dim}" for dim in free]
                continue
            problem = f"has size {have.shape}, expected {want.shape}"
        if problem is not None:
            where = _first_difference(model, student, inputs, training=training)
            raise GuardError(f"the student's output{want.path} {problem} on the example input {what}{where}")
    return loose


def _kinds(leaves: Sequence[Leaf]) -> list[tuple[str, str]]:
    return [(leaf.path, leaf.kind) for leaf in leaves]


def _structural(got: Sequence[Leaf], expected: Sequence[Leaf]) -> str:
    for want, have in zip(expected, got, strict=False):
        if (want.path, want.kind) != (have.path, have.kind):
            if have.path != want.path:
                return f" has output{have.path} where output{want.path} is expected"
            return f"{have.path} is {have.kind}, expected {want.kind}"
    return f" has {len(got)} parts, expected {len(expected)}"


def _difference(want: Leaf, have: Leaf) -> str | list[int] | None:
    """Return the dimensions whose sizes differ, or what else does, or None."""
    if want.shape is None or have.shape is None:
        return None
    if len(want.shape) != len(have.shape):
        return f"has {len(have.shape)} dimensions, expected {len(want.shape)}"
    sizes = enumerate(zip(want.shape, have.shape, strict=True))
    return [dim for dim, (a, b) in sizes if a != b] or None


def _variants(model: nn.Module, inputs: ExampleInputs, expected: list[Leaf], *, training: bool) -> list[list[Leaf]]:
    """Return what comes out for other weights: what differs there depends on the data."""
    found = [expected]
    for factor in (0.0, -1.0, 8.0):
        variant = in_mode(copy_module(model), training=training)
        with torch.no_grad():
            for parameter in variant.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(factor)
        # such weights may be too strange for the model; then they tell nothing
        with contextlib.suppress(Exception):
            found.append(describe_output(call(variant, inputs)))
    return found


def _first_difference(model: nn.Module, student: nn.Module, inputs: ExampleInputs, *, training: bool) -> str:
    """Return `; first at FQN: ...` for the first module, in call order, whose output differs."""
    theirs = _trace_shapes(in_mode(copy_module(model), training=training), inputs)
    mine = _trace_shapes(in_mode(student, training=training), inputs)
    for fqn, shapes in theirs.items():
        if fqn in mine and mine[fqn] != shapes:
            return f"; the first module that differs is {fqn}: {_shown(mine[fqn])}, expected {_shown(shapes)}"
    missing = next((fqn for fqn in theirs if fqn not in mine and fqn), None)
    return f"; the first module that is not reached is {missing}" if missing else ""


def _trace_shapes(model: nn.Module, inputs: ExampleInputs) -> dict[str, list[Leaf]]:
    """Return what every module gave, by fqn, in the order in which they ended."""
    found: dict[str, list[Leaf]] = {}

    def note(fqn: str) -> Any:
        return lambda module, args, output: found.setdefault(fqn, []).extend(describe_output(output))

    handles = [
        module.register_forward_hook(note(fqn))
        for fqn, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    ]
    with contextlib.suppress(Exception):  # it is asked how far it comes
        call(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def _shown(leaves: Sequence[Leaf]) -> str:
    return ", ".join("x".join(map(str, leaf.shape)) if leaf.shape is not None else leaf.kind for leaf in leaves)
