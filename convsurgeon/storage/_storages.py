"""What the storages that a pickle speaks of may be: what lies in the file, and no more."""

from __future__ import annotations

import mmap
import pickle
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.serialization import StorageType

from convsurgeon.storage._archives import Archive, DamageError
from convsurgeon.storage._calls import Name, Storage
from convsurgeon.storage._proofreading import Proofreader

# bytes that tensors may seem to have: masks and tables are often views of little
_SPARE, _FACTOR = 64 * 2**20, 4
_COUNT_LENGTH = 8


@dataclass(frozen=True)
class Uses:
    """What a pickle does with names that torch does not know.

    Args:
        lookups: owners and attributes that it looks up.
        calls: with how many plain arguments it calls a name at most; -1 if there are others.
    """

    lookups: list[tuple[str, str]]
    calls: dict[str, int]


def proofread_archive(archive: Archive, foreign: Container[str]) -> Uses:
    """Read the pickle of an archive without building anything, and return what it does with foreign names.

    Raises:
        DamageError, StandInError, pickle.UnpicklingError: as `Proofreader.read` says.
    """

    def storage(persistent_id: tuple[Any, ...]) -> Storage:
        found, key = _parse(persistent_id, fields=5)
        if archive.sizes.get(f"data/{key}") != found.count * found.item_size:
            raise DamageError(f"its record data/{key} is missing or of another size")
        return found

    reader = Proofreader(archive.pickle, foreign=foreign, storage=storage, limit=_limit(archive.sizes))
    reader.read()
    return Uses(list(reader.lookups), reader.calls)


def proofread_legacy(path: Path) -> None:
    """Read what `torch.save` wrote before PyTorch 1.6: pickles, and all storages behind them.

    Raises:
        DamageError, StandInError, pickle.UnpicklingError: as `Proofreader.read` says.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        storages: dict[str, Storage] = {}

        def storage(persistent_id: tuple[Any, ...]) -> Storage:
            found, key = _parse(persistent_id, fields=6)
            root = storages.setdefault(key, found)
            if found != root or found.count * found.item_size > size:
                raise DamageError("a storage in it is larger than the file")
            return found if persistent_id[5] is None else _view(found, persistent_id[5])

        reader = Proofreader(data, foreign=(), storage=storage, limit=_limit({"": size}))
        for _ in range(4):  # a magic number, the version, facts about the machine, the object
            reader.read()
        _check_contents(data, reader, storages)


def _check_contents(data: mmap.mmap, reader: Proofreader, storages: Mapping[str, Storage]) -> None:
    """See that the storages that were spoken of lie behind the pickles, one by one, and fill the file."""
    keys = reader.read()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise DamageError("its list of storages is another one")
    at = reader.position
    for key in keys:
        count = data[at : at + _COUNT_LENGTH]
        if len(count) < _COUNT_LENGTH or struct.unpack("<q", count)[0] != storages[key].count:
            raise DamageError("a storage in it is cut or of another size")
        at += _COUNT_LENGTH + storages[key].count * storages[key].item_size
    if at > len(data):
        raise DamageError("its last storage is cut")


def _parse(persistent_id: tuple[Any, ...], *, fields: int) -> tuple[Storage, str]:
    if len(persistent_id) != fields:
        raise pickle.UnpicklingError("a persistent id of another form")
    _, kind, key, location, count = persistent_id[:5]
    if not (isinstance(kind, Name) and isinstance(key, str) and isinstance(location, str) and type(count) is int):
        raise pickle.UnpicklingError("a persistent id of another form")
    if not (location.isascii() and 0 <= count < 2**60):
        raise DamageError("a storage in it has an impossible size or place")
    return Storage(count, _item_size(kind.dotted)), key


def _item_size(dotted: str) -> int:
    module, _, name = dotted.rpartition(".")
    if dotted == "torch.storage.UntypedStorage":
        return 1
    try:
        if module not in ("torch", "torch.cuda"):
            raise KeyError(dotted)
        size: int = StorageType(name).dtype.itemsize  # type: ignore[no-untyped-call]
    except KeyError as error:
        raise pickle.UnpicklingError(f"a storage of {dotted}") from error
    return size


def _view(root: Storage, view: Any) -> Storage:
    if not (isinstance(view, tuple) and len(view) == 3 and isinstance(view[0], str)):
        raise pickle.UnpicklingError("a view of a storage of another form")
    _, offset, count = view
    if not (type(offset) is int and type(count) is int and offset >= 0 <= count and offset + count <= root.count):
        raise DamageError("a view of a storage in it is larger than the storage")
    return Storage(count, root.item_size)


def _limit(sizes: Mapping[str, int]) -> int:
    return _SPARE + _FACTOR * sum(sizes.values())
