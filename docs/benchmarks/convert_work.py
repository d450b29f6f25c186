"""What the benchmark of `rewrite` measures: the conversion, the bare work beside it, and the peer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import _rewrite

Timings = dict[str, float]

BARE = ("bsconv", "depthwise", "group", "shift")
"""The ops for which the bare work is written below; another one needs its own closed form here."""


# --- the bare work


@torch.no_grad()
def rank_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 is enough for the leading eigenvector; all kernels here have more rows than columns."""
    basis = torch.linalg.eigh(matrices.mT @ matrices)[1][..., -1:]
    left = matrices @ basis
    size = left.norm(dim=1, keepdim=True).sqrt()
    return left / size, (basis * size).mT


@torch.no_grad()
def low_rank(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """In float64: in float32 a Gram matrix loses singular values below 3e-4 of the largest."""
    work = matrices.double()
    wide = work.shape[1] < work.shape[2]
    values, vectors = torch.linalg.eigh(work @ work.mT if wide else work.mT @ work)
    basis, size = vectors[..., -rank:], values[:, None, -rank:].sqrt().sqrt()
    factors = (basis * size, (basis / size).mT @ work) if wide else (work @ (basis / size), (basis * size).mT)
    return factors[0].float(), factors[1].float()


def bare_op(conv: nn.Conv2d, op: str, options: Any) -> nn.Module:
    """Return two convolutions in the place of one, filled with the closest kernel they can make together."""
    weight, (outputs, inputs, *kernel) = conv.weight.detach(), conv.weight.shape
    groups = {"group": options.get("groups"), "bsconv": outputs}.get(op, inputs)
    shape = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "bias": False}
    width = outputs if op == "bsconv" else inputs
    spatial = nn.utils.skip_init(nn.Conv2d, width, width, kernel, groups=groups, **shape)
    point = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 1, bias=False)
    if op == "group":
        left, right = low_rank(weight.reshape(outputs, groups, -1).transpose(0, 1), inputs // groups)
        left = left.transpose(0, 1)
    elif op == "shift":
        taps = weight.flatten(2).square().sum(0).argmax(1)
        left = weight.flatten(2).gather(2, taps.expand(outputs, -1)[..., None])
        right = nn.functional.one_hot(taps, weight[0, 0].numel())
    else:
        left, right = rank_one(weight.flatten(2) if op == "bsconv" else weight.flatten(2).transpose(0, 1))
        left = left if op == "bsconv" else left.transpose(0, 1)
    point.weight.data.copy_(left.reshape(point.weight.shape))
    spatial.weight.data.copy_(right.reshape(spatial.weight.shape))
    return nn.Sequential(*([point, spatial] if op == "bsconv" else [spatial, point]))


def bare(model: nn.Module, decisions: list[Any], image: Tensor) -> tuple[nn.Module, Timings]:
    """Do what no conversion can do without; the passes in train mode spoil the running statistics."""
    clock = Clock()
    student = copy.deepcopy(model)
    clock.lap("copy")
    for decision in decisions:
        parent, _, name = decision.fqn.rpartition(".")
        setattr(
            student.get_submodule(parent),
            name,
            bare_op(model.get_submodule(decision.fqn), decision.op, decision.options),
        )
    clock.lap("closed forms")
    with torch.no_grad():
        for training, batch in ((False, image), (True, torch.cat([image, image]))):
            for network in (model, student):
                network.train(training)(batch)
    model.eval()
    clock.lap("forward passes")
    return student.eval(), clock.laps


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: Timings = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0) + now - self._last
        self._last = now


# --- the conversion, stage by stage


@contextmanager
def stages() -> Iterator[Timings]:
    """Time the stages of a rewrite by wrapping the functions in which they happen."""
    seconds: Timings = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - started

        return wrapper

    wrapped = [("survey", "look"), ("plan", "decide"), ("copy", "copy_module"), ("guard", "compare_outputs")]
    with ExitStack() as stack:
        for name, attribute in wrapped:
            stack.enter_context(mock.patch.object(_rewrite, attribute, timed(name, getattr(_rewrite, attribute))))
        from_conv = AbstractCheapConv.from_conv.__func__  # type: ignore[attr-defined]
        stack.enter_context(
            mock.patch.object(AbstractCheapConv, "from_conv", classmethod(timed("closed forms", from_conv)))
        )
        yield seconds


def rewrite(model: nn.Module, op: str, image: Tensor) -> tuple[nn.Module, Timings]:
    """Convert, and say how long each stage took."""
    with stages() as seconds:
        student = cs.rewrite(model, op, example_inputs=image)
    return student, seconds


def prune(model: nn.Module, image: Tensor) -> nn.Module:
    """Halve the channels with the peer, in place; the layers that give the classes are left alone, as it asks."""
    import torch_pruning

    last = [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", 0)) in (1000, 21)]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        image,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=last,
    )
    pruner.step()
    return model
