"""A folder of pictures, one subfolder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from convsurgeon.data._images import MEMORY, FilePictures, ImageSet, bytes_each
from convsurgeon.data._splits import TEST_SEED, DataSplits, hold_out, hold_out_validation
from convsurgeon.errors import DataError
from convsurgeon.preprocessing import Preprocessing

_VALIDATION = ("val", "valid", "validation")
_FLAT_TEST_FRACTION = 0.1


@dataclass(frozen=True)
class _Listing:
    """The picture files of one folder with their class numbers, in a fixed random order."""

    folder: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]

    def images(self, preprocessing: Preprocessing, *, keep: bool) -> ImageSet:
        pictures = FilePictures(self.paths, preprocessing, keep=keep)
        return ImageSet(pictures, self.labels, classes=self.classes, preprocessing=preprocessing)


def load_folder(folder: Path, *, name: str, preprocessing: Preprocessing, val_fraction: float, seed: int) -> DataSplits:
    """Read `train`, `test` and `val` inside `folder`, or divide its class folders 80/10/10.

    Without a `test` folder `val` is the test split, and the validation images come out of `train`.

    Raises:
        DataError: if there are no class folders, or empty ones, or the splits' classes differ.
    """
    expect_folder(folder, name=name)
    if _has_splits(folder):
        train, val, test = _given_splits(folder, preprocessing, val_fraction, seed)
    else:
        train, val, test = _made_splits(folder, preprocessing, val_fraction, seed)
    return DataSplits(name, train, val, test, train.classes, preprocessing, flip=True)


def expect_folder(folder: Path, *, name: str) -> None:
    """Raise a `DataError` if there is no such folder."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{name}: {folder} {what}; give a folder with one subfolder for each class")


def _has_splits(folder: Path) -> bool:
    """Whether `train` is a split: it has class folders; else it may be a class, of vehicles."""
    inside = _subfolders(folder)
    if "train" not in inside:
        return False
    return bool(_subfolders(folder / "train")) or set(inside) <= {"train", "test", *_VALIDATION}


def _given_splits(
    folder: Path, preprocessing: Preprocessing, val_fraction: float, seed: int
) -> tuple[ImageSet, ImageSet | None, ImageSet]:
    inside = _subfolders(folder)
    validation = next((name for name in _VALIDATION if name in inside), None)
    if "test" not in inside and validation is None:
        raise DataError(f"{folder} has 'train', but neither 'test' nor 'val'; add one of them")
    chosen = [name for name in ("train", validation, "test") if name is not None and name in inside]
    listings = [_list_pictures(folder / name) for name in chosen]
    for other in listings[1:]:
        _check_same_classes(listings[0], other)
    keep = sum(len(listing.paths) for listing in listings) * bytes_each(preprocessing) <= MEMORY
    train, *others = [listing.images(preprocessing, keep=keep) for listing in listings]
    if len(others) == 2:
        return train, others[0], others[1]
    stay, held = hold_out_validation(train, val_fraction=val_fraction, seed=seed, what=str(folder / "train"))
    return stay, held, others[0]


def _made_splits(
    folder: Path, preprocessing: Preprocessing, val_fraction: float, seed: int
) -> tuple[ImageSet, ImageSet | None, ImageSet]:
    listing = _list_pictures(folder)
    total = len(listing.paths)
    images = listing.images(preprocessing, keep=total * bytes_each(preprocessing) <= MEMORY)
    count = round(_FLAT_TEST_FRACTION * total)
    stay, held = hold_out(images.labels, count=count, seed=TEST_SEED, what=f"test split of {folder}")
    train, val = hold_out_validation(
        images.subset(stay), val_fraction=val_fraction, seed=seed, what=str(folder), of=total
    )
    return train, val, images.subset(held)


def _list_pictures(folder: Path) -> _Listing:
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

    def is_picture(path: str) -> bool:
        return not Path(path).name.startswith(".") and bool(has_file_allowed_extension(path, IMG_EXTENSIONS))

    classes = _subfolders(folder)
    if not classes:
        raise DataError(f"{folder} has no class folders; put each class's pictures into a subfolder of its own")
    numbers = {name: number for number, name in enumerate(classes)}
    found = make_dataset(folder, numbers, is_valid_file=is_picture, allow_empty=True)
    empty = set(classes) - {classes[number] for _, number in found}
    if empty:
        raise DataError(
            f"{folder} has no pictures of class {_quoted(sorted(empty))};"
            f" add some ({' '.join(IMG_EXTENSIONS)}) or remove the folder"
        )
    # the first batches shall hold all classes, also where nobody shuffles
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(TEST_SEED)).tolist()
    return _Listing(folder, tuple(classes), [found[i][0] for i in order], [found[i][1] for i in order])


def _check_same_classes(train: _Listing, other: _Listing) -> None:
    missing = [name for name in train.classes if name not in other.classes]
    extra = [name for name in other.classes if name not in train.classes]
    if missing or extra:
        parts = [f"{other.folder} lacks {_quoted(missing)}"] if missing else []
        parts += [f"{train.folder} lacks {_quoted(extra)}"] if extra else []
        raise DataError(f"the splits differ in their classes: {', and '.join(parts)}; give both the same folders")


def _subfolders(folder: Path) -> list[str]:
    try:
        inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    return [name for name in inside if not name.startswith((".", "__"))]


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
