"""Tensors and a few strings in one safetensors file; tensors that share their memory are written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from convsurgeon.errors import ModelError, one_line

_ALIASES = "aliases"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors under their names; further names of the same tensor go into the metadata."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[object, str] = {}
    for name, tensor in tensors.items():
        first = first_names.setdefault(_memory_of(tensor, name), name)
        if first == name:
            kept[name] = tensor.detach().cpu().contiguous().clone()
        else:
            aliases[name] = first
    text = {**metadata, _ALIASES: json.dumps(aliases, sort_keys=True)} if aliases else dict(metadata)
    safetensors.torch.save_file(kept, path, metadata=text)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors, on the CPU, and the metadata.

    Raises:
        ModelError: if the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        for alias, name in json.loads(metadata.get(_ALIASES, "{}")).items():
            tensors[alias] = tensors[name]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} is truncated or damaged ({one_line(error)}); copy or save it again") from error
    return tensors, metadata


def _memory_of(tensor: Tensor, name: str) -> object:
    """Return what is equal for two names of one tensor, and for nothing else."""
    if tensor.numel() == 0:
        return name
    place = tensor.untyped_storage().data_ptr()
    return place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
