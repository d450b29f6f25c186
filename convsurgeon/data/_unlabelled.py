"""Images without labels: a folder of pictures, or the training part of a data set."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from convsurgeon.data._catalog import expect_preprocessing, expect_source, load_data, names
from convsurgeon.data._images import MEMORY, FilePictures, ImageSet, bytes_each
from convsurgeon.data._splits import TEST_SEED, Images
from convsurgeon.errors import DataError
from convsurgeon.preprocessing import Preprocessing


def load_images(
    source: str, *, root: str | Path | None = None, preprocessing: Preprocessing | None = None, seed: int = 0
) -> tuple[Images, bool]:
    """Return the images of a folder, or the training images of a data set, and whether they may be mirrored.

    A folder's pictures are taken from wherever in it they lie, in a fixed random order, all with label 0.

    Args:
        source: the path of a folder, or what `load_data` takes.
        root: where downloaded sets lie.
        preprocessing: what the pictures are fitted to; a folder's must be given.
        seed: what the validation images of a data set are drawn with; they are left out.

    Raises:
        DataError: if there are no pictures, or the data set is missing.
        UnknownNameError: if there is neither such a folder nor such a set.
        OptionError: if a folder comes without preprocessing.
    """
    folder = Path(source).expanduser()
    if not is_folder(source):
        splits = load_data(source, root=root, preprocessing=preprocessing, seed=seed)
        return splits.train, splits.flip
    expect_images(source)
    wanted = expect_preprocessing(source, preprocessing)
    paths = _pictures_in(folder)
    keep = len(paths) * bytes_each(wanted) <= MEMORY
    pictures = FilePictures(paths, wanted, keep=keep)
    return ImageSet(pictures, torch.zeros(len(paths)), classes=("unlabelled",), preprocessing=wanted), True


def expect_images(source: str) -> None:
    """Raise for a source of images that is neither a folder nor a data set.

    Raises:
        DataError: if there is no such folder.
        UnknownNameError: if there is no such set.
    """
    if not is_folder(source):
        expect_source(source)
    elif not Path(source).expanduser().is_dir():
        raise DataError(f"{source} is no folder; give a folder of images, or a data set: {', '.join(names())}")


def is_folder(source: str) -> bool:
    """Whether a source of images is meant as the path of a folder, be it there or not, and not as a name."""
    written_as_path = os.sep in source.split(":", 1)[0] or source.startswith((".", "~"))
    return written_as_path or Path(source).expanduser().is_dir()


def _pictures_in(folder: Path) -> list[str]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: list[str] = []

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to where we were
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        pictures = [name for name in sorted(files) if name.lower().endswith(IMG_EXTENSIONS) and name[0] != "."]
        found.extend(os.path.join(place, name) for name in pictures)
    if not found:
        raise DataError(f"{folder} has no pictures ({' '.join(IMG_EXTENSIONS)}), nor do the folders in it")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(TEST_SEED)).tolist()
    return [found[index] for index in order]
