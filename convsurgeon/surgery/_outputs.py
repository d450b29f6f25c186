"""What comes out of a model, as far as it can be compared: structure, dtypes and sizes, without the values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Leaf:
    """One output: where it is in the structure, what it is, and its sizes if it is a tensor."""

    path: str
    kind: str
    shape: tuple[int, ...] | None = None


def describe_output(output: Any) -> list[Leaf]:
    """Return all there is in an output, containers included, in a fixed order.

    >>> import torch
    >>> [(leaf.path, leaf.kind, leaf.shape) for leaf in describe_output({"out": torch.zeros(1, 2)})]
    [('', 'dict of 1', None), ("['out']", 'torch.float32', (1, 2))]
    """
    return list(_walk(output, "", ()))


def _walk(value: Any, path: str, above: tuple[int, ...]) -> Iterator[Leaf]:
    if id(value) in above:  # a structure that contains itself
        return
    if isinstance(value, Tensor):
        yield Leaf(path, str(value.dtype), tuple(value.shape))
        return
    parts = _parts(value)
    if parts is None:
        yield Leaf(path, type(value).__name__)
        return
    yield Leaf(path, f"{type(value).__name__} of {len(parts)}")
    for key, part in parts:
        yield from _walk(part, f"{path}{key}", (*above, id(value)))


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (tuple, list)):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    plain = getattr(value, "__dict__", None)
    if plain and not isinstance(value, nn.Module) and not callable(value):
        return [(f".{name}", part) for name, part in plain.items()]
    return None
