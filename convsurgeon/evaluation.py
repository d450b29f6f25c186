"""Accuracy, and agreement with a teacher, of anything that maps images to logits."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from convsurgeon.data import DataSplits, ImageSet, make_loader
from convsurgeon.errors import DataError, ModelError, OptionError, one_line
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.surgery import copy_module, unwrap

Scorer = Callable[[Tensor], Tensor]
"""From a float batch of images to their logits `(B, K)`."""

_ONNX_FLOATS = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
}


@dataclass(frozen=True)
class Evaluation:
    """How often a model is right, and how often it says what its teacher says.

    Args:
        images: how many were looked at.
        accuracy: the share (0..1) whose highest score is the label's.
        agreement: the share whose highest score is the teacher's too, where there is a teacher.
    """

    images: int
    accuracy: float
    agreement: float | None = None


def evaluate(
    model: Any,
    data: Any,
    *,
    teacher: Any = None,
    batch_size: int = 256,
    limit_batches: int | None = None,
    device: torch.device | str | None = None,
    report: Report = be_silent,
) -> Evaluation:
    """Measure accuracy on labelled images; logits that are not numbers count as wrong.

    Modules run in eval mode and without gradients, and every submodule's mode is restored afterwards, also
    after an exception. The global random state of the CPU is as before.

    Args:
        model: a module, an onnxruntime session, the path of an ONNX file, or a function of a batch of images.
        data: an `ImageSet`, a DataLoader, or anything that gives batches `(images, labels)`.
        teacher: a model whose answers to compare with.
        batch_size: images at a time, where `data` is not in batches already.
        limit_batches: stop after so many batches.
        device: where modules run; a copy is moved if the module is elsewhere. The module's own if not given.

    Raises:
        DataError: if there is no image, if batches are not `(images, labels)`, or if scores and labels differ
            in their number of classes.
        ModelError: if the model cannot take the images, or does not answer with logits.
    """
    if limit_batches is not None and limit_batches < 1:
        raise OptionError(f"limit_batches must be at least 1, not {limit_batches}")
    batches, classes = _batches_of(data, batch_size)
    total = _length(batches)
    if limit_batches is not None:
        total = limit_batches if total is None else min(total, limit_batches)
    images = right = same = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        score = stack.enter_context(_scoring(model, device))
        lead = None if teacher is None else stack.enter_context(_scoring(teacher, device))
        for done, batch in enumerate(itertools.islice(batches, limit_batches), start=1):
            pictures, labels = _unpack(batch)
            answers = _answers("the model", score, pictures, labels, classes)
            if lead is not None:
                same += _matches(answers, _answers("the teacher", lead, pictures, labels, classes))
            images += len(labels)
            right += _matches(answers, labels)
            report(Progress("evaluate", done, total, {"accuracy": right / max(images, 1)}))
    if not images:
        raise DataError("there is no image to evaluate on; the data are empty")
    return Evaluation(images, right / images, None if teacher is None else same / images)


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model answers.

    They are the answer itself, the first of a tuple or list, the entry `logits` or `out` of a dict, or the
    attribute `logits`.

    Raises:
        ModelError: naming what was answered instead.
    """
    found = output
    if isinstance(output, dict):
        found = next((output[key] for key in ("logits", "out") if key in output), None)
    elif isinstance(getattr(output, "logits", None), Tensor):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    keys = f" with {', '.join(map(str, output))}" if isinstance(output, dict) else ""
    raise ModelError(
        f"the model answers with an object of type {type(output).__name__}{keys}; expected a tensor of"
        " logits, a tuple that starts with one, or 'logits' or 'out' in a dict"
    )


def check_head(logits_width: int, classes: int, *, data: str = "the data") -> None:
    """Raise unless a model gives one score for every class.

    Raises:
        DataError: naming both numbers.
    """
    if logits_width != classes:
        raise DataError(
            f"the model gives {logits_width} scores, {data} has {classes} classes; build the model for them"
            f" (--model-arg num_classes={classes}, or as its builder calls that)"
            " or give the data that it was trained on"
        )


def _batches_of(data: Any, batch_size: int) -> tuple[Iterable[Any], int | None]:
    """Something that gives batches, and the number of classes where our own data set knows it."""
    if isinstance(data, ImageSet):
        return make_loader(data, batch_size=batch_size, shuffle=False), len(data.classes)
    if isinstance(data, DataLoader):
        return data, len(data.dataset.classes) if isinstance(data.dataset, ImageSet) else None
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size), None
    if isinstance(data, DataSplits):
        raise DataError("evaluate takes one split, such as data.test, not all of them")
    if not isinstance(data, Iterable):
        raise DataError(f"cannot evaluate on an object of type {type(data).__name__}; expected a DataLoader")
    return data, None


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of a stream
        return None


