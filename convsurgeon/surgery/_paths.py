"""Names for what stands in the lists and dicts of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def named_leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield path and value of all in nested lists, tuples and dicts; keys that are no plain values are numbered.

    >>> list(named_leaves({"a": [1, 2], object(): 3}))
    [("['a'][0]", 1), ("['a'][1]", 2), ('[key 0]', 3)]
    """
    keys: list[Any] = []
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        yield "".join(_shown(step, keys) for step in path), leaf


def _shown(step: Any, keys: list[Any]) -> str:
    if not isinstance(step, pytree.MappingKey) or isinstance(step.key, _PLAIN):
        return pytree.keystr((step,))
    number = next((index for index, key in enumerate(keys) if key is step.key), len(keys))
    if number == len(keys):
        keys.append(step.key)
    return f"[key {number}]"
