"""Sigmoids and softmaxes in float32, whatever is around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SHARES = frozenset(
    {torch.sigmoid, torch.softmax, torch.special.expit, torch.special.softmax, Tensor.sigmoid, Tensor.softmax}
    | {functional.sigmoid, functional.hardsigmoid, functional.softmax}
)


class PreciseShares(TorchFunctionMode):
    """Computes sigmoids and softmaxes of bf16 and float16 in float32, of which near 1 too few digits are left.

    A context manager.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        if (
            func in _SHARES
            and args
            and isinstance(args[0], Tensor)
            and args[0].dtype in (torch.bfloat16, torch.float16)
        ):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
