"""Whether a student is the model but for its kernels: asked where a forward may look at what its layers are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery._copies import ExampleInputs, call, shadow
from convsurgeon.surgery._donors import is_plain

# rounding, however a network enlarges it, against another way through the layers
_ROUNDING = 0.05
# methods that set a model up, load or describe it, as they are commonly called
_OTHER_TIMES = ("init", "reset", "repr", "extra_repr", "load", "save", "fuse", "set", "get", "make", "build", "create")


def asks_what_layers_are(model: nn.Module) -> bool:
    """Whether a method of a model's own classes, as it runs, asks whether a layer is a convolution."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    own = [cls for cls in classes if not cls.__module__.startswith("torch.") and not issubclass(cls, AbstractCheapConv)]
    methods = [
        value
        for cls in own
        for name, value in vars(cls).items()
        if isinstance(value, FunctionType) and not name.strip("_").startswith(_OTHER_TIMES)
    ]
    return any(_asks(set(code.co_names), method.__globals__) for method in methods for code in _codes(method.__code__))


def _asks(names: set[str], scope: Mapping[str, Any]) -> bool:
    if names & {"type", "__class__"}:
        return True
    # isinstance(x, Tensor) is no such question
    mentioned = [scope.get(name, getattr(nn, name, None)) for name in names]
    return bool(names & {"isinstance", "issubclass"}) and any(
        isinstance(each, type) and issubclass(each, _ConvNd) for each in mentioned
    )


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def difference_with_the_same_kernels(model: nn.Module, student: nn.Module, inputs: ExampleInputs) -> float | None:
    """Return how far a student is from the model with the student's own kernels, relative to the largest output.

    None if it is no further than rounding goes, or if that cannot be told: for kernels that are computed, in
    half precision, for outputs that are not finite.
    """
    dense, copied = shadow(model), shadow(student)
    if not _take_kernels_of(student, dense):
        return None
    theirs, mine = (_numbers(call(each, inputs)) for each in (dense, copied))
    if [value.shape for value in theirs] != [value.shape for value in mine]:
        return None
    worst = 0.0
    for want, have in zip(theirs, mine, strict=True):
        if want.dtype not in (torch.float32, torch.float64) or not want.numel():
            continue
        error, scale = float((want - have).abs().max()), float(want.abs().max())
        if scale > 0 and error == error and scale < float("inf"):
            worst = max(worst, error / scale)
    return worst if worst > _ROUNDING else None


@torch.no_grad()
def _take_kernels_of(student: nn.Module, dense: nn.Module) -> bool:
    """Give a copy of the model the kernels that the student's ops are equal to; False where that is not so simple."""
    modules = dict(dense.named_modules())
    parameters = dict(dense.named_parameters())
    for fqn, op in student.named_modules():
        if not isinstance(op, AbstractCheapConv):
            continue
        module = modules.get(fqn)
        if module is None and fqn in parameters:
            parameters[fqn].copy_(op.as_dense())
        elif isinstance(module, nn.Conv2d) and is_plain(module) and module.weight.shape == op.as_dense().shape:
            module.weight.copy_(op.as_dense())
        elif not isinstance(module, AbstractCheapConv):
            return False
    return True


def _numbers(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
