"""From a data set's name to its splits."""

from __future__ import annotations

from pathlib import Path

from convsurgeon.data._factory import load_from_factory
from convsurgeon.data._folder import expect_folder, load_folder
from convsurgeon.data._images import MEMORY, ImageSet, TensorPictures, bytes_each
from convsurgeon.data._named import DEFAULT_ROOT, NAMED
from convsurgeon.data._splits import DataSplits, check_fraction, hold_out_validation
from convsurgeon.errors import DataError, OptionError, UnknownNameError
from convsurgeon.preprocessing import Preprocessing

_FOLDER = "imagefolder"
_OTHER_FORMS = (f"{_FOLDER}:DIR", "package.module:factory")


def names() -> list[str]:
    """Return the names that `load_data` knows by heart, sorted."""
    return sorted(NAMED)


def default_preprocessing(name: str) -> Preprocessing | None:
    """Return the natural preprocessing of a named set; None for a folder or a factory, which have none.

    Raises:
        UnknownNameError: if there is no such set.
    """
    if ":" in name:
        return None
    _check_known(name)
    return NAMED[name].preprocessing


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> DataSplits:
    """Load a data set by name: one of `names()`, `imagefolder:DIR`, or `package.module:factory`.

    Nothing is downloaded. The test split does not depend on `seed`.

    Args:
        root: where downloaded sets lie; `./data` where not given. Factories and folders do not look at it.
        preprocessing: what the images are fitted to; where not given, the natural one of a set that has a name.
            A folder has none, and a factory's data are taken as they come.
        val_fraction: the share of the training images to hold out, where the set has no validation split;
            0 for none (of all images, where a folder has to be divided into three).
        seed: what the validation images are drawn with.

    Raises:
        UnknownNameError: if there is no such set.
        DataError: if it is missing, damaged or too small, saying how to get it.
        OptionError: if `val_fraction` is not a share, or a folder comes without preprocessing.
    """
    check_fraction(val_fraction)
    expect_source(name)
    kind, colon, rest = name.partition(":")
    if kind == _FOLDER:
        wanted = expect_preprocessing(name, preprocessing)
        folder = Path(rest).expanduser()
        return load_folder(folder, name=name, preprocessing=wanted, val_fraction=val_fraction, seed=seed)
    if colon:
        return load_from_factory(name)
    folder = DEFAULT_ROOT if root is None else Path(root).expanduser()
    return _load_named(name, folder, preprocessing, val_fraction, seed)


def expect_preprocessing(name: str, preprocessing: Preprocessing | None) -> Preprocessing:
    """Return the preprocessing of a folder's pictures, which must be given.

    Raises:
        OptionError: if it is not.
    """
    if preprocessing is None:
        raise OptionError(
            f"{name}: what its pictures are fitted to is not known; give preprocessing=Preprocessing(size, mean, std)"
        )
    return preprocessing


def _load_named(
    name: str, root: Path, preprocessing: Preprocessing | None, val_fraction: float, seed: int
) -> DataSplits:
    entry = NAMED[name]
    wanted = entry.preprocessing if preprocessing is None else preprocessing
    raw = entry.read(root)
    keep = (len(raw.train[0]) + len(raw.test[0])) * bytes_each(wanted) <= MEMORY
    known, test = (
        ImageSet(TensorPictures(images, wanted, keep=keep), labels, classes=raw.classes, preprocessing=wanted)
        for images, labels in (raw.train, raw.test)
    )
    train, val = hold_out_validation(known, val_fraction=val_fraction, seed=seed, what=name)
    return DataSplits(name, train, val, test, raw.classes, wanted, entry.flip)


def expect_source(name: str) -> None:
    """Raise for the name of a data set that does not exist, and for `imagefolder:DIR` without such a folder.

    Raises:
        UnknownNameError: if there is no such set.
        DataError: if there is no such folder.
    """
    kind, colon, rest = name.partition(":")
    if kind == _FOLDER:
        if not rest:
            raise DataError(f"{_FOLDER} needs a folder: {_FOLDER}:DIR")
        expect_folder(Path(rest).expanduser(), name=name)
    elif not colon:
        _check_known(name)


def _check_known(name: str) -> None:
    if name not in NAMED:
        raise UnknownNameError.among("data set", name, [*NAMED, *_OTHER_FORMS])
