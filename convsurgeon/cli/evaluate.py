"""`convsurgeon evaluate`: accuracy, and agreement with a teacher."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import Annotated, Any

import typer

from convsurgeon.cli import _arguments as arguments
from convsurgeon.cli._drawing import Drawing, emit, say, tell
from convsurgeon.errors import DataError, ModelError, OptionError

_KINDS: dict[str, tuple[type, str]] = {"preprocessing": (dict, "object"), "classes": (list, "array")}


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE.onnx", help=arguments.MODEL_HELP)],
    data: arguments.Data = None,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL|FILE.onnx", help="Compare its answers too.")] = None,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    data_root: arguments.DataRoot = None,
    size: arguments.Size = None,
    mean: arguments.Mean = None,
    std: arguments.Std = None,
    color: arguments.Color = None,
    crop: arguments.Crop = None,
    interpolation: arguments.Interpolation = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    limit_batches: arguments.LimitBatches = None,
    threads: arguments.Threads = None,
    weights: arguments.Weights = None,
    weights_key: arguments.WeightsKey = None,
    weights_prefix: arguments.WeightsPrefix = None,
    teacher_weights: Annotated[str | None, typer.Option(metavar="FILE|DEFAULT", help="Weights of the teacher.")] = None,
    model_arg: arguments.ModelArg = None,
    trust: arguments.Trust = False,
    trust_module: arguments.TrustModule = None,
    json: arguments.Json = False,
) -> None:
    """Measure accuracy on labelled images, and how often a model answers as its teacher does."""
    from convsurgeon.cli._data import PreprocessingFlags, load_splits
    from convsurgeon.cli._models import args_for, set_threads, trusted
    from convsurgeon.evaluation import evaluate

    set_threads(threads)
    if teacher is None and teacher_weights is not None:
        raise OptionError("--teacher-weights are for the --teacher; say which one it is")
    admitted = trusted(teacher or "", trusted(model, trust_module))
    args = args_for(model, model_arg, other=teacher)
    where = {"weights_key": weights_key, "weights_prefix": weights_prefix}
    network, record = _open(model, weights, args, where=where, trust=trust, admitted=admitted)
    records = {model: record}
    lead = None
    if teacher is not None:
        args = args_for(teacher, model_arg, other=model)
        lead, records[teacher] = _open(teacher, teacher_weights, args, where={}, trust=trust, admitted=admitted)
    flags = PreprocessingFlags(size, mean, std, color, crop, interpolation)
    splits = load_splits(data, flags, records, root=data_root)
    classes = record.get("classes")
    images = {"train": splits.train, "val": splits.val, "test": splits.test}.get(split)
    if classes and splits.classes and list(classes) != list(splits.classes):
        say(
            f"note: {model} was made for the classes {', '.join(map(str, classes))}; "
            f"{splits.name} has {', '.join(splits.classes)}: answers are compared by number"
        )
    if images is None:
        raise DataError(f"{splits.name} has no split {split!r}; choose test, val or train, as it has them")
    with Drawing() as drawing:
        found = evaluate(
            network, images, teacher=lead, batch_size=batch_size, limit_batches=limit_batches, report=drawing
        )
    if json:
        used = None if splits.preprocessing is None else splits.preprocessing.to_dict()
        emit({"model": model, "data": splits.name, "split": split, "preprocessing": used, **asdict(found)})
        return
    line = f"accuracy {100 * found.accuracy:.2f} % on {found.images} images of {splits.name} ({split})"
    if found.agreement is not None:
        line += f"; agrees with the teacher on {100 * found.agreement:.2f} %"
    tell(line)


def _open(
    source: str,
    weights: str | None,
    model_arg: list[str] | None,
    *,
    where: dict[str, str | None],
    trust: bool,
    admitted: list[str],
) -> tuple[Any, Any]:
    """Return something to evaluate, and what it remembers of itself, as plain data."""
    if source.endswith(".onnx"):
        from convsurgeon.delivery import read_metadata, session

        if weights is not None or model_arg or any(value is not None for value in where.values()):
            raise OptionError(f"--weights and --model-arg go with an architecture, not with the ONNX file {source}")
        opened = session(source)
        metadata = read_metadata(opened)
        record = {key: _parsed(metadata[key], key, source) for key in _KINDS if key in metadata}
        shape = opened.get_inputs()[0].shape
        if len(shape) == 4 and all(isinstance(size, int) for size in shape[1:]):
            record["input_shape"] = [1, *shape[1:]]
        return opened, record
    from convsurgeon.cli._models import load_model
    from convsurgeon.record import read_record

    network = load_model(source, weights=weights, **where, model_arg=model_arg, trust=trust, trust_module=admitted)
    return network, read_record(network)


def _parsed(text: str, key: str, source: str) -> Any:
    try:
        found = json_module.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, _KINDS[key][0]):
        raise ModelError(f"{source} has {key} in its metadata that is no JSON {_KINDS[key][1]}: {text!r}")
    return found
