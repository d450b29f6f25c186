"""Inputs to try a model on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from convsurgeon.ops import AbstractCheapConv
from convsurgeon.record import read_record
from convsurgeon.surgery._copies import ExampleInputs

_SIDES = (64, 224, 32)


def at_least_two(inputs: ExampleInputs) -> ExampleInputs:
    """Return the input with a batch of one doubled: batch norm cannot train on one value."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors if tensor.dim() > 1):
        return inputs
    doubled: ExampleInputs = pytree.tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() > 1 else leaf, inputs
    )
    return doubled


def generated_inputs(model: nn.Module) -> Iterator[Tensor]:
    """Yield images that a model may take: of the shape on its record, else squares of some sizes."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    convs = [module.in_channels for module in model.modules() if isinstance(module, (nn.Conv2d, AbstractCheapConv))]
    kernels = [int(p.shape[1]) for p in model.parameters() if not is_lazy(p) and p.dim() == 4]
    known = read_record(model).get("input_shape")
    shapes = [(1, *known[1:])] if known else []
    for channels in dict.fromkeys([*convs[:1], *kernels[:1], 3, 1]):
        shapes += [(1, channels, side, side) for side in _SIDES]
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        yield torch.randn(shape, generator=generator).to(device=first.device, dtype=first.dtype)


def describe_inputs(example_inputs: Any) -> str:
    """Return the shapes of an example input as a person would write them.

    >>> import torch
    >>> describe_inputs((torch.zeros(1, 3, 8, 8), {"mask": None}))
    '(1x3x8x8, {mask: NoneType})'
    """
    if isinstance(example_inputs, Tensor):
        return "x".join(str(size) for size in example_inputs.shape)
    if isinstance(example_inputs, Mapping):
        items = (f"{key}: {describe_inputs(value)}" for key, value in example_inputs.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(example_inputs, (tuple, list)):
        return "(" + ", ".join(describe_inputs(value) for value in example_inputs) + ")"
    return type(example_inputs).__name__
