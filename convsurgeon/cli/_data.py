"""Data on the command line: which pictures, and what they go through before a network sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsurgeon.cli._drawing import say
from convsurgeon.errors import DataError, OptionError

if TYPE_CHECKING:
    from convsurgeon.data import DataSplits
    from convsurgeon.preprocessing import Preprocessing


@dataclass(frozen=True)
class PreprocessingFlags:
    """What the flags about images say, as they were typed; None where one was not."""

    size: str | None = None
    mean: str | None = None
    std: str | None = None
    color: str | None = None
    crop: str | None = None
    interpolation: str | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> PreprocessingFlags:
        """Return the flags among the parameters of a verb."""
        return cls(**{name: said[name] for name in cls.__dataclass_fields__})

    def typed(self) -> list[str]:
        """Return the flags that were typed, such as `--size`."""
        return [f"--{name}" for name, value in asdict(self).items() if value is not None]

    def choose(self, data: str, networks: Mapping[str, Mapping[str, Any]], *, is_path: bool = False) -> Preprocessing:
        """Return what the pictures go through, and say what of it is assumed.

        Args:
            data: as it was typed.
            networks: the record of each network that sees the pictures, by what it is called; the first one that
                has a stored preprocessing decides.
            is_path: whether `data` is the bare path of a folder.

        Raises:
            OptionError: if the size of the images is not known, or a flag cannot be read.
            UnknownNameError: if there is no such data set.
        """
        from convsurgeon.data import default_preprocessing
        from convsurgeon.preprocessing import Preprocessing, choose_preprocessing

        stored = {who: record["preprocessing"] for who, record in networks.items() if record.get("preprocessing")}
        first = next(iter(stored), None)
        for who, other in stored.items():
            if first is not None and other != stored[first]:
                say(
                    f"note: {who} was made for images of {Preprocessing.from_dict(other)}; those of {first} are "
                    "taken for both"
                )
        shapes = [record["input_shape"] for record in networks.values() if record.get("input_shape")]
        wanted, remark = choose_preprocessing(
            None if first is None else Preprocessing.from_dict(stored[first]),
            None if is_path else default_preprocessing(data),
            asdict(self),
            who=next(iter(networks)),
            data=data,
            input_shape=shapes[0] if shapes else None,
        )
        library = None if first is None else networks[first].get("preprocessing_of")
        if library and wanted.crop != 1 and self.crop is None:
            remark = f"crop {wanted.crop:.4g} is that of {library}'s own weights; --crop none, if yours had none"
        if remark is not None:
            say(f"note: {remark}")
        return wanted


def refuse_idle_flags(name: str, flags: PreprocessingFlags, *, root: Path | None, is_path: bool = False) -> None:
    """Raise an `OptionError` for flags that change nothing about the data that are named beside them.

    Args:
        is_path: whether the name is the bare path of a folder.
    """
    folder = is_path or name.startswith("imagefolder:")
    if folder and root:
        raise OptionError(f"{name} is a folder of its own; leave out --data-root: downloaded data sets lie there")
    idle = [*(["--data-root"] if root else []), *flags.typed()]
    if ":" in name and not folder and idle:
        raise OptionError(f"{name} gives its images as they are to be taken; leave out {' and '.join(idle)}")


def comes_as_it_is(name: str) -> bool:
    """Whether data of that name, which is no path, are a factory's, which prepares its images itself."""
    return ":" in name and not name.startswith("imagefolder:")


def load_splits(
    name: str | None,
    flags: PreprocessingFlags,
    networks: Mapping[str, Mapping[str, Any]],
    *,
    root: Path | None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> DataSplits:
    """Load a data set, preprocessed as the networks' records say and the flags change, and say how.

    Raises:
        DataError: if no data were named, or they are missing.
        OptionError: if the size of the images is not known.
    """
    from convsurgeon.data import expect_source, load_data, names

    if name is None:
        raise DataError(
            f"which data? Say --data with one of {', '.join(names())}, imagefolder:DIR or package.module:factory"
        )
    refuse_idle_flags(name, flags, root=root)
    expect_source(name)
    wanted = None if comes_as_it_is(name) else flags.choose(name, networks)
    splits = load_data(name, root=root, preprocessing=wanted, val_fraction=val_fraction, seed=seed)
    if splits.preprocessing is not None:
        say(f"preprocessing: {splits.preprocessing}")
    return splits
