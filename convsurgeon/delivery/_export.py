"""From a student to an ONNX file that onnxruntime and PyTorch agree on."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convsurgeon.delivery._constants import fold_constants
from convsurgeon.delivery._fold import count_unfolded, fold_batch_norms
from convsurgeon.delivery._freeze import Frozen, freeze_ops, largest_change, ops_of
from convsurgeon.delivery._inputs import ExampleInputs, Inputs, example_of, is_batched
from convsurgeon.delivery._metadata import compose_metadata, write_metadata
from convsurgeon.delivery._parity import Parity, check_parity, gather_images, named_outputs, trials
from convsurgeon.delivery._session import session
from convsurgeon.errors import ExportError, SurveyError, one_line
from convsurgeon.files import refuse_to_overwrite, write_atomically
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.record import read_record
from convsurgeon.surgery import copy_module, in_mode, network_inside, refuse_without_layers

_LARGEST_FILE = 2_000_000_000  # bytes; protobuf ends at 2 GiB
_STAGES = ("copy", "trace", "write", "compare")


@dataclass(frozen=True)
class Delivery:
    """A file that was written, and the proof of it.

    Args:
        path: the file.
        bytes: its size.
        opset: the version of the ONNX operators in it.
        parity: how far onnxruntime was from PyTorch.
        metadata: what the file says about itself.
        batch_norms_left: batch norms that directly follow a convolution; not 0 only where
            something else reads the convolution's output too, or its weights are computed.
        frozen: what the ops' delivered form changed against the student, as learned offsets that were
            rounded; PyTorch was compared in that form.
    """

    path: Path
    bytes: int
    opset: int
    parity: Parity
    metadata: Mapping[str, str]
    batch_norms_left: int
    frozen: Frozen = field(default_factory=Frozen)


def export(
    student: nn.Module,
    path: str | Path,
    *,
    example_inputs: ExampleInputs | None = None,
    images: Tensor | Iterable[Any] | None = None,
    tolerance: float = 1e-4,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    report: Report = be_silent,
) -> Delivery:
    """Write a student as one ONNX file with a free batch size, if onnxruntime agrees with PyTorch on it.

    Works on a copy, on the CPU, in evaluation mode and float32. The file appears only after its
    outputs were compared on random inputs of two batch sizes and on the images, where given.
    Ops that are delivered in another form than they were trained in, as shifts with learned
    offsets, take it first; `frozen` of the result says what that changed.

    Args:
        student: the network; neither it nor its mode, device or dtype is changed.
        path: a file name ending in `.onnx`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; the first
            dimension of every tensor is the batch. By default a batch of the shape that the
            student's record names, else of the images' shape.
        images: a batch, batches, or pairs of images and labels, preprocessed; up to 64 are used.
        tolerance: the difference allowed, as a part of the largest output. Where PyTorch in float32 is itself
            that far from float64, the file may be four times as far from it as PyTorch is.
        metadata: strings to store in the file, beside classes, preprocessing, source and plan.
        force: whether an existing file may be replaced.
        report: is told of each stage.

    Raises:
        SurveyError: for what is no model.
        ExportError: if the student cannot be copied, called or traced.
        ParityError: if onnxruntime and PyTorch disagree.
        DataError: if the images do not fit.
        OutputError: if the file exists or cannot be written.
    """
    student = network_inside(student, role="the student", stage="export", report=report)
    if isinstance(student, torch.jit.ScriptModule):
        refuse_without_layers(student, role="this cannot be exported", error=ExportError)
    path = Path(path)
    if path.suffix != ".onnx":
        raise ExportError(f"{path} must end in .onnx; try {path.with_suffix('.onnx')}")
    refuse_to_overwrite(path, force=force)
    entries = compose_metadata(read_record(student), metadata)

    def say(done: int) -> None:
        report(Progress("export", done, len(_STAGES), message=_STAGES[done] if done < len(_STAGES) else "done"))

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        say(0)
        model = _portable(student)
        batch = gather_images(images) if images is not None else None
        inputs = example_of(model, example_inputs, images=batch)
        outputs = _call(model, inputs.resized(2))
        frozen = _freeze(model, list(trials(inputs, batch))[-1].inputs.resized(8), report)
        say(1)
        proto = _to_onnx(model, inputs.resized(2), outputs)
        fold_batch_norms(proto)
        write_metadata(proto, entries)
        parity: list[Parity] = []

        def write_and_prove(temporary: Path) -> None:
            say(2)
            _write(proto, temporary)
            say(3)
            opened = session(temporary)
            parity.append(check_parity(model, opened, inputs=inputs, images=batch, tolerance=tolerance))

        write_atomically(path, write_and_prove)
    say(4)
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    return Delivery(path, path.stat().st_size, opset, parity[0], entries, count_unfolded(proto), frozen)


def _portable(student: nn.Module) -> nn.Module:
    """Return a copy on the CPU, in evaluation mode and float32, that will fit into one file."""
    tensors = [*student.parameters(), *student.buffers()]
    size = sum(tensor.numel() * 4 for tensor in tensors)
    if size > _LARGEST_FILE:
        raise ExportError(f"the weights take {size / 1e9:.1f} GB in float32; one ONNX file holds less than 2 GB")
    try:
        return in_mode(copy_module(student).cpu().float(), training=False)
    except SurveyError as error:
        raise ExportError(str(error)) from error
    except Exception as error:  # whatever a foreign module's _apply raises
        raise ExportError(
            f"{type(student).__name__} cannot be brought to the CPU in float32: {one_line(error)}"
        ) from error


def _call(model: nn.Module, inputs: Inputs) -> list[tuple[str, Tensor]]:
    """Return the model's outputs by name."""
    try:
        outputs = named_outputs(model(*inputs.args, **inputs.kwargs))
    except Exception as error:  # whatever a foreign forward raises
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs.tensors)
        raise ExportError(
            f"{type(model).__name__} cannot be called with an input of {shapes}: {one_line(error)}; "
            "give another --input-shape (in Python: example_inputs)"
        ) from error
    if not outputs:
        raise ExportError(f"{type(model).__name__} returns no tensor, so there is nothing to export")
    return outputs


