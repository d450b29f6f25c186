"""Tensors outside of a model that its code leads to, as a closure does: a copy of the model writes to the same."""

from __future__ import annotations

import contextlib
import dis
import functools
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsurgeon.errors import SurveyError

_TENSORS_AND_MODULES = ("_parameters", "_buffers", "_modules")
_CALLABLE = (FunctionType, MethodType, classmethod, staticmethod, property, functools.partial)


@contextlib.contextmanager
def untouched_outside(model: nn.Module) -> Iterator[None]:
    """Put back what runs of copies write to tensors outside of them: in closures, globals and class attributes.

    Raises:
        SurveyError: if one that a closure holds was written to: model and student would go on writing to the same.
    """
    closures_last = sorted(_outside(model), key=lambda pair: pair[1])
    found = {id(tensor): (tensor, in_closure) for tensor, in_closure in closures_last if not tensor.is_inference()}
    before = [(tensor, tensor._version, tensor.detach().clone(), in_closure) for tensor, in_closure in found.values()]
    written = False
    try:
        yield
    finally:
        for tensor, version, values, in_closure in before:
            if tensor._version != version:
                written = written or in_closure
                with torch.no_grad():
                    tensor.copy_(values)
    if written:
        raise SurveyError(
            f"{type(model).__name__} writes to a tensor that a closure leads to, which no copy can follow; "
            "hold it in a buffer or a submodule, and reach that through self"
        )


def _outside(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Yield the tensors that a model's functions and classes hold, and whether a closure does."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    own: list[Mapping[str, Any]] = [
        vars(cls) for cls in classes if not cls.__module__.startswith(("torch.", "builtins"))
    ]
    yield from ((value, False) for values in own for value in values.values() if isinstance(value, Tensor))
    seen: set[FunctionType] = set()
    for values in (*own, *(vars(module) for module in model.modules())):
        # a large model has a hundred thousand attributes, most of them numbers, tensors and empty dicts
        some = [value for name, value in values.items() if name not in _TENSORS_AND_MODULES and _may_hold(value)]
        for function in _functions(some):
            yield from _held_by(function, seen)


def _may_hold(value: Any) -> bool:
    return len(value) > 0 if isinstance(value, (dict, list, tuple)) else isinstance(value, _CALLABLE)


def _functions(value: Any) -> Iterator[FunctionType]:
    """Yield the functions in an attribute: a function, a method, a partial, or a container of them, as of hooks."""
    for leaf in _leaves(value):
        if isinstance(leaf, FunctionType):
            yield leaf
        elif isinstance(leaf, (MethodType, classmethod, staticmethod)):
            yield from _functions(leaf.__func__)
        elif isinstance(leaf, property):
            yield from _functions([leaf.fget, leaf.fset])
        elif isinstance(leaf, functools.partial):
            yield from _functions(leaf.func)


def _held_by(function: FunctionType, seen: set[FunctionType]) -> Iterator[tuple[Tensor, bool]]:
    if function in seen:
        return
    seen.add(function)
    yield from ((tensor, False) for tensor in _globals(function.__code__, function.__globals__))
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            value = cell.cell_contents
            yield from ((tensor, True) for tensor in _tensors(value))
            for inner in _functions(value):
                yield from _held_by(inner, seen)


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in _leaves(value):
        tensors = leaf.buffers() if isinstance(leaf, nn.Module) else [leaf]
        yield from (tensor for tensor in tensors if isinstance(tensor, Tensor) and not is_lazy(tensor))


def _globals(code: CodeType, scope: Mapping[str, Any]) -> Iterator[Tensor]:
    found = {name: value for name in code.co_names if isinstance(value := scope.get(name), Tensor)}
    if found:  # an attribute may have the name of a global
        used = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
        yield from (value for name, value in found.items() if name in used)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant, scope)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in lists, tuples and dicts, which may hold themselves."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, (dict, list, tuple)):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
