"""Attributes of parameters, such as `weight.no_decay`, by which optimizers group them; `copy.deepcopy` loses them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convsurgeon.ops import AbstractCheapConv


def copy_marks(parameter: Tensor, memo: dict[int, Any]) -> None:
    """Give the copy of a parameter, which a memo holds, its attributes, if it has none yet."""
    copied = memo.get(id(parameter))
    if isinstance(copied, nn.Parameter) and not vars(copied):
        _give(vars(parameter), copied, memo)


def pass_marks_on(replaced: nn.Module | Tensor, donor: nn.Conv2d, op: AbstractCheapConv, memo: dict[int, Any]) -> None:
    """Give the parameters of an op the attributes of the kernel that they stand for, and its bias those of the bias.

    Tensors among them stay behind: what belongs to the values of a dense kernel, such as a mask, fits no factor of it.

    Args:
        replaced: the convolution, or the kernel of a functional one.
        donor: the plain convolution that the op was started from.
        memo: that of the copy: what leads to a part of the model, leads to its copy.
    """
    kernel, bias = _marks([donor.weight]), _marks([] if donor.bias is None else [donor.bias])
    if isinstance(replaced, nn.Module):
        named = list(replaced.named_parameters())
        # a weight that is computed, as that of weight_norm, has none of its own
        kernel = kernel or _marks(parameter for name, parameter in named if name.startswith(_OF_WEIGHT))
        bias = bias or _marks(parameter for name, parameter in named if name.startswith(_OF_BIAS))
        for _, parameter in named:
            copy_marks(parameter, memo)
    else:
        kernel = kernel or _marks([replaced])
    for parameter in op.parameters():
        _give(bias if parameter is op.bias else kernel, parameter, memo)


_OF_WEIGHT, _OF_BIAS = (tuple(f"{prefix}{name}" for prefix in ("", "parametrizations.")) for name in ("weight", "bias"))


def _marks(parameters: Iterable[Tensor]) -> dict[str, Any]:
    found = {name: value for parameter in parameters for name, value in vars(parameter).items()}
    return {name: value for name, value in found.items() if not _holds_tensors(value)}


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _give(marks: dict[str, Any], parameter: nn.Parameter, memo: dict[int, Any]) -> None:
    for name, value in marks.items():
        try:
            setattr(parameter, name, copy.deepcopy(value, memo))
        except Exception:  # a lock, an open file
            setattr(parameter, name, value)
