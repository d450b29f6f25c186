"""`convsurgeon export`: an ONNX file that is proven equal, and timed."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsurgeon.cli import _arguments as arguments
from convsurgeon.cli._drawing import Drawing, console, emit

if TYPE_CHECKING:
    from torch import Tensor

    from convsurgeon.delivery import Delivery, Latency


def run(
    student: arguments.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")
    ] = None,
    input_shape: arguments.InputShape = None,
    data: arguments.Data = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Export it too, into a temporary file, and time both.")
    ] = None,
    data_root: arguments.DataRoot = None,
    size: arguments.Size = None,
    mean: arguments.Mean = None,
    std: arguments.Std = None,
    color: arguments.Color = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Time with 1 and with so many threads.")] = None,
    weights: arguments.Weights = None,
    teacher_weights: Annotated[str | None, typer.Option(metavar="FILE|DEFAULT", help="Weights of the teacher.")] = None,
    model_arg: arguments.ModelArg = None,
    trust: arguments.Trust = False,
    trust_module: arguments.TrustModule = None,
    force: arguments.Force = False,
    json: arguments.Json = False,
) -> None:
    """Write an ONNX file with a free batch size, only if onnxruntime agrees with PyTorch on it."""
    from convsurgeon.cli._models import load_model, load_splits, need_example, trusted
    from convsurgeon.data import make_loader
    from convsurgeon.delivery import export, measure_latency
    from convsurgeon.preprocessing import preprocessing_of

    admitted = trusted(teacher or "", trusted(student, trust_module))
    common: dict[str, Any] = {"model_arg": model_arg, "trust": trust, "trust_module": admitted}
    network = load_model(student, weights=weights, **_only_named(student, common))
    example: Tensor | None = None
    images = None
    if data is not None:
        splits = load_splits(
            data, preprocessing_of(network), root=data_root, size=size, mean=mean, std=std, color=color
        )
        source: Any = splits.test or splits.val or splits.train
        images = source if hasattr(source, "batch_size") else make_loader(source, batch_size=16, shuffle=False)
        if input_shape is None:
            example = next(iter(images))[0][:1]
    if example is None:
        example = need_example(network, input_shape)
    path = output or Path(f"{Path(student.replace(':', '-')).stem}.onnx")
    with Drawing() as drawing, tempfile.TemporaryDirectory() as folder:
        delivery = export(network, path, example_inputs=example, images=images, force=force, report=drawing)
        files = {"student": path}
        if teacher is not None:
            lead = load_model(teacher, weights=teacher_weights, **_only_named(teacher, common))
            files = {"teacher": Path(folder) / "teacher.onnx", **files}
            export(lead, files["teacher"], example_inputs=example, report=drawing)
        timings = measure_latency(files, threads=sorted({1, threads}) if threads else None, report=drawing)
    if json:
        data_out = {**asdict(delivery), "path": str(path), "latency": [asdict(timing) for timing in timings]}
        emit(data_out)
        return
    _draw(delivery, timings)


def _only_named(source: str, common: dict[str, Any]) -> dict[str, Any]:
    """Leave `--model-arg` out for files, which take none."""
    return {**common, "model_arg": None} if Path(source).exists() else common


def _draw(delivery: Delivery, timings: list[Latency]) -> None:
    parity = delivery.parity
    what = "random and real inputs" if parity.real_images else "random inputs only"
    out = console()
    out.print(f"{delivery.path}: {delivery.bytes / 1e6:.3f} MB, opset {delivery.opset}", markup=False)
    out.print(
        f"parity: {parity.max_rel:.1e} of the largest output (allowed {parity.tolerance:.0e}), "
        f"batches of {', '.join(map(str, parity.batches))}, {what}"
    )
    for timing in timings:
        out.print(
            f"latency of {timing.name}, {timing.threads} thread{'s' if timing.threads > 1 else ''}: "
            f"median {timing.median_ms:.3f} ms of {timing.runs} "
            f"(10th to 90th percentile {timing.low_ms:.3f} to {timing.high_ms:.3f})"
        )
    by_threads = {threads: [t for t in timings if t.threads == threads] for threads in {t.threads for t in timings}}
    for threads, pair in sorted(by_threads.items()):
        if len(pair) == 2:
            out.print(f"teacher / student, {threads} threads: {pair[0].median_ms / pair[1].median_ms:.2f}x")
