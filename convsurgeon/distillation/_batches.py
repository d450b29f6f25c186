"""The training data as batches, checked against the networks, and the random state of every step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convsurgeon.data import ImageSet, make_loader
from convsurgeon.distillation import methods
from convsurgeon.distillation._config import Training
from convsurgeon.errors import DataError, DistillationError, one_line
from convsurgeon.evaluation import check_head, float_leaves, logits_of
from convsurgeon.options import parse_options
from convsurgeon.outputs import Answers, Outputs, has_classes, look_at_outputs, why_not
from convsurgeon.surgery import copy_module, in_mode

_LOOKED_AT, _JUDGED = 8, 64
_NO_LENGTH = "train must have a length, so that the schedule knows its end"
_NO_BATCH = "train has no batch; give more images or a smaller batch size"


def as_loader(train: Any, config: Training) -> DataLoader[Any]:
    if isinstance(train, ImageSet):
        whole = len(train) >= config.batch_size
        return make_loader(train, batch_size=config.batch_size, shuffle=True, drop_last=whole)
    if isinstance(train, DataLoader):
        return train
    if isinstance(train, Dataset):
        return _loader_of(train, config.batch_size)
    raise DataError(f"train must be a DataLoader or a Dataset, got {type(train).__name__}")


def _loader_of(train: Dataset[Any], batch_size: int) -> DataLoader[Any]:
    try:
        length = len(train)  # type: ignore[arg-type]
    except TypeError as error:
        raise DataError(_NO_LENGTH) from error
    if length == 0:
        raise DataError(_NO_BATCH)
    # a last batch of one image would fail in a batch norm
    whole = length >= batch_size
    return DataLoader(train, batch_size=batch_size, shuffle=True, drop_last=whole, generator=torch.Generator())


class Sample(NamedTuple):
    """One batch of images `(B, ...)`, how many scores the student gives (0: no scores), and what its outputs are."""

    images: Tensor
    classes: int
    outputs: Outputs


def first_batch(loader: DataLoader[Any], student: nn.Module, teacher: nn.Module | None, config: Training) -> Sample:
    """Return one batch of images and what the student gives for them, checked to go together.

    Raises:
        DataError: if data and networks do not fit.
        DistillationError: if teacher and student do not.
    """
    try:
        length = len(loader)
    except TypeError as error:
        raise DataError(_NO_LENGTH) from error
    if length == 0:
        raise DataError(_NO_BATCH)
    seed_all(config.seed, 0, -2)
    batch = next(iter(loader))
    if not methods.get(config.method).needs_labels:
        return _first_images(batch, student, teacher, loader=loader, config=config)
    images, labels = pair(batch)
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise DataError(
            f"the training labels must be one class number for each image, not {labels.dtype} "
            f"of shape {tuple(labels.shape)} for {len(images)} images; method imitate learns without labels"
        )
    width = _width(student, images, "student")
    if teacher is not None and (other := _width(teacher, images, "teacher")) != width:
        raise DistillationError(
            f"the teacher gives {other} scores, the student {width}; both must know the same classes"
        )
    if isinstance(loader.dataset, ImageSet):
        check_head(width, len(loader.dataset.classes), data="the training data")
    else:
        check_labels(labels, width)
    return Sample(images.cpu(), width, Outputs("scores", "the images have labels"))


def _first_images(
    batch: Any, student: nn.Module, teacher: nn.Module | None, *, loader: DataLoader[Any], config: Training
) -> Sample:
    images = images_of(batch).cpu()
    answers = [_answers(each, images, who) for each, who in ((student, "student"), (teacher, "teacher")) if each]
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in answers]
    if shapes[0] != shapes[-1] or not shapes[0]:
        raise DistillationError(
            f"the student answers with float tensors of shapes {shapes[0]}, the teacher with {shapes[-1]}; "
            "expected the same, and at least one"
        )
    outputs = _kind(teacher or student, images, batch, loader=loader, config=config)
    return Sample(images, answers[-1][0].shape[1] if has_classes(outputs.kind) else 0, outputs)


def _kind(network: nn.Module, images: Tensor, batch: Any, *, loader: DataLoader[Any], config: Training) -> Outputs:
    """What the first output is, by what the method's options say, or else by the evidence."""
    method = methods.get(config.method)
    options = parse_options(method.Options, config.method_options, owner=method.name)
    probe = in_mode(copy_module(network).cpu(), training=False)
    with torch.no_grad():
        output = _first_leaf(probe(images[:_JUDGED].clone()))
    said: Answers = getattr(options, "answers", "auto")
    if reason := why_not(said, output):
        raise DistillationError(f"{method.name}: {reason}; say answers=values")
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    known = isinstance(loader.dataset, ImageSet)
    return look_at_outputs(
        probe,
        images,
        output,
        first=_first_leaf,
        said=said,
        labels=labels if isinstance(labels, Tensor) and len(labels) == len(images) else None,
        class_names=len(loader.dataset.classes) if known else 0,  # type: ignore[attr-defined]
    )


def _first_leaf(answer: Any) -> Tensor:
    return float_leaves(answer)[0]


def check_labels(labels: Tensor, width: int) -> None:
    """Raise a `DataError` that names both numbers, if a label has no score."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= width:
        raise DataError(
            f"the student gives {width} scores, the training labels run from {lowest} to {highest}; "
            f"they must be class numbers from 0 to {width - 1}"
        )


def _answer(network: nn.Module, images: Tensor, who: str) -> Any:
    probe = in_mode(copy_module(network).cpu(), training=False)
    try:
        with torch.no_grad():
            return probe(images[:_LOOKED_AT].cpu())
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = "x".join(str(size) for size in images.shape[1:])
        raise DataError(f"the {who} cannot take the training images of {shape}: {one_line(error)}") from error


def _answers(network: nn.Module, images: Tensor, who: str) -> list[Tensor]:
    return float_leaves(_answer(network, images, who))


def _width(network: nn.Module, images: Tensor, who: str) -> int:
    logits = logits_of(_answer(network, images, who))
    if logits.dim() != 2:
        raise DataError(
            f"the {who} answers with shape {tuple(logits.shape)}; expected a row of class scores an image; "
            "method imitate learns without labels"
        )
    return int(logits.shape[1])


def pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch):
        return batch[0], batch[1]
    raise DataError(f"a training batch must be (images, labels), got {type(batch).__name__}")


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch that may have labels beside them."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(images, Tensor):
        return images
    raise DataError(f"a training batch must be images or (images, labels), got {type(batch).__name__}")


def seed_all(seed: int, epoch: int, index: int) -> None:
    torch.manual_seed(mix(seed, epoch, index))


def mix(seed: int, epoch: int, index: int) -> int:
    # distinct for up to a million steps an epoch and a thousand epochs
    return (seed * 1_000 + epoch) * 1_000_003 + index + 2


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers draw from."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


@contextlib.contextmanager
def untouched_generators(*loaders: Any) -> Iterator[None]:
    """Put the generators of the caller's loaders back afterwards."""
    before = [(each, each.get_state()) for loader in loaders for each in generators_of(loader)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)
