"""What a module out of a file must be, since later code relies on what `nn.Module` would have seen to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convsurgeon.errors import ConvSurgeonError, ModelError
from convsurgeon.preprocessing import Preprocessing
from convsurgeon.record import read_record

# torch walks modules recursively, some levels of Python for each of theirs
_DEEPEST = 100
# values of a record, counted wherever they appear: a list can hold itself twice, and so on
_LARGEST_RECORD = 1_000_000
_LARGEST_INPUT = 2**28
_PARTS = {"_parameters": nn.Parameter, "_buffers": torch.Tensor, "_modules": nn.Module}


def check_tree(path: Path, root: nn.Module) -> None:
    """Refuse modules whose parts are no parts, that hold themselves, or whose record is none.

    Raises:
        ModelError: naming what is wrong.
    """
    _check_parts(path, root)
    _check_depth(path, root)
    try:
        record = read_record(root)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged: its record is no table; save the model again") from error
    check_record(path, record)


def check_record(path: Path, record: Any) -> None:
    """Refuse a record that is no plain data, or that no network can go by.

    Raises:
        ModelError: naming the entry.
    """
    if not _is_plain(record) or not isinstance(record, dict) or "model" in record:
        raise ModelError(f"{path} carries a record that is no plain data; save the model again")
    wrong = None
    shape, classes = record.get("input_shape"), record.get("classes")
    if shape is not None and not _is_shape(shape):
        wrong = "input_shape"
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        wrong = "classes"
    if (known := record.get("preprocessing")) is not None:
        try:
            Preprocessing.from_dict(known)
        except (ConvSurgeonError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
            wrong = "preprocessing"
    if wrong is not None:
        raise ModelError(f"{path} is damaged: {wrong} in its record is none; save the model again")


def _check_parts(path: Path, root: nn.Module) -> None:
    todo, seen = [root], {root}
    while todo:
        module = todo.pop()
        for attribute, kind in _PARTS.items():
            parts = module.__dict__.get(attribute)
            if not isinstance(parts, dict) or not all(
                isinstance(name, str) and (part is None or isinstance(part, kind)) for name, part in parts.items()
            ):
                raise ModelError(f"{path} is damaged: a {type(module).__name__} in it has no proper {attribute}")
        children = {child for child in module._modules.values() if child is not None} - seen
        seen |= children
        todo += children


def _check_depth(path: Path, root: nn.Module) -> None:
    """Walk down level by level: whoever holds himself never comes to an end."""
    level = [root]
    for _ in range(_DEEPEST):
        parts = [part for module in level for part in module._modules.values() if part is not None]
        level = list({id(part): part for part in parts}.values())
        if not level:
            return
    raise ModelError(f"{path} is damaged: its modules hold themselves, or lie more than {_DEEPEST} levels deep")


def _is_plain(record: Any) -> bool:
    todo, count = [record], 0
    while todo:
        value = todo.pop()
        count += 1
        if count > _LARGEST_RECORD or not isinstance(value, dict | list | tuple | str | int | float | None):
            return False
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                return False
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
    try:
        json.dumps(record)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, list | tuple) or not 2 <= len(shape) <= 6:
        return False
    size = 1
    for length in shape:
        if type(length) is not int or length < 1:
            return False
        size *= length
    return size <= _LARGEST_INPUT
