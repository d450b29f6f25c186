"""Labelled pictures, kept as uint8 and given out as normalised float batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convsurgeon.errors import DataError, OptionError, one_line
from convsurgeon.preprocessing import Preprocessing

MEMORY = 10**9
"""How many bytes of fitted pixels one data set keeps in memory."""

_CHUNK = 1024  # pictures resized at a time


class Pictures(Protocol):
    """A numbered collection of pictures that are fitted to one preprocessing."""

    def __len__(self) -> int:
        """How many there are."""

    def pixels(self, indices: Tensor) -> Tensor:
        """Return those pictures as uint8 `(B, C, H, W)`."""


class TensorPictures:
    """Pictures in memory, fitted once, or on every access where `keep` is false."""

    def __init__(self, images: Tensor, preprocessing: Preprocessing, *, keep: bool = True) -> None:
        if images.ndim == 3:
            images = images[:, None]
        self._preprocessing, self._kept = preprocessing, keep
        self._images = self._fitted(images) if keep else images

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, indices: Tensor) -> Tensor:
        """Return those pictures as uint8 `(B, C, H, W)`."""
        chosen = self._images[indices]
        return chosen if self._kept else self._preprocessing.fit(chosen)

    def _fitted(self, images: Tensor) -> Tensor:
        return torch.cat([self._preprocessing.fit(chunk) for chunk in torch.split(images, _CHUNK)])


class FilePictures:
    """Picture files, decoded when they are asked for, and remembered where `keep` is true."""

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing, *, keep: bool) -> None:
        self._paths = list(paths)
        self._preprocessing = preprocessing
        # untouched pages of a fresh tensor cost no memory: the cache grows as pictures are read
        count = len(self._paths) if keep else 0
        self._cache = torch.empty((count, preprocessing.channels, *preprocessing.size), dtype=torch.uint8)
        self._cached = torch.zeros(count, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self._paths)

    def pixels(self, indices: Tensor) -> Tensor:
        """Return those pictures as uint8 `(B, C, H, W)`.

        Raises:
            DataError: naming the first file that cannot be decoded.
        """
        if not len(self._cached):
            return torch.stack([self._decode(index) for index in indices.tolist()])
        for index in indices[~self._cached[indices]].tolist():
            self._cache[index] = self._decode(index)
            self._cached[index] = True
        return self._cache[indices]

    def _decode(self, index: int) -> Tensor:
        from PIL import Image

        path = self._paths[index]
        try:
            with Image.open(path) as image:
                return self._preprocessing.fit(image)
        except Exception as error:  # decoders raise whatever their format's parser raises
            raise DataError(f"{path} cannot be decoded: {one_line(error)}; repair or remove it") from error


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Labelled pictures, ready for one network's input.

    `images[i]` is one float32 `(C, H, W)` and its label. `make_loader` goes through `__getitems__`, which
    makes a whole batch at once; a hand-made `DataLoader` therefore needs `collate_fn=lambda batch: batch`.

    Args:
        pictures: uint8 `(N, C, H, W)` or `(N, H, W)`, or another `Pictures`.
        labels: class numbers, one for each picture.

    Raises:
        DataError: if it is empty, or labels and pictures or classes do not go together.
    """

    def __init__(
        self,
        pictures: Tensor | Pictures,
        labels: Tensor | Sequence[int],
        *,
        classes: Sequence[str],
        preprocessing: Preprocessing,
    ) -> None:
        if not len(pictures):
            raise DataError("a data set needs at least one image, got none")
        if isinstance(pictures, Tensor):
            keep = len(pictures) * bytes_each(preprocessing) <= MEMORY
            pictures = TensorPictures(pictures, preprocessing, keep=keep)
        labels = torch.as_tensor(labels, dtype=torch.int64)
        if labels.shape != (len(pictures),):
            raise DataError(f"{len(pictures)} images need as many labels, got shape {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but there are {len(classes)} classes"
            )
        self._pictures: Pictures = pictures
        self._positions = torch.arange(len(pictures))
        self.labels = labels
        self.classes = tuple(classes)
        self.preprocessing = preprocessing

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """Return the images of those numbers, in that order; the pixels are shared, not copied."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        chosen = ImageSet.__new__(ImageSet)
        chosen.__dict__.update(self.__dict__)
        chosen._positions = self._positions[indices]
        chosen.labels = self.labels[indices]
        return chosen

    def pixels(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return fitted uint8 `(B, C, H, W)`, before mean and standard deviation."""
        return self._pictures.pixels(self._positions[torch.as_tensor(indices, dtype=torch.int64)])

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch: float32 `(B, C, H, W)` and int64 `(B,)`."""
        return self.preprocessing.normalize(self.pixels(indices)), self.labels[list(indices)]

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images, {len(self.classes)} classes, {self.preprocessing})"


def bytes_each(preprocessing: Preprocessing) -> int:
    """Return the bytes of one fitted picture."""
    return preprocessing.channels * preprocessing.size[0] * preprocessing.size[1]


def make_loader(
    images: ImageSet,
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """Return a plain DataLoader over `images` that never draws from the global random state.

    Args:
        generator: what a shuffling loader draws its order from; a new one with seed 0 where none is given.

    Raises:
        OptionError: if `batch_size` is not positive.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, not {batch_size}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return DataLoader(
        images,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        collate_fn=_as_it_is,
        generator=generator,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