def _freeze(model: nn.Module, inputs: Inputs, report: Report) -> Frozen:
    """Bring the ops into the form that is delivered, and tell what that changed."""
    before = _call(model, inputs) if ops_of(model) else []
    changes = freeze_ops(model)
    if not changes:
        return Frozen()
    frozen = Frozen(changes, largest_change(before, _call(model, inputs)))
    for name, change in changes.items():
        report(Progress("export", 0, None, message=f"{name or type(model).__name__}: {change}"))
    share = f"{100 * frozen.max_rel:.2g} % of the largest output"
    report(
        Progress("export", 0, None, message=f"this changes outputs by up to {share}; the file holds the changed form")
    )
    return frozen


def _to_onnx(model: nn.Module, inputs: Inputs, outputs: list[tuple[str, Tensor]]) -> onnx.ModelProto:
    taken = set(inputs.bound(model))
    names = [f"output_{name}" if name in taken else name for name, _ in outputs]
    try:
        with _quiet():
            program = torch.onnx.export(
                _trace(model, inputs), dynamo=True, optimize=True, verbose=False, output_names=names
            )
            assert program is not None
            fold_constants(program.model)
            proto = program.model_proto
    except Exception as error:  # the exporter's classes share no base below Exception
        raise ExportError(
            f"torch.onnx cannot export {type(model).__name__}: {_reason(error)}; the forward must not depend "
            "on the values it sees or on one batch size; export a part that does not (a detector's backbone)"
        ) from error
    _name_batch(proto)
    return proto


def _reason(error: Exception) -> str:
    """Return the exporter's own first line, or what it means where that says nothing."""
    if "specialized it to be a constant" in str(error):
        return "its batch size is fixed by the code"
    return one_line(error)


def _trace(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Trace with a free batch size, without dynamo first; the first failure is the one that is told."""
    batch = torch.export.Dim("batch")
    shapes = pytree.tree_map(lambda leaf: {0: batch} if is_batched(leaf) else None, inputs.bound(model))
    failures = []
    for strict in (False, True):
        try:
            return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=strict)
        except Exception as error:  # as above
            failures.append(error)
    raise failures[0]


def _name_batch(proto: onnx.ModelProto) -> None:
    """Call the free dimension `batch`, where the exporter says `s77`."""
    graph = proto.graph
    fields = [*graph.input, *graph.output, *graph.value_info]
    symbol = next((dim.dim_param for entry in graph.input for dim in entry.type.tensor_type.shape.dim[:1]), "")
    for dim in (dim for entry in fields for dim in entry.type.tensor_type.shape.dim):
        if symbol and dim.dim_param == symbol:
            dim.dim_param = "batch"


def _write(proto: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.save(proto, path)
        onnx.checker.check_model(path)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ExportError(f"the exporter made an invalid ONNX graph: {one_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep prints, warnings and logs of the exporter from the user, and every filter as it was."""
    level = logging.root.manager.disable
    sink = io.StringIO()
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
