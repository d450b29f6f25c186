"""Tensors and a few strings in one safetensors file; tensors that share their memory are written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from convsurgeon.errors import ModelError, one_line
from convsurgeon.storage._texts import printable

_ALIASES = "aliases"
# a safetensors file: the header's length, the header in JSON with the metadata in an entry of its own, the numbers
_LENGTH, _METADATA = 8, "__metadata__"


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
    _sort_metadata(path)


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
    except Exception as error:  # of safetensors, json and torch, for bytes that fit together in form only
        said = printable(one_line(error))
        raise ModelError(f"{path} is truncated or damaged ({said}); copy or save it again") from error
    return tensors, metadata


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, which safetensors writes in another one every time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length))
        header[_METADATA] = dict(sorted(header[_METADATA].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "safetensors writes its header without spaces"
        file.seek(_LENGTH)
        file.write(text.ljust(length))


def _memory_of(tensor: Tensor, name: str) -> object:
    """Return what is equal for two names of one tensor, and for nothing else."""
    if tensor.numel() == 0:
        return name
    place = tensor.untyped_storage().data_ptr()
    return place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
