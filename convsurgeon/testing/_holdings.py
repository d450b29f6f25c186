"""What a model holds: every module and tensor under every name, plain attributes included, and a witness of it."""

from __future__ import annotations

import contextlib
import pickle
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convsurgeon.surgery import named_leaves
from convsurgeon.testing._checks import require

_REGISTRIES = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def holdings(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield path and value of all that a model holds, an object under each of its names.

    Modules and tensors have their fqns; what stands in a list or dict, a path such as `blocks.plain[0]`.
    """
    waiting, seen = [("", model)], set(model.modules())
    while waiting:
        prefix, root = waiting.pop(0)
        for fqn, module in root.named_modules(prefix=prefix, remove_duplicate=False):
            yield fqn, module
            if isinstance(module, torch.jit.ScriptModule):  # its attributes are made anew at every look
                continue
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                yield f"{fqn}.{name}".lstrip("."), tensor
            for path, value in plain_attributes(module):
                where = f"{fqn}.{path}".lstrip(".")
                if isinstance(value, nn.Module) and value not in seen:
                    seen.update(value.modules())
                    waiting.append((where, value))
                else:
                    yield where, value


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a user hung on a module besides parameters, buffers and submodules; lists and dicts are entered."""
    for name, value in vars(module).items():
        if name not in _REGISTRIES:
            for path, leaf in named_leaves(value):
                yield f"{name}{path}", leaf


def hooks_of(module: nn.Module) -> dict[str, list[Any]]:
    """Return the hooks of a module by their kind, in their order."""
    kinds = [name for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)]
    return {kind: list(vars(module)[kind].values()) for kind in kinds}


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal; tensors bit by bit, or by their metadata where they have no bits."""
    if isinstance(a, (tuple, dict)) and type(a) is type(b):
        (mine, structure), (theirs, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
        return bool(structure == other) and all(map(same, mine, theirs))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if nn.parameter.is_lazy(a) or nn.parameter.is_lazy(b):
        return type(a) is type(b)
    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
        return False
    if a.is_meta:
        return True
    left, right = (tensor.detach().reshape(-1).contiguous() for tensor in (a, b))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))  # NaN equals NaN so


class Witness:
    """Remembers models, inputs and global state bit by bit; `check` says what is not as it was."""

    def __init__(self, *models: nn.Module, inputs: Any = None) -> None:
        self._models, self._inputs = models, inputs
        self._before = dict(self._look())

    def check(self, what: str) -> None:
        """Raise a `BrokenError` for the first thing that has changed.

        Args:
            what: who may have changed it, such as `rewrite`.
        """
        now = dict(self._look())
        for key, value in self._before.items():
            require(key in now, f"{what} removed {key}")
            require(same(value, now[key]), f"{what} changed {key}")
        added = [key for key in now if key not in self._before]
        require(not added, f"{what} added {', '.join(added)}")

    def _look(self) -> Iterator[tuple[str, Any]]:
        yield "torch's random state", torch.get_rng_state()
        yield "Python's random state", random.getstate()
        yield "numpy's random state", pickle.dumps(numpy.random.get_state())
        yield "the warnings filter", list(warnings.filters)
        yield "torch's grad mode", torch.is_grad_enabled()
        yield "torch's default dtype", torch.get_default_dtype()
        for path, leaf in pytree.tree_flatten_with_path(self._inputs)[0]:
            yield from _facts(f"the input{pytree.keystr(path)}", leaf)
        for model in self._models:
            for where, value in holdings(model):
                yield from _facts(where or "the root", value)


def _facts(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _PLAIN):
        yield where, value
        return
    yield f"the identity of {where}", id(value)
    if isinstance(value, Tensor):
        yield f"the kind of {where}", (type(value), value.requires_grad, value.dtype, str(value.device))
        if not nn.parameter.is_lazy(value):
            yield f"the strides of {where}", (value.shape, value.stride())
            yield f"the values of {where}", value.detach().clone()
            yield f"the gradient of {where}", value.grad.clone() if value.is_leaf and value.grad is not None else None
    elif isinstance(value, torch.jit.ScriptModule):
        yield f"the state of {where}", (value.training, {k: v.clone() for k, v in value.state_dict().items()})
    elif isinstance(value, torch.Generator):  # its pickle has other bytes every time
        yield f"the state of {where}", value.get_state()
    elif isinstance(value, nn.Module):
        yield f"the class of {where}", type(value)
        yield f"the mode of {where}", value.training
        yield f"the order of what {where} holds", [list(vars(value)[kind]) for kind in ("_parameters", "_modules")]
        yield f"the attributes of {where}", list(vars(value))
        yield f"the hooks of {where}", {kind: list(map(id, hooks)) for kind, hooks in hooks_of(value).items()}
    else:
        with contextlib.suppress(Exception):  # then it has no state that could be compared
            yield f"the state of {where}", pickle.dumps(value)
