"""What else than modules a package that the user trusts may have in a file: enumerations, plain objects, functions.

They are values. Nothing of theirs runs while a file is read: an object is created empty and given its attributes
without its class being asked, a member of an enumeration is looked up, a function is put in its place. So a
class that has a say in that, or in what becomes of its objects afterwards (`__setstate__`, `__del__`), is refused.
"""

from __future__ import annotations

import abc
import enum
import types
import typing
from typing import Any

_PYTHON_ONLY = 1 << 9  # Py_TPFLAGS_HEAPTYPE
HAS_A_SAY = (
    *("__setstate__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__del__"),
    *("__getattribute__", "__class__"),
)
_BASES = (object, tuple, types.SimpleNamespace, typing.Generic, abc.ABC)


class _Plain:
    """An object with a `__dict__` and nothing else."""


_DICT = vars(_Plain)["__dict__"]


class Form(enum.Enum):
    """In which form a pickle has a value."""

    FUNCTION = "a function"
    ENUM = "an enumeration"
    OBJECT = "a class of plain objects"
    TUPLE = "a named tuple"
    NAMESPACE = "a kind of types.SimpleNamespace"


def form_of(value: object) -> Form | None:
    """Return in which form a pickle has what a name stands for, or None for what it never may."""
    if isinstance(value, types.FunctionType):
        return Form.FUNCTION
    if type(value) is enum.EnumMeta:
        return Form.ENUM
    if type(value) not in (type, abc.ABCMeta):
        return None
    assert isinstance(value, type)
    if issubclass(value, types.SimpleNamespace):
        return Form.NAMESPACE
    return (
        Form.TUPLE if issubclass(value, tuple) and isinstance(getattr(value, "_fields", None), tuple) else Form.OBJECT
    )


def why_no_value(value: Any, name: str) -> str | None:
    """Return why a file may not have what a name stands for, or None if it may.

    >>> why_no_value(print, "builtins.print"), why_no_value(abc.ABC, "mynet.ABC")
    ('it is no class and no plain function', 'it is abc.ABC by its own name')
    """
    form = form_of(value)
    if form is None:
        return "it has a metaclass" if isinstance(value, type) else "it is no class and no plain function"
    own = f"{value.__module__}.{value.__qualname__}"
    if own != name:
        return f"it is {own} by its own name"
    if form in (Form.FUNCTION, Form.ENUM):
        return None
    for base in value.__mro__:
        if base in _BASES:
            continue
        if not base.__flags__ & _PYTHON_ONLY:
            return f"it is built on {base.__module__}.{base.__qualname__}"
        for method in HAS_A_SAY:
            if method in vars(base) and not (form is Form.TUPLE and method == "__getnewargs__"):
                return f"it has a {method} of its own"
        if not isinstance(vars(base).get("__dict__", _DICT), types.GetSetDescriptorType):
            return "it has a __dict__ of its own"
    if form is Form.OBJECT and _layout(value) != _layout(_Plain):
        return "it has __slots__" if not issubclass(value, tuple) else "it is built on tuple"
    return None


def _layout(kind: type) -> tuple[int, ...]:
    return kind.__basicsize__, kind.__itemsize__, kind.__dictoffset__, kind.__weakrefoffset__


def has_own_hash(member: enum.Enum) -> bool:
    """Whether a member of an enumeration as a key would run code of its class."""
    return any(
        method in vars(base)
        for base in type(member).__mro__
        if base.__module__ not in ("enum", "builtins")
        for method in ("__hash__", "__eq__")
    )


def find_member(kind: type[enum.Enum], value: object) -> enum.Enum | None:
    """Return the member of an enumeration that has a plain value, without calling the enumeration.

    >>> find_member(Form, "a function"), find_member(Form, "another")
    (<Form.FUNCTION: 'a function'>, None)
    """
    members = type.__getattribute__(kind, "_member_map_").values()
    same = (member for member in members if _is_same(object.__getattribute__(member, "_value_"), value))
    return next(same, None)


def _is_same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return type(one) in (int, str, float, bool, bytes, types.NoneType) and one == other
