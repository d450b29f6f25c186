"""The shape guard: a student's outputs are structured and sized as the teacher's."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convsurgeon.errors import GuardError, SurveyError, one_line
from convsurgeon.surgery._copies import ExampleInputs, call, copy_module, shadow
from convsurgeon.surgery._survey import describe_inputs


def check_outputs(model: nn.Module, student: nn.Module, example_inputs: ExampleInputs) -> None:
    """Compare structure, ranks, dtypes and sizes of all outputs in eval mode; neither module is touched.

    Sizes that depend on the data, such as the number of detections in an image, are left out: a
    size that differs is forgiven if it also changes when the model's own weights do.

    Raises:
        GuardError: naming the output that differs.
        SurveyError: if the model itself cannot take the input.
    """
    what = describe_inputs(example_inputs)
    try:
        expected, spec = pytree.tree_flatten_with_path(call(shadow(model), example_inputs))
    except Exception as error:
        name = type(model).__name__
        raise SurveyError(f"{name} itself fails on the example input {what}: {one_line(error)}") from error
    try:
        got, got_spec = pytree.tree_flatten_with_path(call(shadow(student), example_inputs))
    except Exception as error:
        raise GuardError(
            f"the student fails on the example input {what}, which {type(model).__name__} takes: {one_line(error)}"
        ) from error
    if spec != got_spec:
        have_it, want_it = (" ".join(str(each).split()) for each in (got_spec, spec))
        raise GuardError(f"the student's output is {have_it}, expected {want_it} on the example input {what}")
    loose: set[tuple[int, int]] | None = None
    for index, ((path, want), (_, have)) in enumerate(zip(expected, got, strict=True)):
        problem = _difference(want, have)
        if problem is None:
            continue
        if isinstance(problem, tuple):
            if loose is None:
                loose = _data_dependent(model, example_inputs, [leaf for _, leaf in expected])
            if loose.issuperset((index, dim) for dim in problem):
                continue
            problem = f"has size {tuple(have.shape)}, expected {tuple(want.shape)}"
        raise GuardError(f"the student's output{pytree.keystr(path)} {problem} on the example input {what}")


def _difference(want: Any, have: Any) -> str | tuple[int, ...] | None:
    """Return the dimensions whose sizes differ, or what else does, or None."""
    if not isinstance(want, Tensor) or not isinstance(have, Tensor):
        return None if type(want) is type(have) else f"is {type(have).__name__}, expected {type(want).__name__}"
    if want.dtype != have.dtype:
        return f"is {have.dtype}, expected {want.dtype}"
    if want.dim() != have.dim():
        return f"has {have.dim()} dimensions, expected {want.dim()}"
    sizes = enumerate(zip(want.shape, have.shape, strict=True))
    return tuple(dim for dim, (a, b) in sizes if a != b) or None


def _data_dependent(model: nn.Module, example_inputs: ExampleInputs, expected: list[Any]) -> set[tuple[int, int]]:
    """Return the (output, dimension) pairs whose size changes with the model's weights alone."""
    shapes = [_shapes(expected)]
    for factor in (0.0, -1.0, 8.0):
        variant = copy_module(model).eval()
        with torch.no_grad():
            for parameter in variant.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(factor)
        # such weights may be too strange for the model; then they tell nothing
        with contextlib.suppress(Exception):
            shapes.append(_shapes(pytree.tree_leaves(call(variant, example_inputs))))
    return {
        (index, dim)
        for index, variants in enumerate(zip(*shapes, strict=False))
        for dim, sizes in enumerate(zip(*variants, strict=False))
        if len(set(sizes)) > 1
    }


def _shapes(leaves: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in leaves]
