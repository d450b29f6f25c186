"""`save`: a model becomes a file of the same kind as the one it came from."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import nn

from convsurgeon.errors import ConvSurgeonError, ModelError, OutputError, one_line
from convsurgeon.files import refuse_to_overwrite, write_atomically
from convsurgeon.progress import Report, be_silent
from convsurgeon.record import read_record
from convsurgeon.storage._programs import ExampleInputs, is_exported, write_program
from convsurgeon.storage._students import write_student
from convsurgeon.surgery import network_inside, why_no_layers

_PICKLED = (".pt", ".pth")
_NAMED = ".safetensors"
_EXPORTED = ".pt2"


def refuse_to_save(student: nn.Module, path: str | Path, *, force: bool = False) -> Path:
    """Return the path, or raise what `save` would raise before it writes anything."""
    path = Path(path)
    student = _to_write(student, path, report=be_silent)
    if path.suffix not in (*_PICKLED, _NAMED, _EXPORTED):
        raise ModelError(
            f"{path}: a model is saved as .safetensors (name, plan and weights), .pt (pickled module) "
            "or .pt2 (exported program)"
        )
    if path.suffix == _NAMED and not _has_name(student):
        raise ModelError(
            f"{path}: .safetensors is for models built from a name with plain arguments, and this "
            f"{type(student).__name__} was not; save it as {path.with_suffix('.pt').name}"
        )
    if path.suffix in _PICKLED:
        if reason := why_no_layers(student):
            raise ModelError(f"{path}: {reason}")
        _refuse_programs(student, path)
        _refuse_script_classes(student, path)
    refuse_to_overwrite(path, force=force)
    return path


def save(
    student: nn.Module,
    path: str | Path,
    *,
    force: bool = False,
    example_inputs: ExampleInputs | None = None,
    report: Report = be_silent,
) -> Path:
    """Write a student, or another model, so that `load` finds it again, and return the path.

    `.safetensors` holds the architecture's name, the plan and the weights, and no code: for models
    that were built from a name. `.pt` and `.pth` hold the pickled module. `.pt2` holds an exported
    program, in evaluation mode and on the CPU, whose sizes vary as those of the program it came from,
    else with a free batch size.

    Args:
        example_inputs: for `.pt2`, what the network takes, where its record does not say.
        report: is told where a wrapper, such as `nn.DataParallel`, is left out, which only a pickle can hold.

    Raises:
        SurveyError: for what is no model.
        ModelError: if the model cannot be written in that form; nothing is left behind.
        OutputError: if the file exists and `force` is not given, the folder cannot be written to, or the disk is full.
    """
    path = refuse_to_save(student, path, force=force)
    student = _to_write(student, path, report=report)

    def write(temporary: Path) -> None:
        if path.suffix == _EXPORTED:
            write_program(student, temporary, example_inputs=example_inputs)
        elif path.suffix == _NAMED:
            write_student(student, temporary)
        else:
            with temporary.open("wb") as file:  # given its name, torch would write that into the file
                torch.save(student, file)

    try:
        return write_atomically(path, write)
    except ConvSurgeonError:
        raise
    except Exception as error:  # whatever pickle and safetensors make of a module
        if (problem := _of_the_disk(error)) is not None:
            raise OutputError(f"cannot write {path}: {problem}") from error
        raise ModelError(f"{type(student).__name__} cannot be saved as {path}: {one_line(error)}") from error


def _to_write(student: nn.Module, path: Path, *, report: Report) -> nn.Module:
    """Return what a file of that kind can hold: in a pickle the model with its wrappers, else the network inside."""
    if path.suffix in _PICKLED and isinstance(student, nn.Module):
        return student
    return network_inside(student, role="the model", stage="save", report=report)


def _of_the_disk(error: BaseException) -> str | None:
    """Return what the operating system said, where torch or safetensors failed on a write, or None."""
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(found.group(1)))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else cause.strerror


def default_output(model: nn.Module, source: str, tag: str) -> Path:
    """Return where a rewritten model goes if nobody says: `torchvision:resnet18`, `shift` →
    `resnet18.shift.safetensors`; `nets/a.pt` → `nets/a.shift.pt`.
    """
    if os.path.exists(source) or ":" not in source:
        path = Path(source)
        suffix = path.suffix if path.suffix in (*_PICKLED, _NAMED, _EXPORTED) else ".pt"
        return path.with_name(f"{path.stem}.{tag}{suffix}")
    name = source.partition(":")[2].replace("/", "-")
    return Path(f"{name}.{tag}{_NAMED if _has_name(model) else '.pt'}")


def _has_name(model: nn.Module) -> bool:
    return "name" in read_record(model).get("source", {})


def _refuse_programs(model: nn.Module, path: Path) -> None:
    if is_exported(model):
        raise ModelError(
            f"{path}: {type(model).__name__} came from an exported program and has no class that a pickle could "
            f"name; save it as {path.with_suffix(_EXPORTED).name}"
        )


def _refuse_script_classes(model: nn.Module, path: Path) -> None:
    for module in model.modules():
        name = type(module).__qualname__
        if type(module).__module__ == "__main__":
            raise ModelError(
                f"{path}: {name} is defined in a script (__main__), so no other program could load it; "
                "move it to a module such as mynet.py, or save model.state_dict() and use: "
                f"mynet:{name} --weights FILE"
            )
