"""A whole pickled module inside of a checkpoint, as detection code bases write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import ModelError
from convsurgeon.storage._admission import refusal
from convsurgeon.storage._state_dicts import Entry, choose_entry, list_entries
from convsurgeon.storage._texts import printable
from convsurgeon.storage._trees import check_tree
from convsurgeon.storage._weights import describe, only_weights, say_choice

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Whole:
    """A module, and what there is to say of where it was."""

    module: nn.Module
    remark: str


def choose_module(path: Path, found: Any, refused: Mapping[str, str | None], *, key: str | None = None) -> Whole:
    """Return the module in what a file held: the averaged one before the other, in single precision.

    Args:
        refused: the names that the file uses and that are not admitted.
        key: where the module is, if the user says it.

    Raises:
        UntrustedFileError: if there is none among what may be used.
        ModelError: if there is none at all, or only weights.
        OptionError: if there is nothing under `key`.
    """
    entries = list_entries(found) if key is None else choose_entry(path, found, key)
    modules = [entry for entry in entries if isinstance(entry.value, nn.Module)]
    known = [entry.value for entry in entries if entry.is_known]
    if known and all(isinstance(value, dict) for value in known):
        raise only_weights(path)
    if refused:
        raise refusal(path, refused)
    if not modules:
        raise ModelError(f"{path} holds {describe(found)}, not an nn.Module; save the model itself with torch.save")
    if not modules[0].is_known and len(modules) > 1:
        keys = [printable(entry.key) for entry in modules]
        raise ModelError(f"{path} holds {', '.join(keys)}, all whole modules; say which: --weights-key {keys[0]}")
    taken, module = modules[0], modules[0].value
    check_tree(path, module)
    remark = f"took the whole {type(module).__name__} under {printable(taken.key)} of {path}"
    rest = [entry for entry in entries if entry is not taken and (entry.is_known or not taken.is_known)]
    if rest:
        remark = say_choice(path, taken, rest, because=_why_only_weights(path, entries[0]))
    if dtypes := _make_single(module):
        remark += f"; it was {' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}, now float32"
    return Whole(module, remark)


def _why_only_weights(path: Path, preferred: Entry) -> str | None:
    if isinstance(preferred.value, nn.Module):
        return None
    return f"{preferred.key} has only weights, which --weights {path} with an architecture takes"


def _make_single(module: nn.Module) -> set[torch.dtype]:
    """Turn all tensors of half precision into float32 in place, and return which precisions there were.

    Nothing of the module is called: what stands under the name of a method can be what a file likes.
    """
    found: set[torch.dtype] = set()
    todo, seen = [module], {id(module)}
    while todo:
        part = todo.pop()
        for tensor in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(tensor, Tensor) and tensor.dtype in _HALF:
                found.add(tensor.dtype)
                tensor.data = tensor.data.float()
        children = [child for child in part._modules.values() if child is not None and id(child) not in seen]
        seen |= {id(child) for child in children}
        todo += children
    return found
