"""The proof that a file equals its student: the same inputs through onnxruntime and PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convsurgeon.delivery._inputs import Inputs, is_batched
from convsurgeon.errors import DataError, ExportError, ParityError, one_line

_BATCHES = (1, 3)
_MOST_IMAGES = 64
_LARGEST_BATCH = 16
_SEED = 20190913


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime was from PyTorch, at worst over all outputs and batches.

    Args:
        max_abs: the largest absolute difference.
        max_rel: the largest difference over the largest absolute value of the same output.
        batches: the batch sizes that were tried.
        real_images: whether images were among the inputs; False means random inputs only.
        tolerance: what `max_rel` was allowed to be.
    """

    max_abs: float
    max_rel: float
    batches: tuple[int, ...]
    real_images: bool
    tolerance: float


@dataclass(frozen=True)
class Trial:
    """One call to compare on: what its inputs are, in words, its batch size, the inputs."""

    kind: str
    batch: int
    inputs: Inputs


def check_parity(
    model: nn.Module,
    session: onnxruntime.InferenceSession,
    *,
    inputs: Inputs,
    images: Tensor | None,
    tolerance: float,
) -> Parity:
    """Run both on random inputs of two batch sizes, and on the images, and compare every output.

    Raises:
        ParityError: naming the output that differs most, or is not finite.
        DataError: if the images do not fit the model's input.
    """
    worst_abs = worst_rel = 0.0
    batches = set()
    for trial in _trials(inputs, images):
        absolute, relative = _compare(model, session, trial, tolerance)
        worst_abs, worst_rel = max(worst_abs, absolute), max(worst_rel, relative)
        batches.add(trial.batch)
    return Parity(worst_abs, worst_rel, tuple(sorted(batches)), images is not None, tolerance)


def gather_images(images: Tensor | Iterable[Any]) -> Tensor:
    """Return up to 64 images as one batch, from a batch, batches, or pairs of images and labels.

    Raises:
        DataError: if there are none, or they are not batches of floats.
    """
    gathered: list[Tensor] = []
    for batch in [images] if isinstance(images, Tensor) else images:
        batch = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(batch, Tensor) or batch.dim() < 2 or not batch.is_floating_point():
            raise DataError(f"images must be batches of float tensors, preprocessed; got {_describe(batch)}")
        if gathered and batch.shape[1:] != gathered[0].shape[1:]:
            raise DataError(f"images differ in size: {_shape(gathered[0])}, then {_shape(batch)}")
        gathered.append(batch.detach().to("cpu", torch.float32))
        if sum(map(len, gathered)) >= _MOST_IMAGES:
            break
    if not sum(map(len, gathered)):
        raise DataError("images holds no image; leave it out to compare on random inputs only")
    return torch.cat(gathered)[:_MOST_IMAGES]


def named_outputs(outputs: Any) -> list[tuple[str, Tensor]]:
    """Flatten what a network returns: `output`, `output_0`, or the keys of a dict (`out`, `sub_0`)."""
    pairs = []
    for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        if isinstance(leaf, Tensor):
            keys = [_label(key) for key in path]
            named = bool(path) and not isinstance(path[0], pytree.SequenceKey)
            pairs.append(("_".join(keys if named else ["output", *keys]), leaf))
    return pairs


def _label(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return str(key.idx)
    return str(key.key if isinstance(key, pytree.MappingKey) else getattr(key, "name", key))


def _trials(inputs: Inputs, images: Tensor | None) -> Iterator[Trial]:
    generator = torch.Generator().manual_seed(_SEED)
    for batch in _BATCHES:
        yield Trial("random inputs", batch, inputs.random(batch, generator))
    if images is None:
        return
    expected = [tensor for tensor in inputs.tensors if is_batched(tensor)]
    if len(expected) != 1:
        raise DataError(f"images= needs a model of one input, this one takes {len(expected)}; leave it out")
    if images.shape[1:] != expected[0].shape[1:]:
        raise DataError(
            f"the images are {_shape(images)}, the example input is {_shape(expected[0])}; "
            "export one size at a time, or leave images out"
        )
    sizes = (*_BATCHES, *[_LARGEST_BATCH] * (_MOST_IMAGES // _LARGEST_BATCH))
    start = 0
    for size in sizes:
        chunk = images[start : start + size]
        start += size
        if len(chunk):
            yield Trial("real images", len(chunk), _with_images(inputs, chunk))


def _with_images(inputs: Inputs, images: Tensor) -> Inputs:
    return inputs.map(lambda tensor: images)


def _compare(
    model: nn.Module, session: onnxruntime.InferenceSession, trial: Trial, tolerance: float
) -> tuple[float, float]:
    """Return the largest absolute and relative difference of one trial."""
    expected = named_outputs(model(*trial.inputs.args, **trial.inputs.kwargs))
    actual = _run(session, trial)
    if len(actual) != len(expected):
        raise ExportError(f"the file has {len(actual)} outputs, PyTorch returns {len(expected)}")
    where = f"for a batch of {trial.batch} ({trial.kind})"
    worst_abs = worst_rel = 0.0
    for (name, ours), theirs in zip(expected, actual, strict=True):
        absolute, relative = _difference(ours, theirs, name=name, where=where)
        if relative > tolerance:
            raise ParityError(
                f"output {name!r} {where}: onnxruntime differs from PyTorch by {absolute:.3g}, "
                f"{relative:.3g} of the largest output, expected at most {tolerance:.3g}; no file was written"
            )
        worst_abs, worst_rel = max(worst_abs, absolute), max(worst_rel, relative)
    return worst_abs, worst_rel


def _difference(ours: Tensor, theirs: Tensor, *, name: str, where: str) -> tuple[float, float]:
    if ours.shape != theirs.shape:
        raise ParityError(
            f"output {name!r} {where}: onnxruntime gives {_shape(theirs)}, PyTorch {_shape(ours)}; no file was written"
        )
    if not ours.numel():
        return 0.0, 0.0
    ours, theirs = ours.double(), theirs.double()
    for who, tensor in (("PyTorch", ours), ("onnxruntime", theirs)):
        if not tensor.isfinite().all():
            raise ParityError(
                f"output {name!r} {where}: {who} gives NaN or infinity, which proves nothing; "
                "check the weights and batch-norm statistics; no file was written"
            )
    absolute = float((ours - theirs).abs().max())
    largest = float(ours.abs().max())
    if absolute == 0:
        return 0.0, 0.0
    return absolute, absolute / largest if largest else float("inf")


def _run(session: onnxruntime.InferenceSession, trial: Trial) -> Sequence[Tensor]:
    feed = {
        entry.name: tensor.contiguous().numpy()
        for entry, tensor in zip(session.get_inputs(), trial.inputs.tensors, strict=True)
    }
    try:
        return [torch.from_numpy(array) for array in session.run(None, feed)]
    except Exception as error:  # onnxruntime's classes share no base below Exception
        raise ParityError(
            f"onnxruntime cannot run the file on a batch of {trial.batch} ({one_line(error)}); no file was written"
        ) from error


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of {_shape(value)}"
    return f"a {type(value).__name__}"
