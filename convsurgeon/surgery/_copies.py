"""Copies to look at, so that the caller's model is never touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import SurveyError, one_line

ExampleInputs = Tensor | tuple[Any, ...] | dict[str, Any]


def shadow(model: nn.Module) -> nn.Module:
    """Return a copy that shares the parameters and owns its buffers, in eval mode.

    Cheap in memory, and safe to trace, hook and run without gradients.

    Raises:
        SurveyError: if the model cannot be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy_module(model, memo).eval()


def copy_module(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return `copy.deepcopy(model, memo)`, with one clear line where that fails.

    Raises:
        SurveyError: if the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, {} if memo is None else memo)
    except Exception as error:
        raise SurveyError(
            f"{type(model).__name__} cannot be copied ({one_line(error)}); "
            "a student is a copy, so give the model a __deepcopy__ or remove what cannot be copied"
        ) from error


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Run a model on a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    with torch.no_grad():
        if isinstance(example_inputs, tuple):
            return model(*example_inputs)
        if isinstance(example_inputs, dict):
            return model(**example_inputs)
        return model(example_inputs)
