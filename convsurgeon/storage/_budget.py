"""A limit to what building a network may allocate, where a file says which network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convsurgeon.errors import ModelError

# a student can be a small part of the network that it is built from, and the smallest have next to nothing
_SPARE, _FACTOR = 64 * 2**20, 128
# each tensor comes with a module, names and a gradient: a million tiny ones are not small
_LEAST = 4096
_LARGEST_NUMBER = 10**6
_LONGEST_LIST = 1000


class Budget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, new tensors may have so many bytes in all, in proportion to what a file holds.

    Args:
        held: bytes of the file's own tensors.

    Raises:
        ModelError: before the tensor that would be too much is made.
    """

    def __init__(self, path: Path, held: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path, self._left = path, _SPARE + _FACTOR * held

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count what an operation makes; a tensor that is made of nothing but sizes, before it is made."""
        kwargs = kwargs or {}
        known = {_place(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if not known and "device" in _arguments_of(func):
            self._spend(func(*args, **{**kwargs, "device": torch.device("meta")}), known, plan=True)
        result = func(*args, **kwargs)
        if known:
            self._spend(result, known)
        return result

    def _spend(self, result: Any, known: set[object], *, plan: bool = False) -> None:
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and (plan or not (tensor.is_meta or _place(tensor) in known)):
                self._left -= max(tensor.untyped_storage().nbytes(), _LEAST)
        if self._left < 0:
            raise ModelError(
                f"{self._path} is damaged: the network that it names is many times larger than the weights in it"
            )


def refuse_absurd(path: Path, args: Any) -> None:
    """Refuse arguments for a builder that no network has: it could count or loop to them.

    Raises:
        ModelError: naming the value.
    """
    for value in pytree.tree_leaves(args):
        if isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
            raise ModelError(f"{path} is damaged: its record builds the network with {str(value)[:40]}")
    if len(pytree.tree_leaves(args)) > _LONGEST_LIST:
        raise ModelError(f"{path} is damaged: its record builds the network with too many arguments")


def _place(tensor: Tensor) -> object:
    return id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _arguments_of(func: Callable[..., Any]) -> set[str]:
    schema = getattr(func, "_schema", None)
    return {argument.name for argument in schema.arguments} if schema is not None else set()
