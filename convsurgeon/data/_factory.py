"""Data of the user's own: a function that is named `package.module:factory`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from convsurgeon.data._images import ImageSet
from convsurgeon.data._splits import DataSplits, Images
from convsurgeon.errors import DataError, one_line

_BATCH_SIZE = 128
_EXPECTED = "DataSplits, or a tuple (train, val) or (train, val, test) of DataLoaders or Datasets"


def load_from_factory(name: str) -> DataSplits:
    """Call the factory without arguments and make splits of what it returns.

    A tuple's Datasets that are no `ImageSet` go into DataLoaders of 128 images, the training one shuffled.

    Raises:
        DataError: if it cannot be imported or called, or returns something else.
    """
    made = _call(name)
    if isinstance(made, DataSplits):
        return made
    if not isinstance(made, tuple | list) or len(made) not in (2, 3):
        raise DataError(f"{name} returned {_kind(made)}; expected {_EXPECTED}")
    parts = ("train", "val", "test")[: len(made)]
    train, val, *test = [_images(f"{name} ({part})", each, part) for part, each in zip(parts, made, strict=True)]
    if train is None:
        raise DataError(f"{name} returned None in place of the training data; expected {_EXPECTED}")
    return DataSplits(
        name=name,
        train=train,
        val=val,
        test=test[0] if test else None,
        classes=_classes(train),
        preprocessing=train.preprocessing if isinstance(train, ImageSet) else None,
        flip=False,
    )


def _call(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise DataError(f"data {name!r}: {module_name} cannot be imported: {one_line(error)}") from error
    factory: Any = module
    for part in attribute.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        found = "has no" if factory is None else "has no function"
        raise DataError(f"data {name!r}: {module_name} {found} {attribute!r}; expected a function without arguments")
    try:
        return factory()
    except Exception as error:
        raise DataError(f"data {name!r}: the factory failed: {one_line(error)}") from error


def _images(what: str, part: Any, split: str) -> Images | None:
    if part is None or isinstance(part, ImageSet | DataLoader):
        return part
    if not isinstance(part, Dataset):
        raise DataError(f"{what} is {_kind(part)}; expected a DataLoader or a Dataset")
    generator = torch.Generator().manual_seed(0)
    if isinstance(part, IterableDataset):
        return DataLoader(part, batch_size=_BATCH_SIZE, generator=generator)
    _check_sample(what, part)
    return DataLoader(part, batch_size=_BATCH_SIZE, shuffle=split == "train", generator=generator)


def _check_sample(what: str, part: Dataset[Any]) -> None:
    try:
        image, _label = part[0]
    except Exception as error:
        raise DataError(f"{what} gives no (image, label) for index 0: {one_line(error)}") from error
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
        raise DataError(
            f"{what} gives {_kind(image)} as an image; expected a float tensor (C, H, W): add a transform, or"
            " return a convsurgeon.data.ImageSet"
        )


def _classes(images: Images) -> tuple[str, ...]:
    if isinstance(images, ImageSet):
        return images.classes
    return tuple(str(name) for name in getattr(images.dataset, "classes", ()))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"
