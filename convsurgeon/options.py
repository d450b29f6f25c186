"""Options as frozen dataclasses, read from mappings and from what people type."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from convsurgeon.errors import OptionError, did_you_mean


def parse_options(cls: type[Any], values: Any, *, owner: str) -> Any:
    """Turn None, a mapping of names to values or strings, or a `cls` into a `cls`.

    Args:
        cls: a dataclass whose fields all have defaults.
        owner: what the options belong to, for messages.

    Raises:
        OptionError: for an unknown name or a value of the wrong type.
    """
    if isinstance(values, cls):
        return values
    if values is not None and not isinstance(values, Mapping):
        raise OptionError(f"{owner}: options must be a mapping or {cls.__qualname__}, got {values!r}")
    types = typing.get_type_hints(cls)
    hints = {field.name: types[field.name] for field in dataclasses.fields(cls)}
    converted = {}
    for key, value in (values or {}).items():
        if key not in hints:
            known = ", ".join(hints) or "none"
            raise OptionError(f"{owner} has no option {key!r}.{did_you_mean(str(key), hints)} Options: {known}.")
        converted[key] = _convert(value, hints[key], f"{owner}: option {key}")
    return cls(**converted)


def parse_pairs(items: Sequence[str], *, flag: str) -> dict[str, str]:
    """Turn `["groups=8"]`, as a repeatable flag gives it, into a dict; the last of a name wins.

    Raises:
        OptionError: for an item without `=`.
    """
    pairs: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"{flag} {item!r} must be of the form NAME=VALUE")
        pairs.pop(key.strip(), None)  # the last of a name also takes the last place
        pairs[key.strip()] = value.strip()
    return pairs


def _convert(value: Any, hint: Any, what: str) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        for choice in choices:
            if (type(value), value) == (type(choice), choice) or value == str(choice):
                return choice
        raise OptionError(f"{what} must be one of {', '.join(map(str, choices))}, got {value!r}")
    allowed = typing.get_args(hint) or (hint,)
    for kind in allowed:
        if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and (converted := _read(value, kind)) is not None:
            return converted
        if kind is type(None) and value == "none":
            return None
    expected = " or ".join("none" if kind is type(None) else kind.__name__ for kind in allowed)
    raise OptionError(f"{what} must be of type {expected}, got {value!r}")


def _read(text: str, kind: type) -> Any:
    """Return what a person typed as a value of `kind`, or None where it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return None
    return None
