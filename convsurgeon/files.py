"""The one way convsurgeon writes a file: a temporary name, fsync, rename.

A process that is killed leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from convsurgeon.errors import OutputError, one_line


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then put it in place.

    The temporary file keeps the suffix of `path`, since some writers look at it. If `write`
    raises, the temporary file is removed, `path` is left as it was, and the error goes on.

    Raises:
        OutputError: if the folder does not exist or cannot be written to, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file to write")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror} (folder {path.parent})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        # mkstemp makes files private; give the file the mode that a plain open() would
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError):  # a disk that is full
            raise OutputError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8, atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def refuse_to_overwrite(path: str | Path, *, force: bool = False) -> Path:
    """Return `path`, or raise if something is there and `force` was not given, or nothing can be written there.

    Raises:
        OutputError: naming the file and the way out.
    """
    path = Path(path)
    try:
        exists = path.exists() or path.is_symlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another name") from error
    if not path.parent.is_dir():
        what = "is no folder" if path.parent.exists() else "is not there; make it first"
        raise OutputError(f"cannot write {path}: the folder {path.parent} {what}")
    if exists and not force:
        raise OutputError(f"{path} exists already; choose another name or say --force")
    if exists and not path.is_file():
        raise OutputError(f"{path} is no regular file; choose another name")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror} (folder {path.parent})") from error
    return path


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents; an existing one is fine.

    Raises:
        OutputError: if it cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {path}: {error.strerror}") from error
    return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: str | Path, line: str) -> None:
    """Append one line to a log in a single write, and see it onto the disk."""
    with Path(path).open("ab", buffering=0) as file:
        file.write(line.encode() + b"\n")
        os.fsync(file.fileno())