def _unpack(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(f"a batch must be (images, labels), not an object of type {type(batch).__name__}")
    images, labels = (torch.as_tensor(part) for part in batch)
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise DataError(
            f"labels must be one class number for each of the images {tuple(images.shape)},"
            f" not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return images, labels.cpu()


def _answers(who: str, score: Scorer, images: Tensor, labels: Tensor, classes: int | None) -> Tensor:
    """The number of the highest score of each image, on the CPU; -1 where a score is not a number."""
    try:
        logits = score(images)
    except (RuntimeError, AssertionError) as error:  # timm asserts its input size
        shape = "x".join(map(str, images.shape[1:]))
        raise ModelError(f"{who} cannot take images of {shape} ({images.dtype}): {one_line(error)}") from error
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ModelError(
            f"{who} answers {len(labels)} images with shape {tuple(logits.shape)}; expected one row of class"
            " scores for each image"
        )
    if classes is not None:
        check_head(logits.shape[1], classes)
    elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise DataError(
            f"{who} gives {logits.shape[1]} scores, the labels run from {int(labels.min())} to"
            f" {int(labels.max())}; build it for at least {int(labels.max()) + 1} classes, numbered from 0"
        )
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1).cpu()


def _matches(answers: Tensor, expected: Tensor) -> int:
    return int(((answers == expected) & (answers >= 0)).sum())


@contextlib.contextmanager
def _scoring(model: Any, device: torch.device | str | None) -> Iterator[Scorer]:
    """A function from images to logits, of a model that is put into eval mode meanwhile."""
    if isinstance(model, str | Path):
        model = _open_session(Path(model))
    model, _ = unwrap(model)
    if isinstance(model, nn.Module):
        with _evaluating(model, device) as score:
            yield score
    elif hasattr(model, "get_inputs") and hasattr(model, "run"):
        yield _session_scorer(model)
    elif callable(model):
        with torch.no_grad():
            yield lambda images: logits_of(model(images))
    else:
        raise ModelError(f"cannot evaluate an object of type {type(model).__name__}; expected a module")


@contextlib.contextmanager
def _evaluating(module: nn.Module, device: torch.device | str | None) -> Iterator[Scorer]:
    weights = [*module.parameters(), *module.buffers()]
    floats = next((weight.dtype for weight in weights if weight.is_floating_point()), None)
    home = weights[0].device if weights else torch.device("cpu")
    target = home if device is None else torch.device(device)
    if target.type != home.type or target.index not in (None, home.index):
        module = copy_module(module).to(target)

    def score(images: Tensor) -> Tensor:
        # a whole-number batch is left alone: some networks embed or normalise pixels themselves
        dtype = floats if images.is_floating_point() else None
        return logits_of(module(images.to(target, dtype)))

    modes = [(each, each.training) for each in module.modules()]
    try:
        with contextlib.suppress(NotImplementedError):  # a program of torch.export stays in the mode of its export
            module.eval()
        # no_grad and not inference_mode: a network that caches a tensor in forward must stay trainable
        with torch.no_grad():
            yield score
    finally:
        for each, training in modes:
            each.training = training


def _open_session(path: Path) -> Any:
    if path.suffix != ".onnx":
        raise ModelError(f"cannot evaluate {path}: only .onnx files run as they are; load() other models first")
    if not path.is_file():
        raise ModelError(f"{path} does not exist; export() writes an ONNX file")
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no root
        raise ModelError(f"{path} cannot be opened by onnxruntime: {one_line(error)}") from error


def _session_scorer(session: Any) -> Scorer:
    """Run an onnxruntime session, in chunks of its batch size where that is fixed, the last one padded."""
    entry = session.get_inputs()[0]
    dtype = _ONNX_FLOATS.get(entry.type, torch.float32)
    fixed = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) else None

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {entry.name: images.numpy()})[0])
        except Exception as error:  # onnxruntime's own exceptions share no root
            expected = "x".join(map(str, entry.shape))
            raise ModelError(
                f"the ONNX model takes {expected}, and failed on {'x'.join(map(str, images.shape))}: {one_line(error)}"
            ) from error

    def score(images: Tensor) -> Tensor:
        images = images.detach().cpu().to(dtype).contiguous()
        if fixed is None:
            return run(images)
        rows = [run(_padded(chunk, fixed))[: len(chunk)] for chunk in torch.split(images, fixed)]
        return torch.cat(rows)

    return score


def _padded(images: Tensor, count: int) -> Tensor:
    missing = count - len(images)
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images


def float_leaves(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a model answers: the logits first, where they can be told."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    try:
        first = logits_of(output)
    except ModelError:
        return leaves
    known = [first] if first.is_floating_point() else []
    return known + [leaf for leaf in leaves if leaf is not first]
