"""The values in a plan's JSON: each of its kind and of a size that a network can have, or a ValueError."""

from __future__ import annotations

import math
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from convsurgeon.spec import ConvSpec

_LARGEST = 2**31 - 1
_LONGEST_TEXT = 10_000
_LEAST = {"in_channels": 1, "out_channels": 1, "groups": 1, "kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
_PAIRS = ("kernel_size", "stride", "padding", "dilation")
_PADDINGS = ("same", "valid")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
# control, line and paragraph separators, and halves of a character that no file can be written with
_FORBIDDEN = ("Cc", "Zl", "Zp", "Cs")


def shown(value: object) -> str:
    """Return a value as it stands in a message: on one line, and not much of it.

    >>> shown([1] * 1000), shown("a\\nb")
    ('[1, 1, 1, 1, 1, 1, ...]', "'a\\\\nb'")
    """
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "a number too large"
    return reprlib.repr(value)


def finite(text: str) -> float:
    """Read a JSON number that is none of NaN and infinity.

    Raises:
        ValueError: if it is.
    """
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is no number")
    return value


def is_text(value: object) -> bool:
    """Whether a value is a string that can be written to a file, and to a terminal."""
    return (
        isinstance(value, str)
        and len(value) <= _LONGEST_TEXT
        and all(unicodedata.category(char) not in _FORBIDDEN for char in value)
    )


def text_of(data: Mapping[str, Any], key: str) -> str:
    """Return a text that `data` must have.

    Raises:
        ValueError: if it is none.
    """
    value = data[key]
    if not is_text(value):
        raise ValueError(f"{key} must be a text without control characters, got {shown(value)}")
    return str(value)


def expect_keys(data: Mapping[str, Any], keys: Sequence[str], *, what: str) -> None:
    """Refuse a JSON object that lacks one of the keys, or has another: a misspelled one would be lost silently.

    Raises:
        ValueError: naming the key.
    """
    if missing := [key for key in keys if key not in data]:
        raise ValueError(f"{what} needs {missing[0]!r}")
    if unknown := [key for key in data if key not in keys]:
        raise ValueError(f"{what} has no {shown(unknown[0])}, but {', '.join(keys)}")


def parse_plain(options: Any) -> dict[str, Any]:
    """Return an op's options: names and plain values.

    Raises:
        ValueError: for anything else; whether the op has such options is the op's to say.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"options must be an object, got {shown(options)}")
    for key, value in options.items():
        plain = is_text(value) or value is None or isinstance(value, int | float)
        if not is_text(key) or not plain or (isinstance(value, int | float) and not abs(value) <= _LARGEST):
            raise ValueError(f"option {shown(key)} must be a plain value, got {shown(value)}")
    return dict(options)


def parse_spec(data: Any) -> ConvSpec:
    """Return the geometry of a convolution.

    Raises:
        ValueError, TypeError: for what no convolution has.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"spec must be an object, got {shown(data)}")
    expect_keys(data, tuple(entry.name for entry in fields(ConvSpec)), what="a spec")
    spec = ConvSpec.from_dict(data)
    for name, least in _LEAST.items():
        value = getattr(spec, name)
        if name == "padding" and isinstance(value, str):
            continue
        numbers = value if name in _PAIRS and isinstance(value, tuple) else (value,)
        if len(numbers) != (2 if name in _PAIRS else 1) or not all(_is_within(number, least) for number in numbers):
            form = "two whole numbers" if name in _PAIRS else "a whole number"
            raise ValueError(f"{name} must be {form} from {least} on, got {shown(value)}")
    if isinstance(spec.padding, str) and spec.padding not in _PADDINGS:
        raise ValueError(f"padding must be two whole numbers, 'same' or 'valid', got {shown(spec.padding)}")
    if type(spec.bias) is not bool or spec.padding_mode not in _PADDING_MODES:
        raise ValueError(f"bias must be true or false, and padding_mode one of {', '.join(_PADDING_MODES)}")
    if spec.in_channels % spec.groups or spec.out_channels % spec.groups:
        raise ValueError(f"groups={spec.groups} divides not both {spec.in_channels} and {spec.out_channels} channels")
    return spec


def _is_within(value: object, least: int) -> bool:
    return type(value) is int and least <= value <= _LARGEST
