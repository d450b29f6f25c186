"""Which operation a network's first output comes from, seen in one run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# by the names of torch's dispatcher. What these give has the range of what they take, and is linear in it
_PASSES = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "permute", "transpose", "t"}
    | {"slice", "select", "expand", "clone", "alias", "detach", "_to_copy", "lift_fresh"}
    | {"mean", "_adaptive_avg_pool2d", "avg_pool2d"}
)
_SCALES = frozenset({"mul", "div"})
_JOINS = frozenset({"cat", "stack"})
_NAMES = {
    "hardsigmoid": "sigmoid",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "hardtanh": "tanh",
    "addmm": "linear",
    "mm": "linear",
    "convolution": "linear",
}


@dataclass(frozen=True)
class _Made:
    """How a tensor was made."""

    operation: str
    inputs: tuple[_Made, ...]

    def name(self) -> str:
        """Return the operation, or what went into it where it changes the shape or the scale only."""
        scaled = self.operation in _SCALES and len(self.inputs) == 1
        if (self.operation in _PASSES or scaled) and self.inputs:
            return self.inputs[0].name()
        if self.operation in _JOINS:
            found = {each.name() for each in self.inputs}
            return found.pop() if len(found) == 1 else ""
        return _NAMES.get(self.operation, self.operation)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps how each tensor was made last, and the tensors, since another one may get the place of one that is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[Tensor, _Made]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in pytree.tree_leaves(args) if isinstance(each, Tensor)]
        inputs = tuple(self.made[id(each)][1] if id(each) in self.made else _Made("", ()) for each in tensors)
        out = func(*args, **(kwargs or {}))
        made = _Made(func.overloadpacket.__name__.rstrip("_"), inputs)
        for each in pytree.tree_leaves(out):
            if isinstance(each, Tensor):
                self.made[id(each)] = each, made
        return out


def last_operation(run: Callable[[], Tensor]) -> str:
    """Return the name of the operation that a tensor comes from: `sigmoid`, `linear`, `tanh`, `layer_norm`, ...

    Changes of shape and scale, and means, are looked through. `linear` is a linear layer or a convolution; empty
    where different operations were joined, or none was seen.

    Args:
        run: gives the tensor; called once, without gradients.
    """
    # torch imports libraries for its first trace that change the filter of warnings
    with warnings.catch_warnings(), torch.no_grad(), _Trace() as trace:
        found = run()
    return trace.made[id(found)][1].name() if id(found) in trace.made else ""
