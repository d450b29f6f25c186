"""Checkpoints of a training run: tensors and plain data, and never a class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from convsurgeon.errors import ConvSurgeonError, ModelError, one_line
from convsurgeon.files import write_atomically
from convsurgeon.storage._admission import refusal
from convsurgeon.storage._kinds import Kind, identify
from convsurgeon.storage._pickles import read_safely


def save_checkpoint(state: Mapping[str, Any], path: Path) -> Path:
    """Write tensors and plain data atomically, in place of an older checkpoint of that name.

    Raises:
        ModelError: if `state` holds anything that `load_checkpoint` would refuse.
        OutputError: if the folder cannot be written to.
    """

    def write(temporary: Path) -> None:
        torch.save(dict(state), temporary)
        if strange := get_unsafe_globals_in_checkpoint(temporary):
            raise ModelError(f"{path}: a checkpoint holds tensors and plain data, not {', '.join(sorted(strange))}")

    try:
        return write_atomically(path, write)
    except ConvSurgeonError:
        raise
    except Exception as error:  # whatever pickle makes of what it is given
        raise ModelError(f"cannot write the checkpoint {path}: {one_line(error)}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote, on the CPU.

    Raises:
        ModelError: in one line, if it is missing, damaged, or something else.
    """
    path = Path(path)
    kind = identify(path)
    if kind in (Kind.SAFETENSORS, Kind.PROGRAM):
        raise ModelError(f"{path} is {kind.value} and no checkpoint of a training run")
    found, refused = read_safely(path, kind)
    if refused:
        raise refusal(path, refused)
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__} and no checkpoint of a training run")
    return found
