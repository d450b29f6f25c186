"""The zip archives of `torch.save`: which records they hold, where every reader must see the same ones.

Torch reads archives with a library of its own. What is checked here is what it will read only if an
archive leaves nothing to interpretation: one table of contents at the very end, nothing compressed,
every record once, and none larger than the file.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

_END = b"PK\x05\x06"
_END_LENGTH = 22
_ENCRYPTED = 0x1


class DamageError(Exception):
    """The bytes of a file contradict each other. The message completes `FILE is damaged (...)`."""


@dataclass(frozen=True)
class Archive:
    """What an archive holds, under the names that its pickle uses."""

    sizes: dict[str, int]
    """Bytes of each record, by its name without the root folder."""
    pickle: bytes
    """The record `data.pkl`."""


def read_archive(path: Path) -> Archive:
    """Return the names and sizes of all records, and the pickle.

    Raises:
        DamageError: for an archive that `torch.save` does not write.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - _END_LENGTH, 0))
        end = file.read(_END_LENGTH)
    if not end.startswith(_END):
        raise DamageError("something follows the archive's table of contents")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        roots = {entry.filename.partition("/")[0] for entry in entries}
        if len(roots) != 1:
            raise DamageError("its records lie in several folders")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED for entry in entries):
            raise DamageError("its records are compressed, which torch.save never does")
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
        if len(sizes) != len(entries):
            raise DamageError("it holds two records of the same name")
        if sum(sizes.values()) > size or any(entry.file_size != entry.compress_size for entry in entries):
            raise DamageError("its records are larger than the file")
        return Archive(sizes, archive.read(f"{roots.pop()}/data.pkl"))
