"""The proof that a file equals its student: the same inputs through onnxruntime and PyTorch.

Deep networks with odd weights magnify the rounding of float32, until PyTorch differs from itself by more than the
tolerance when it adds in another order. So where the two differ by more, both are compared with PyTorch in float64:
a file that is as near to it as PyTorch in float32 is computes the same function.
"""

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
from convsurgeon.surgery import copy_module

_BATCHES = (1, 3)
_MOST_IMAGES = 64
_LARGEST_BATCH = 16
_SEED = 20190913
# times PyTorch's own rounding: onnxruntime's was .7 to 1.3 of it in deep random networks, and its sigmoid rounds more
_AS_NEAR = 4.0
_MOST_ROUNDING = 100.0  # times the tolerance; beyond, rounding excuses nothing


_Worst = tuple[float, float, float]  # absolute and relative difference, rounding


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime was from PyTorch, at worst over all outputs and batches.

    Args:
        max_abs: the largest absolute difference.
        max_rel: the largest difference over the largest absolute value of the same output.
        batches: the batch sizes that were tried.
        real_images: whether images were among the inputs; False means random inputs only.
        tolerance: what `max_rel` was allowed to be.
        rounding: where `max_rel` is above the tolerance, how far PyTorch in float32 was from itself in float64,
            in the same unit; the file was no farther than four times that. Else 0.
    """

    max_abs: float
    max_rel: float
    batches: tuple[int, ...]
    real_images: bool
    tolerance: float
    rounding: float = 0.0


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
    worst = (0.0, 0.0, 0.0)
    batches = set()
    for trial in trials(inputs, images):
        worst = _worse(worst, _compare(model, session, trial, tolerance))
        batches.add(trial.batch)
    absolute, relative, rounding = worst
    return Parity(absolute, relative, tuple(sorted(batches)), images is not None, tolerance, rounding)


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


def trials(inputs: Inputs, images: Tensor | None) -> Iterator[Trial]:
    """Yield what both are run on: random inputs of two batch sizes, then the images where given.

    Raises:
        DataError: if the images do not fit the example.
    """
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


def _compare(model: nn.Module, session: onnxruntime.InferenceSession, trial: Trial, tolerance: float) -> _Worst:
    """Return the largest absolute and relative difference of one trial, and the rounding that excused it."""
    expected = named_outputs(model(*trial.inputs.args, **trial.inputs.kwargs))
    actual = _run(session, trial)
    if len(actual) != len(expected):
        raise ExportError(f"the file has {len(actual)} outputs, PyTorch returns {len(expected)}")
    where = f"for a batch of {trial.batch} ({trial.kind})"
    worst = (0.0, 0.0, 0.0)
    for index, ((name, ours), theirs) in enumerate(zip(expected, actual, strict=True)):
        absolute, relative = _difference(ours, theirs, name=name, where=where)
        rounding = 0.0
        if relative > tolerance:
            limit = _MOST_ROUNDING * tolerance
            rounding, distance = _against_float64(model, trial, index, theirs) if relative <= limit else (0.0, relative)
            if not distance <= min(_AS_NEAR * rounding, limit):
                raise ParityError(
                    f"output {name!r} {where}: onnxruntime differs from PyTorch by {absolute:.3g}, "
                    f"{relative:.3g} of the largest output, expected at most {tolerance:.3g}; no file was written"
                )
        worst = _worse(worst, (absolute, relative, rounding))
    return worst


def _worse(one: _Worst, other: _Worst) -> _Worst:
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])


def _against_float64(model: nn.Module, trial: Trial, index: int, theirs: Tensor) -> tuple[float, float]:
    """Return how far one output is from float64, as a part of the largest: PyTorch's at worst, and onnxruntime's.

    PyTorch may be lucky with one input, so it is asked for the same inputs again and again, each a millionth off.
    Where the network does not run in float64, both are 0 and infinity.
    """
    generator = torch.Generator().manual_seed(_SEED)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + 1e-6 * torch.randn(tensor.shape, generator=generator))

    nearby = trial.inputs.resized(_LARGEST_BATCH).map(moved)
    wide = copy_module(model).double()
    try:
        exact, exact_nearby = (_output(wide, _widened(inputs), index) for inputs in (trial.inputs, nearby))
    except Exception:  # a forward that makes a constant in float32 raises whatever it likes
        return 0.0, float("inf")
    return _distance(_output(model, nearby, index), exact_nearby), _distance(theirs, exact)


def _widened(inputs: Inputs) -> Inputs:
    return inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _output(model: nn.Module, inputs: Inputs, index: int) -> Tensor:
    return named_outputs(model(*inputs.args, **inputs.kwargs))[index][1].double()


def _distance(output: Tensor, exact: Tensor) -> float:
    """Return the largest difference as a part of the largest exact value."""
    return float((output.double() - exact).abs().max() / exact.abs().max())


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
