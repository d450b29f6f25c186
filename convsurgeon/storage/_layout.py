"""What a state dict does not say of a model: strides, what shares memory, which modules are one, and modes.

Everything is plain data. What a file says is checked before it is carried out: it may name what the
model has, and ask for as much memory as the tensors have, not for more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import ModelError
from convsurgeon.storage._trees import check_tree

# numbers between the tensors of one storage that a file may ask for, per number in them
_SPREAD = 2


def describe_layout(model: nn.Module) -> dict[str, Any]:
    """Return the layout of a model as plain data, without what follows from its tensors' names and sizes."""
    modules: dict[int, str] = {}
    shared, modes = {}, defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        modes[module.training].append(name)
        if (first := modules.setdefault(id(module), name)) != name:
            shared[name] = first
    tensors: dict[int, str] = {}
    tied, distinct = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (first := tensors.setdefault(id(tensor), name)) != name:
            tied[name] = first
        else:
            distinct[name] = tensor
    storages = _describe_storages(distinct)
    held = {name for entries in storages for name, _, _ in entries}
    strides = {
        name: list(tensor.stride())
        for name, tensor in distinct.items()
        if name not in held and tensor.stride() != _plain_stride(tensor.shape) and _extent(tensor) == tensor.numel() > 0
    }
    fewer = len(modes[True]) < len(modes[False])
    return {
        "modules": shared,
        "tied": tied,
        "storages": storages,
        "strides": strides,
        "training": not fewer,
        "unlike": modes[fewer],
    }


def share_modules(path: Path, model: nn.Module, layout: Mapping[str, Any]) -> None:
    """Let modules of a freshly built network be one where they were one, before its convolutions are replaced.

    Raises:
        ModelError: if the layout does not fit.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    shared = layout["modules"]
    for name, first in shared.items():
        if name in known and first in known and known[name] is not known[first]:
            if type(known[name]) is not type(known[first]):
                raise _damaged(path)
            parent, _, leaf = name.rpartition(".")
            known[parent]._modules[leaf] = known[first]
    if shared:
        check_tree(path, model)


def restore_layout(path: Path, model: nn.Module, layout: Mapping[str, Any]) -> None:
    """Give a model with its weights the strides, shared tensors and modes that it was saved with.

    Raises:
        ModelError: if the layout does not fit.
    """
    try:
        for name, first in layout["tied"].items():
            _tie(model, name, first)
        tensors = model.state_dict(keep_vars=True)
        for name, stride in layout["strides"].items():
            _place([(tensors[name], 0, stride)])
        for entries in layout["storages"]:
            _place([(tensors[name], offset, stride) for name, offset, stride in entries])
        unlike, training = set(layout["unlike"]), layout["training"] is True
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(path) from error
    for name, module in model.named_modules(remove_duplicate=False):
        module.training = training is not (name in unlike)


def _describe_storages(tensors: Mapping[str, Tensor]) -> list[list[tuple[str, int, list[int]]]]:
    """Return, for each storage that tensors share, or that a tensor repeats, their places in it."""
    groups = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel() > 0 and not tensor.is_meta:
            groups[tensor.untyped_storage().data_ptr(), tensor.dtype].append((name, tensor))
    found = []
    for members in groups.values():
        if len(members) == 1 and _extent(members[0][1]) == members[0][1].numel():
            continue
        start = min(int(tensor.storage_offset()) for _, tensor in members)
        entries = [(name, int(tensor.storage_offset()) - start, list(tensor.stride())) for name, tensor in members]
        if _fits([(tensor, *entry[1:]) for (_, tensor), entry in zip(members, entries, strict=True)]):
            found.append(entries)
    return found


def _fits(entries: list[tuple[Tensor, int, list[int]]]) -> bool:
    """Whether tensors can be laid out so: nothing lies far apart, and no number of a tensor on another of it."""
    for tensor, offset, stride in entries:
        if not all(type(step) is int and step >= 0 for step in (offset, *stride)) or len(stride) != tensor.ndim:
            return False
        reach = 0
        for step, length in sorted(zip(stride, tensor.shape, strict=True)):
            if step > 0 and length > 1:
                if step <= reach:
                    return False
                reach += (length - 1) * step
    return _span(entries) <= _SPREAD * sum(tensor.numel() for tensor, _, _ in entries)


def _place(entries: list[tuple[Tensor, int, list[int]]]) -> None:
    """Move tensors into one new storage, where they get these offsets and strides."""
    if len({tensor.dtype for tensor, _, _ in entries}) != 1 or not _fits(entries):
        raise ValueError("tensors that do not fit into one storage")
    storage = torch.zeros(_span(entries), dtype=entries[0][0].dtype, device=entries[0][0].device)
    for tensor, offset, stride in entries:
        view = storage.as_strided(tensor.shape, stride, offset)
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)
        view[once].copy_(tensor.data[once])
        tensor.data = view


def _span(entries: list[tuple[Tensor, int, list[int]]]) -> int:
    return max(
        offset + 1 + sum((length - 1) * step for length, step in zip(tensor.shape, stride, strict=True))
        for tensor, offset, stride in entries
    )


def _extent(tensor: Tensor) -> int:
    """Return how many numbers lie between the first and the last of a tensor, with them."""
    return _span([(tensor, 0, list(tensor.stride()))])


def _plain_stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _tie(model: nn.Module, name: str, first: str) -> None:
    """Put the parameter or buffer of one name under another name, too."""
    source, _, leaf = first.rpartition(".")
    target, _, other = name.rpartition(".")
    for kind in ("_parameters", "_buffers"):
        found = getattr(model.get_submodule(source), kind)
        place = getattr(model.get_submodule(target), kind)
        if leaf in found and other in place:
            if found[leaf].shape != place[other].shape:
                raise ValueError("two sizes of one tensor")
            place[other] = found[leaf]
            return
    raise KeyError(name)


def _damaged(path: Path) -> ModelError:
    return ModelError(f"{path} is damaged: the layout of its tensors fits no such network; save the student again")
