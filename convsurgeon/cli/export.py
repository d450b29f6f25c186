"""`convsurgeon export`: an ONNX file that is proven equal, and timed."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsurgeon.cli import _arguments as arguments
from convsurgeon.cli._drawing import Drawing, emit, say, tell
from convsurgeon.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convsurgeon.cli._data import PreprocessingFlags
    from convsurgeon.data import DataSplits
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
    crop: arguments.Crop = None,
    interpolation: arguments.Interpolation = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Time with 1 and with so many threads.")] = None,
    weights: arguments.Weights = None,
    weights_key: arguments.WeightsKey = None,
    weights_prefix: arguments.WeightsPrefix = None,
    teacher_weights: Annotated[str | None, typer.Option(metavar="FILE|DEFAULT", help="Weights of the teacher.")] = None,
    model_arg: arguments.ModelArg = None,
    trust: arguments.Trust = False,
    trust_module: arguments.TrustModule = None,
    force: arguments.Force = False,
    json: arguments.Json = False,
) -> None:
    """Write an ONNX file with a free batch size, only if onnxruntime agrees with PyTorch on it."""
    from convsurgeon.cli._data import PreprocessingFlags, load_splits
    from convsurgeon.cli._models import args_for, count_scores, file_stem, load_model, need_example, trusted
    from convsurgeon.delivery import export, measure_latency
    from convsurgeon.files import refuse_to_overwrite
    from convsurgeon.record import read_record

    flags = PreprocessingFlags(size, mean, std, color, crop, interpolation)
    if data is None and data_root is not None:
        raise OptionError("--data-root is about --data; say which data")
    if teacher is None and teacher_weights is not None:
        raise OptionError("--teacher-weights are for the --teacher; say which one it is")
    path = refuse_to_overwrite(output or Path(f"{file_stem(student)}.onnx"), force=force)
    trusting: dict[str, Any] = {"trust": trust, "trust_module": trusted(teacher or "", trusted(student, trust_module))}
    args = args_for(student, model_arg, other=teacher)
    chosen: dict[str, Any] = {"weights": weights, "weights_key": weights_key, "weights_prefix": weights_prefix}
    network = load_model(student, model_arg=args, **chosen, **trusting)
    lead = None
    if teacher is not None:
        args = args_for(teacher, model_arg, other=student)
        lead = load_model(teacher, weights=teacher_weights, model_arg=args, **trusting)
    example: Tensor | None = None
    images = None
    if data is not None:
        splits = load_splits(data, flags, {student: read_record(network)}, root=data_root)
        images = _images(splits)
        first = next(iter(images))[0][:1]
        example = first if input_shape is None else None
        _remember(network, splits, count_scores(network, first))
    elif flags.typed():
        _write_preprocessing(network, flags, student, input_shape)
    if example is None:
        example = need_example(network, input_shape)
    with Drawing() as drawing, tempfile.TemporaryDirectory() as folder:
        files = {}
        if lead is not None:  # first: what fails here must not leave a file behind
            files["teacher"] = Path(folder) / "teacher.onnx"
            export(lead, files["teacher"], example_inputs=example, report=drawing)
        delivery = export(network, path, example_inputs=example, images=images, force=force, report=drawing)
        files["student"] = path
        timings = measure_latency(files, threads=sorted({1, threads}) if threads else None, report=drawing)
    if json:
        data_out = {**asdict(delivery), "path": str(path), "latency": [asdict(timing) for timing in timings]}
        emit(data_out)
        return
    _draw(delivery, timings)


def _images(splits: DataSplits) -> Any:
    from convsurgeon.data import ImageSet, make_loader

    part = next(part for part in (splits.test, splits.val, splits.train) if part is not None)
    return make_loader(part, batch_size=16, shuffle=False) if isinstance(part, ImageSet) else part


def _write_preprocessing(network: nn.Module, flags: PreprocessingFlags, source: str, input_shape: str | None) -> None:
    """Let the file say what the flags say that images go through, and take their size for the input's."""
    from convsurgeon.cli._models import parse_shape
    from convsurgeon.record import read_record, update_record

    record = read_record(network)
    if input_shape is not None:
        record["input_shape"] = list(parse_shape(input_shape))
    wanted = flags.choose("images", {source: record}, is_path=True)
    update_record(network, preprocessing=wanted.to_dict(), preprocessing_of=None, input_shape=None)
    say(f"preprocessing: {wanted}")


def _remember(network: nn.Module, splits: DataSplits, scores: int | None) -> None:
    """Let the file say what the images went through, and the classes where they fit and nothing better is known."""
    from convsurgeon.record import read_record, update_record

    if splits.preprocessing is not None:
        update_record(network, preprocessing=splits.preprocessing.to_dict(), preprocessing_of=None)
    if len(splits.classes) == scores and "classes" not in read_record(network):
        update_record(network, classes=list(splits.classes))


def _draw(delivery: Delivery, timings: list[Latency]) -> None:
    parity = delivery.parity
    what = "random and real inputs" if parity.real_images else "random inputs only"
    tell(f"{delivery.path}: {delivery.bytes / 1e6:.3f} MB, opset {delivery.opset}")
    allowed = f"allowed {parity.tolerance:.0e}"
    if parity.rounding:
        allowed += f", and 4 times PyTorch's own rounding here, {parity.rounding:.1e}"
    tell(
        f"parity: {parity.max_rel:.1e} of the largest output ({allowed}), "
        f"batches of {', '.join(map(str, parity.batches))}, {what}"
    )
    for timing in timings:
        tell(
            f"latency of {timing.name}, {_threads(timing.threads)}: median {timing.median_ms:.3f} ms of {timing.runs} "
            f"(10th to 90th percentile {timing.low_ms:.3f} to {timing.high_ms:.3f})"
        )
    by_threads = {threads: [t for t in timings if t.threads == threads] for threads in {t.threads for t in timings}}
    for threads, pair in sorted(by_threads.items()):
        if len(pair) == 2:
            tell(f"teacher / student, {_threads(threads)}: {pair[0].median_ms / pair[1].median_ms:.2f}x")


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
