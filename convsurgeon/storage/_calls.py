"""What torch's own pickles call, and with which arguments: all the rest is refused before it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from convsurgeon.storage._archives import DamageError
from convsurgeon.storage._stand_ins import StandInError

_LATIN = ("latin1", "latin-1")


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function, by its name; with an owner if it is an attribute of another."""

    dotted: str
    owner: Name | None = None


@dataclass(frozen=True, eq=False)
class Made:
    """What calling something gave, of which only that is known."""

    by: str


@dataclass(eq=False)
class Table:
    """A dict of some kind, with what it holds under plain keys."""

    kind: str
    entries: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """A stretch of numbers in a file."""

    count: int
    item_size: int


class Extent:
    """Counts the bytes that a file's tensors seem to have: views of little can seem to be much."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def add(self, size: int) -> None:
        """Count one more tensor.

        Raises:
            StandInError: if they are too large together.
        """
        self._left -= size
        if self._left < 0:
            raise StandInError("holds tensors that are many times larger than the file")


class Known:
    """Calls of what torch itself lets pickles use: checked, and told what comes of them."""

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self._rules: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _ordered_dict,
            "collections.Counter": _counter,
            "builtins.set": _set,
            "builtins.bytearray": _bytearray,
            "builtins.complex": _complex,
            "_codecs.encode": _encode,
            "torch.Size": _torch_size,
            "torch.device": _device,
            "torch.serialization._get_layout": _device,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_bytes,
            "torch._utils._rebuild_meta_tensor_no_storage": self._meta_tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
            "torch._tensor._rebuild_from_type_v2": self._subclass,
        }

    def call(self, func: Name, args: tuple[Any, ...]) -> Any:
        """Return what a call gives.

        Raises:
            StandInError: if it has no rule, or arguments that torch does not write.
        """
        rule = self._rules.get(func.dotted)
        if rule is None:
            raise StandInError(f"calls {func.dotted}")
        try:
            return rule(*args)
        except (TypeError, ValueError, AttributeError) as error:
            raise StandInError(f"calls {func.dotted} with odd arguments") from error

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> Made:
        _expect(isinstance(storage, Storage) and type(grad) is bool and _is_empty(hooks) and _are_flags(metadata))
        self._check_extent(size, stride, offset, storage.count, storage.item_size)
        return Made("tensor")

    def _tensor_of_bytes(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> Made:
        item_size = dtype_of(dtype).itemsize
        elements = Storage(storage.count * storage.item_size // item_size, item_size)
        return self._tensor(elements, offset, size, stride, grad, hooks, metadata)

    def _meta_tensor(self, dtype: Any, size: Any, stride: Any, grad: Any) -> Made:
        dtype_of(dtype)
        _expect(_are_sizes(size) and _are_sizes(stride) and len(size) == len(stride) and type(grad) is bool)
        return Made("tensor")

    def _subclass(self, func: Any, new_type: Any, args: Any, state: Any) -> Any:
        _expect(isinstance(func, Name) and func.dotted in self._rules and "rebuild" in func.dotted)
        _expect(isinstance(new_type, Name) and new_type.dotted in ("torch.Tensor", "torch.nn.parameter.Parameter"))
        _expect(isinstance(args, tuple) and _is_tensor_state(state))
        return self._rules[func.dotted](*args)

    def _check_extent(self, size: Any, stride: Any, offset: Any, count: int, item_size: int) -> None:
        _expect(_are_sizes(size) and _are_sizes(stride) and len(size) == len(stride))
        _expect(type(offset) is int and offset >= 0)
        total, last = 1, offset
        for length, step in zip(size, stride, strict=True):
            total *= length
            last += (length - 1) * step
        if total and last >= count:
            raise DamageError("a tensor in it is larger than its storage")
        self._extent.add(total * item_size)


def dtype_of(name: Any) -> torch.dtype:
    """Return the dtype that a name stands for.

    Raises:
        ValueError: if it is none.
    """
    module, _, attribute = name.dotted.partition(".")
    dtype = getattr(torch, attribute, None)
    if module != "torch" or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name.dotted} is no dtype")
    return dtype


def is_key(value: object) -> bool:
    """Whether a dict may have such a key: something whose hash is quickly made."""
    if isinstance(value, tuple):
        return len(value) < 100 and all(not isinstance(item, tuple) and is_key(item) for item in value)
    return value is None or isinstance(value, str | bytes | int | float | Name | Made)


def _expect(condition: bool) -> None:
    if not condition:
        raise ValueError


def _ordered_dict(pairs: Any = ()) -> Table:
    _expect(isinstance(pairs, list | tuple))
    table = Table("collections.OrderedDict")
    for key, value in pairs:
        _expect(isinstance(key, str))
        table.entries[key] = value
    return table


def _counter(counts: Any) -> Table:
    _expect(isinstance(counts, Table))
    return Table("collections.Counter", dict(counts.entries))


def _set(items: Any) -> Made:
    _expect(isinstance(items, list) and all(map(is_key, items)))
    return Made("set")


def _bytearray(content: Any = b"", encoding: Any = None) -> Made:
    _expect(isinstance(content, bytes) if encoding is None else isinstance(content, str) and encoding in _LATIN)
    return Made("bytearray")


def _complex(real: Any, imag: Any) -> complex:
    _expect(type(real) is float and type(imag) is float)
    return complex(real, imag)


def _encode(text: Any, encoding: Any) -> bytes:
    _expect(isinstance(text, str) and encoding in _LATIN)
    return bytes(text, "latin-1", "replace")


def _torch_size(sizes: Any) -> Made:
    _expect(_are_sizes(sizes))
    return Made("torch.Size")


def _device(name: Any, index: Any = 0) -> Made:
    _expect(isinstance(name, str) and type(index) is int)
    return Made("torch.device")


def _parameter(data: Any, grad: Any, hooks: Any) -> Any:
    _expect(isinstance(data, Made) and data.by == "tensor" and type(grad) is bool and _is_empty(hooks))
    return data


def _parameter_with_state(data: Any, grad: Any, hooks: Any, state: Any) -> Any:
    _expect(_is_tensor_state(state))
    return _parameter(data, grad, hooks)


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, tuple) and len(value) <= 64 and all(type(size) is int and 0 <= size < 2**62 for size in value)
    )


def _is_empty(hooks: Any) -> bool:
    return hooks is None or (isinstance(hooks, Table) and not hooks.entries)


def _are_flags(metadata: Any) -> bool:
    return metadata is None or (
        isinstance(metadata, Table) and all(type(flag) is bool for flag in metadata.entries.values())
    )


def _is_tensor_state(state: Any) -> bool:
    """Attributes that the user hung on a tensor, and none that a tensor has itself."""
    if isinstance(state, tuple):
        return len(state) == 2 and all(part is None or _is_tensor_state(part) for part in state)
    return isinstance(state, Table) and all(
        isinstance(name, str) and name.isidentifier() and not hasattr(torch.Tensor, name) for name in state.entries
    )
