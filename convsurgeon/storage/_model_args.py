"""Arguments for an architecture's builder, as they are typed: `num_classes=10`."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from convsurgeon.errors import OptionError

_FETCHES = ("weights", "weights_backbone", "checkpoint_path", "cache_dir")


def parse_model_args(items: Sequence[str]) -> dict[str, Any]:
    """Turn `NAME=VALUE` items into a dict; a value that is no Python literal is a string.

    >>> parse_model_args(["num_classes=10", "act=relu", "sizes=(1, 2)"])
    {'num_classes': 10, 'act': 'relu', 'sizes': (1, 2)}

    Raises:
        OptionError: for an item of another form, or a name given twice.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (equals and name.isidentifier()):
            raise OptionError(f"--model-arg {item!r} must look like NAME=VALUE, such as num_classes=10")
        if name in found:
            raise OptionError(f"--model-arg {name} is given twice, as {found[name]!r} and as {value!r}")
        found[name] = _literal(value)
    refuse_fetching(found)
    return found


def refuse_fetching(args: Mapping[str, Any]) -> None:
    """Refuse arguments that would make a builder fetch or unpickle something.

    Raises:
        OptionError: naming the argument and the way that is meant for it.
    """
    for name in args:
        if name in _FETCHES or name.startswith("pretrained"):
            raise OptionError(
                f"--model-arg {name} is not taken; weights are given by --weights FILE or --weights DEFAULT"
            )


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value
