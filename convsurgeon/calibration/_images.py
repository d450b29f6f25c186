"""The images of a calibration: taken out of whatever holds them, and divided into fitted and held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from convsurgeon.data import ImageSet, make_loader
from convsurgeon.errors import DataError

_FEWEST = 10
_HELD_OUT = 5
_BATCH, _NUMBERS = 128, 1 << 20


@dataclass(frozen=True)
class CalibrationImages:
    """Images to fit on, and a fifth of them to look at only.

    Args:
        fitted: `(N, ...)`.
        held: `(M, ...)`.
        labels: what came beside the images, in no order; they only tell what kind of outputs the network has.
        class_names: how many classes the images' data set has; 0 if unknown.
    """

    fitted: Tensor
    held: Tensor
    labels: Tensor | None = None
    class_names: int = 0

    def like(self, network: nn.Module) -> CalibrationImages:
        """Return the images in the float type and on the device of a network's first parameter."""
        first = next((p for p in network.parameters() if p.is_floating_point()), self.fitted)
        fitted, held = (images.detach().to(first.device, first.dtype) for images in (self.fitted, self.held))
        return replace(self, fitted=fitted, held=held)

    def batches(self, *, held: bool = False) -> Iterator[Tensor]:
        """Yield copies of up to 128 images, fewer where they are large, but of two at least.

        Copies, since some networks prepare their input in place.
        """
        images = self.held if held else self.fitted
        per_image = max(1, images[0].numel() // max(1, images.shape[1] if images.dim() > 2 else 1))
        count, size = len(images), max(2, min(_BATCH, _NUMBERS // per_image))
        sizes = [size] * (count // size) + [count % size] * (count % size > 0)
        if len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [size + 1]
        yield from (batch.clone() for batch in torch.split(images, sizes))


def gather(images: Any, *, limit: int, seed: int) -> CalibrationImages:
    """Take up to `limit` images, in a random order where all can be seen, and hold every fifth out.

    Args:
        images: a tensor `(N, ...)`, an `ImageSet` or another dataset, or an iterable of batches, such as a
            DataLoader; labels beside the images are not learned from.

    Raises:
        DataError: if there are fewer than ten, or something else than float images of one shape.
    """
    if not isinstance(limit, int) or limit < _FEWEST:
        raise DataError(
            f"limit, the number of calibration images, must be a whole number from {_FEWEST}, got {limit!r}"
        )
    labels: list[Any] = []
    found = _taken(images, limit, torch.Generator().manual_seed(seed), labels)
    refuse_few(len(found))
    if not bool(found.isfinite().all()):
        raise DataError("the calibration images hold NaN or infinite numbers; mend them")
    held = torch.zeros(len(found), dtype=torch.bool)
    held[::_HELD_OUT] = True
    classes = len(images.classes) if isinstance(images, ImageSet) else 0
    return CalibrationImages(found[~held], found[held], _joined_labels(labels), classes)


def refuse_few(count: int) -> None:
    """Raise a `DataError` for fewer images than a calibration needs."""
    if count < _FEWEST:
        raise DataError(f"calibration needs at least {_FEWEST} images, got {count}; give more")


def _taken(images: Any, limit: int, generator: torch.Generator, labels: list[Any]) -> Tensor:
    """Return the images, and put what came beside them into `labels`."""
    if isinstance(images, Tensor):
        _check(images)
        return images[torch.randperm(len(images), generator=generator)[:limit].sort().values]
    if isinstance(images, ImageSet):
        chosen = torch.randperm(len(images), generator=generator)[:limit].sort().values
        return torch.cat(list(_of_batches(make_loader(images.subset(chosen), batch_size=_BATCH, shuffle=False), [])))
    if isinstance(images, Dataset) and not isinstance(images, IterableDataset):
        try:
            count = len(images)  # type: ignore[arg-type]
        except TypeError as error:
            raise DataError("a dataset of calibration images must have a length, or be an IterableDataset") from error
        order = torch.randperm(count, generator=generator)[:limit].sort().values.tolist()
        return _joined(list(_of_samples((images[index] for index in order), labels, may_be_batches=False)))
    if not isinstance(images, Iterable):
        raise DataError(f"calibration images must be a tensor, a dataset or batches, got {type(images).__name__}")
    taken: list[Tensor] = []
    # a dataset gives samples, or batches itself; whatever else is iterated gives batches
    stream = isinstance(images, IterableDataset)
    batches = _of_samples(images, labels, may_be_batches=True) if stream else _of_batches(images, labels)
    for batch in batches:
        taken.append(batch)
        if sum(map(len, taken)) >= limit:
            break
    return _joined(taken)[:limit]


def _of_batches(batches: Iterable[Any], labels: list[Any]) -> Iterator[Tensor]:
    for batch in batches:
        images = _image_of(batch)
        labels.append(_label_of(batch))
        _check(images)
        yield images


def _of_samples(samples: Iterable[Any], labels: list[Any], *, may_be_batches: bool) -> Iterator[Tensor]:
    """Yield samples as batches of one; what has four dimensions may be a batch already."""
    for sample in samples:
        image = _image_of(sample)
        batched = may_be_batches and image.dim() > 3
        images = image if batched else image[None]
        labels.append(_label_of(sample) if batched else _one(_label_of(sample)))
        _check(images)
        yield images


def _image_of(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor):
        raise DataError(f"a batch of calibration images must be a tensor, got {type(images).__name__}")
    return images


def _label_of(batch: Any) -> Any:
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None


def _one(label: Any) -> Tensor | None:
    numbers = isinstance(label, int | float | Tensor | np.ndarray | np.generic)
    return torch.as_tensor(label)[None] if numbers else None


def _joined_labels(labels: list[Any]) -> Tensor | None:
    """Return the labels of all batches as one tensor, or None where they are something else than one tensor each."""
    alike = {(each.dtype, each.shape[1:]) if isinstance(each, Tensor) and each.dim() else None for each in labels}
    return torch.cat(labels).cpu() if len(alike) == 1 and None not in alike else None


def _check(images: Tensor) -> None:
    if not images.is_floating_point() or images.dim() < 2:
        raise DataError(
            f"calibration images must be a float batch, prepared as the network takes it, got {images.dtype} of "
            f"shape {tuple(images.shape)}"
        )


def _joined(parts: list[Tensor]) -> Tensor:
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise DataError(f"calibration images must have one shape, got {one} and {other}")
    return torch.cat(parts) if parts else torch.zeros(0)
