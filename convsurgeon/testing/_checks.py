"""What laws are written in: a requirement that says what was found."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class BrokenError(AssertionError):
    """What a law found, before what it was tried on is put in front of it."""


def find_laws(prefix: str, *modules: ModuleType) -> dict[str, Any]:
    """Return the functions whose names start so, in the order of the files: nobody keeps a list."""
    found = {name: value for module in modules for name, value in vars(module).items()}
    return {name: value for name, value in found.items() if name.startswith(prefix)}


def require(condition: bool, message: str) -> None:
    """Raise a `BrokenError` with the message unless the condition holds."""
    if not condition:
        raise BrokenError(message)


def require_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Require two tensors to be equal up to rounding."""
    require(actual.shape == expected.shape, f"{what} has the shape {by(actual)}, expected {by(expected)}")
    try:
        torch.testing.assert_close(actual, expected)
    except AssertionError as error:
        if not actual.numel() or actual.dtype != expected.dtype:
            raise
        worst = (actual.double() - expected.double()).abs().max().item()
        raise BrokenError(f"{what} is off by up to {worst:.3g}, values reach {expected.abs().max():.3g}") from error


def by(tensor: Tensor) -> str:
    """Return a shape as a person writes it."""
    return "x".join(map(str, tensor.shape))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a module's state."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def require_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Require two states to be equal bit by bit."""
    require(actual.keys() == expected.keys(), f"{what}: {sorted(actual)} became {sorted(expected)}")
    for key, value in expected.items():
        require(torch.equal(actual[key], value), f"{what}: {key} changed")
