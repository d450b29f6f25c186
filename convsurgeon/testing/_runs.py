"""Runs of models side by side: on copies, in one mode, from one random state."""

from __future__ import annotations

import copy
import dataclasses
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from convsurgeon.surgery import in_mode
from convsurgeon.testing._checks import BrokenError, by, require
from convsurgeon.testing._holdings import same

Outputs = list[tuple[str, Any]]
"""Path and value of every part of an output, containers included."""

_SEED = 20190913
# by how much of the largest value two sums in another order may differ
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy; what was computed and hangs on a module, such as a pruned weight, without its history."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def run(model: nn.Module, inputs: Any) -> Any:
    """Run a model, from one and the same random state, on a copy of a tensor, a tuple or a dict of arguments."""
    inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's own
        torch.default_generator.manual_seed(_SEED)
        random.seed(_SEED)
        numpy.random.seed(_SEED)
        try:
            if isinstance(inputs, tuple):
                return model(*inputs)
            return model(**inputs) if isinstance(inputs, dict) else model(inputs)
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def outputs(model: nn.Module, inputs: Any, *, training: bool = False) -> Outputs:
    """Return what a copy of a model gives."""
    with torch.no_grad():
        return list(parts(run(in_mode(copy_of(model), training=training), inputs)))


def runs_in_training(model: nn.Module, inputs: Any) -> bool:
    """Whether the model itself takes such an input in train mode: a batch norm does not take every one."""
    try:
        outputs(model, inputs, training=True)
    except Exception:  # whatever a foreign forward raises
        return False
    return True


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all parts of an output; a container yields its class, and then its parts."""
    items: list[tuple[str, Any]] | None = None
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(f"[{index}]", part) for index, part in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif vars_of := _plain_fields(value):
        items = [(f".{name}", part) for name, part in vars_of.items()]
    yield path, value if items is None else type(value)
    for key, part in items or ():
        yield from parts(part, f"{path}{key}")


def _plain_fields(value: Any) -> Mapping[str, Any]:
    opaque = isinstance(value, (Tensor, nn.Module, type)) or callable(value)
    return {} if opaque else getattr(value, "__dict__", {})


def require_same_kind(got: Outputs, expected: Outputs, *, loose: tuple[str, ...] = (), mode: str = "") -> None:
    """Require the same structure, dtypes and sizes.

    Args:
        loose: sizes that depend on the data, such as `output['boxes'] dimension 0`.
        mode: what is said of the mode in which this came out.
    """
    if "the structure of the output" in loose:
        return
    paths = [path for path, _ in got], [path for path, _ in expected]
    require(paths[0] == paths[1], f"the output has the parts {paths[0]}, expected {paths[1]}{mode}")
    for (path, have), (_, want) in zip(got, expected, strict=True):
        where = f"output{path}"
        if not isinstance(want, Tensor) or not isinstance(have, Tensor):
            kinds = [value if isinstance(value, type) else type(value) for value in (have, want)]
            require(kinds[0] is kinds[1], f"{where} is {kinds[0].__name__}, expected {kinds[1].__name__}{mode}")
            continue
        require(have.dtype == want.dtype, f"{where} is {have.dtype}, expected {want.dtype}{mode}")
        require(have.device == want.device, f"{where} is on {have.device}, expected {want.device}{mode}")
        sizes = (
            ["any" if f"{where} dimension {dim}" in loose else size for dim, size in enumerate(want.shape)],
            have.shape,
        )
        fits = len(sizes[0]) == len(sizes[1]) and all(a in ("any", b) for a, b in zip(*sizes, strict=True))
        require(fits, f"{where} is {by(have)}, expected {by(want)}{mode}")


def require_same_bits(got: Outputs, expected: Outputs, what: str) -> None:
    """Require equal outputs, bit by bit."""
    require([path for path, _ in got] == [path for path, _ in expected], f"{what} has other parts")
    for (path, have), (_, want) in zip(got, expected, strict=True):
        comparable = isinstance(want, (Tensor, type, int, float, str))
        require(not comparable or same(have, want), f"{what}{path} differs")


class _Dtypes(TorchFunctionMode):
    """Notes in which dtypes a model computes: autocast, and casts of its own, show in no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.seen.add(out.dtype)
        return out


def rounding_of(model: nn.Module, inputs: Any) -> float:
    """Return by how much of the largest value the outputs of a model may differ that sums in another order."""
    dtypes = _Dtypes()
    with torch.no_grad(), dtypes:
        run(in_mode(copy_of(model), training=False), inputs)
    return max((_ROUNDING.get(dtype, 0.3) for dtype in dtypes.seen), default=1e-3)


def require_close_outputs(got: Outputs, expected: Outputs, what: str, *, rounding: float) -> None:
    """Require outputs that are equal but for that part of the largest value."""
    require_same_kind(got, expected)
    for (path, have), (_, want) in zip(got, expected, strict=True):
        if not isinstance(want, Tensor) or want.is_meta or not want.is_floating_point() or not want.numel():
            continue
        scale = float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 0.0
        tolerance = rounding * max(scale, 1e-6)
        if not torch.allclose(have.double(), want.double(), rtol=0, atol=tolerance, equal_nan=True):
            worst = (have.double() - want.double()).abs().max().item()
            raise BrokenError(f"{what}{path} is off by up to {worst:.3g}, values reach {scale:.3g}")
