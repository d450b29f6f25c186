"""Exported programs (`.pt2`) as networks, and networks as exported programs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from convsurgeon.errors import ModelError, one_line
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.record import read_record, update_record
from convsurgeon.storage._program_archive import RECORD, check_archive, explained
from convsurgeon.storage._program_convention import (
    Convention,
    check_convention,
    convention_of,
    convention_of_example,
    dynamic_shapes,
    example_call,
    fixed_batch,
    takes_other_batches,
)
from convsurgeon.storage._program_graph import ExportedNetwork, lift
from convsurgeon.storage._texts import printable
from convsurgeon.surgery import in_mode

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

_FORMAT, _VERSION = "convsurgeon-program", 1


def read_program(path: Path, *, trust: bool, report: Report = be_silent) -> nn.Module:
    """Load an exported program and return the network that it computes, with what it remembers.

    It is in evaluation mode, if the network was when it was exported.

    Args:
        trust: let torch read the file as it is.
        report: is told if the program takes one batch size only.

    Raises:
        UntrustedFileError: if the file holds anything that could run.
        ModelError: if it is damaged, or holds what convsurgeon does not read.
    """
    program, text = _load(path, trust=trust)
    with explained(path), _quiet():
        convention = convention_of(program)
        batch = fixed_batch(convention)
        if batch is not None and takes_other_batches(lift(program), convention):
            batch = None
        network = lift(program, only_batch=batch)
    shapes = [leaf["example"] for leaf in convention["leaves"] if "example" in leaf]
    facts = {"input_shape": shapes[0]} if len(shapes) == 1 else {}
    update_record(network, **{"source": {"file": path.name}, **_parse_record(path, text), **facts}, program=convention)
    if batch is not None:
        report(
            Progress(
                "load",
                message=f"{path} was exported for a batch of exactly {batch}, which stands in its graph; "
                "for other sizes, as in training, export it with dynamic_shapes",
            )
        )
    return network


def _load(path: Path, *, trust: bool) -> tuple[ExportedProgram, str | None]:
    """Return the program, and our own record of it as text."""
    files: dict[str, Any] = {}
    source, text = (path, None) if trust else check_archive(path)
    with _quiet():
        try:
            program = torch.export.load(source, extra_files=files)
        except Exception as error:  # whatever torch makes of a damaged graph, or of one of another version
            raise ModelError(
                f"{path} cannot be loaded by torch {torch.__version__} ({printable(one_line(error))}); "
                "export it again with this version"
            ) from error
    return program, files.get(RECORD) if trust else text


def _parse_record(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
        version, record = found["version"], found["record"]
        if found["format"] != _FORMAT or not isinstance(record, dict):
            raise ValueError(found["format"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: its {RECORD} cannot be read; save the student again") from error
    if version != _VERSION:
        raise ModelError(
            f"{path} has version {printable(version)} of the program format, and this convsurgeon "
            f"reads version {_VERSION}; install a newer one"
        )
    return {str(key): value for key, value in record.items() if key != "program"}


def write_program(model: nn.Module, path: Path, *, example_inputs: ExampleInputs | None = None) -> None:
    """Export a network in evaluation mode and write the program, with its record.

    Sizes vary as in the program it came from; else the batch does.

    Raises:
        ModelError: if it is not known what the network takes, or torch cannot export it that way.
    """
    convention = _convention_for(model, example_inputs)
    portable = in_mode(copy.deepcopy(model).cpu(), training=False)
    args, kwargs = example_call(convention, portable)
    record = {key: value for key, value in read_record(model).items() if key != "program"}
    text = json.dumps({"format": _FORMAT, "version": _VERSION, "record": record})
    with _quiet():
        try:
            program = torch.export.export(
                portable, args, kwargs, dynamic_shapes=dynamic_shapes(convention), strict=False
            )
        except Exception as error:  # torch's exporter raises whatever the network and its own passes do
            raise ModelError(
                f"torch.export cannot export this {type(model).__name__}: {_reason(error)}; the forward must not "
                "depend on the values it sees or on one batch size"
            ) from error
        # in memory: on a full disk torch's own writer ends the process
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={RECORD: text})
    path.write_bytes(buffer.getbuffer())
    try:
        check_archive(path)
    except ModelError as error:  # what could not be loaded again is better told now
        said = str(error).replace(f"{path} holds", "it has").partition(", ")[0]
        raise ModelError(
            f"an exported program of this {type(model).__name__} could not be loaded again: {said}"
        ) from error


def _convention_for(model: nn.Module, example_inputs: ExampleInputs | None) -> Convention:
    record = read_record(model)
    if example_inputs is not None:
        return convention_of_example(example_inputs)
    if "program" in record:
        return check_convention(record["program"])
    shape = record.get("input_shape")
    if shape is None:
        raise ModelError(
            f"the input of this {type(model).__name__} is not known, and an exported program needs it: "
            "save(model, path, example_inputs=torch.zeros(1, 3, 224, 224))"
        )
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    return convention_of_example(torch.zeros(*shape, dtype=dtype))


def is_exported(model: nn.Module) -> bool:
    """Whether a network, or a part of it, was lifted from a program, so that no pickle can name its class."""
    return any(isinstance(module, ExportedNetwork) for module in model.modules())


def _reason(error: Exception) -> str:
    if "specialized" in str(error):
        return "its batch size is fixed by the code"
    return printable(one_line(error))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and logs of torch's exporter from the user, and every filter as it was."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
