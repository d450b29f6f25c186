"""Ops that a student does not call, where the model calls the convolution."""

from __future__ import annotations

from typing import Any

from torch import nn

from convsurgeon.errors import GuardError
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery._copies import ExampleInputs, call, shadow
from convsurgeon.surgery._graph import trace


def note_calls(student: nn.Module) -> dict[str, bool]:
    """Return, for every op of a student by its name, whether it was called; it changes as the student runs."""
    called: dict[str, bool] = {}

    def note(fqn: str) -> Any:
        return lambda module, args: called.__setitem__(fqn, True)

    for fqn, module in student.named_modules():
        if isinstance(module, AbstractCheapConv):
            called[fqn] = False
            for part in module.modules():  # its forward may be called, not itself
                part.register_forward_pre_hook(note(fqn))
    return called


def ops_passed_by(model: nn.Module, calls: dict[str, bool], inputs: ExampleInputs) -> tuple[str, ...]:
    """Return the ops that a student passes by where the model calls the convolution.

    Raises:
        GuardError: if it calls none of its ops, or has no control flow that could explain it.
    """
    missed = [fqn for fqn, called in calls.items() if not called]
    if not missed:
        return ()
    teacher = shadow(model)
    convolutions = dict(teacher.named_modules())
    ran: set[str] = set()

    def note(fqn: str) -> Any:
        return lambda module, args: ran.add(fqn)

    for fqn in missed:
        for name in (fqn, fqn.removesuffix(".weight")):
            if isinstance(convolutions.get(name), nn.Conv2d):
                convolutions[name].register_forward_pre_hook(note(fqn))
    call(teacher, inputs)
    lost = tuple(fqn for fqn in missed if fqn in ran)
    if lost and (not any(calls.values()) or _is_traceable(shadow(model))):
        raise GuardError(
            f"the student passes by {lost[0] or '(root)'}, which {type(model).__name__} calls: its forward asks what "
            "its layers are, and an op is no nn.Conv2d; call the layers whatever they are"
        )
    return lost


def _is_traceable(model: nn.Module) -> bool:
    try:
        trace(model)
    except Exception:
        return False
    return True
