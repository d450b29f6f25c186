"""The file of rows: appended as they come, read back as the latest of each, and what makes a row a bad one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import convsurgeon
from convsurgeon.files import write_atomically

# characters of a reason that a row keeps
REASON_LENGTH = 100
Row = dict[str, Any]
Key = tuple[str, str, str]


def fingerprint() -> str:
    """Return a hash of the code that decides what a row says."""
    root = Path(convsurgeon.__file__).parent
    files = [path for room in ("surgery", "ops", "factorization") for path in sorted((root / room).glob("*.py"))]
    digest = hashlib.sha256()
    for path in (*files, root / "spec.py"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def describe_run(code: str) -> Row:
    """Return what all rows of one run share: the code's fingerprint, versions, and the machine."""
    import timm
    import torch
    import torchvision

    versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
    versions["Python"] = platform.python_version()
    return {"run": code, "fingerprint": code, "versions": versions, "machine": _machine()}


def _machine() -> str:
    names = [""]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[-1] or platform.machine()} ({os.cpu_count()} cores)"


def append(path: Path, row: Row) -> None:
    """Append a row, and be sure that it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> dict[Key, Row]:
    """Return the latest row of each model and op."""
    return {key(row): row for row in _lines(path) if "op" in row}


def read_runs(path: Path) -> list[Row]:
    """Return what each run wrote about itself."""
    return [row for row in _lines(path) if "run" in row]


def latest_run(runs: Sequence[Row]) -> Row | None:
    """Return the last run, or None."""
    return runs[-1] if runs else None


def compact(path: Path) -> None:
    """Write the file anew, with the last run and the latest row of each model and op, by name."""
    lines = [*read_runs(path)[-1:], *(row for _, row in sorted(read_rows(path).items()))]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def _lines(path: Path) -> Iterator[Row]:
    """Yield the file's objects; a line cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def key(row: Row) -> Key:
    """Return what a row is about: package, name, op."""
    return row["package"], row["name"], row["op"]


def crashed(row: Row) -> bool:
    """Whether something was raised that is no answer."""
    return bool(row.get("error"))


def missed(row: Row) -> bool:
    """Whether a model has standard convolutions and none of them was converted."""
    standard = row.get("standard", 0) + row.get("standard_subclass", 0)
    return standard > 0 and row.get("converted") == 0


def bad(row: Row) -> bool:
    """Whether a row is a crash, a changed output, a site without a reason or a miss."""
    return crashed(row) or row["preserved"] == "no" or bool(row.get("without_reason")) or missed(row)
