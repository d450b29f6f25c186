"""The archive of an exported program: taken apart, checked, and put together again before torch reads it.

Torch gets an archive that holds only what was checked, in memory: no second reading of a file that may
have changed, no difference between two readers of zip files, and no pickle of the file's own.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.pt2_archive import PT2ArchiveWriter

from convsurgeon.errors import ConvSurgeonError, ModelError, UntrustedFileError, one_line
from convsurgeon.storage._admission import refusal
from convsurgeon.storage._kinds import Kind
from convsurgeon.storage._pickles import read_safely
from convsurgeon.storage._program_grammar import ForbiddenError, UnsupportedError, check_path, clean_program
from convsurgeon.storage._texts import printable

RECORD = "convsurgeon.json"
_MODEL = "models/model.json"
_SAMPLE = "data/sample_inputs/model.pt"
_WEIGHTS, _CONSTANTS = ("data/weights/", "weight_"), ("data/constants/", "tensor_")
_COMPILED = "data/aotinductor/"

Records = dict[str, bytes]


def check_archive(path: Path) -> tuple[io.BytesIO, str | None]:
    """Return an archive that `torch.export.load` may read, and our own record in the file, as text.

    Raises:
        UntrustedFileError: for anything that could run, or that no ordinary program holds.
        ModelError: if the file is damaged, or holds what convsurgeon does not read.
    """
    with explained(path):
        records = _read_records(path)
        if any(name.startswith(_COMPILED) for name in records):
            raise UnsupportedError("compiled code (AOTInductor) instead of a graph")
        if records.get("archive_format") != b"pt2" or _MODEL not in records:
            raise ValueError(f"no {_MODEL} in it")
        if records.get("byteorder", sys.byteorder.encode()) != sys.byteorder.encode():
            raise UnsupportedError("numbers in another byte order")
        checked: Records = {_MODEL: _as_json(clean_program(_parse(records[_MODEL])))}
        for folder, prefix in (_WEIGHTS, _CONSTANTS):
            checked |= _checked_tensors(path, records, folder, prefix)
        if sample := records.get(_SAMPLE):
            _read_pickle(path, sample, "example inputs")
        # the example inputs are not read again: their sizes and types stand in the graph
        checked[_SAMPLE] = b""
        record = records.get(f"extra/{RECORD}")
        text = None if record is None else record.decode()
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in checked.items():
            writer.write_bytes(name, content)
    buffer.seek(0)
    return buffer, text


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with a file, and what to do."""
    try:
        yield
    except ConvSurgeonError:
        raise
    except ForbiddenError as error:
        raise UntrustedFileError(
            f"{path} holds {printable(error)}, as no program that torch.export.save wrote does; nothing was run. "
            "Only if you know who made it: --trust"
        ) from error
    except UnsupportedError as error:
        raise ModelError(
            f"{path} holds {printable(error)}, which cannot be read here; give the model that it was exported from"
        ) from error
    except Exception as error:  # whatever zipfile, json and torch make of damaged bytes
        raise ModelError(f"{path} is damaged ({printable(one_line(error))}); copy or export it again") from error


def _read_records(path: Path) -> Records:
    """Return all records of the archive, under their names without its root folder.

    What they take in memory is bounded by the size of the file.
    """
    records: Records = {}
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ForbiddenError("compressed records")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ForbiddenError("records larger than the file itself")
        for entry in entries:
            name = entry.filename.partition("/")[2]
            if name in records:
                raise ForbiddenError(f"two records called {name!r}")
            records[name] = archive.read(entry)
    return records


def _checked_tensors(path: Path, records: Records, folder: str, prefix: str) -> Records:
    """Return the raw tensors of one folder, and the table that names them."""
    if (pickled := records.get(f"{folder}model.pt")) is not None:  # as PyTorch 2.8 wrote them
        tensors = _read_pickle(path, pickled, folder)
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ForbiddenError(f"a pickle of other things than tensors in {folder}")
        buffer = io.BytesIO()
        torch.save({check_path(name): value for name, value in tensors.items()}, buffer)
        return {f"{folder}model.pt": buffer.getvalue()}
    name = f"{folder}model_{folder.split('/')[1]}_config.json"
    config = _parse(records[name])["config"]
    found: Records = {}
    for entry_name, entry in config.items():
        file = entry["path_name"]
        if entry["use_pickle"] is not False or not file.startswith(prefix):
            raise ForbiddenError(f"{check_path(entry_name)}, which is no plain tensor")
        check_path(entry_name)
        found[folder + file] = records[folder + file]
        _check_extent(entry["tensor_meta"], len(found[folder + file]))
        entry["tensor_meta"]["device"] = {"type": "cpu", "index": None}
    return {**found, name: _as_json({"config": config})}


def _check_extent(meta: dict[str, Any], size: int) -> None:
    """Refuse a tensor of more numbers than its record has bytes: what is loaded is bounded by the file."""
    count = 1
    for length in meta["sizes"]:
        if type(length["as_int"]) is not int or length["as_int"] < 0:
            raise ValueError(f"a tensor of size {length}")
        count *= length["as_int"]
    if count > size:
        raise ForbiddenError(f"a tensor of {count} numbers in {size} bytes")


def _read_pickle(path: Path, content: bytes, what: str) -> Any:
    """Unpickle a record as any other pickle: only what is admitted, and nothing is run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.pt"
        file.write_bytes(content)
        try:
            found, refused = read_safely(file, Kind.ARCHIVE)
        except ConvSurgeonError as error:
            raise type(error)(str(error).replace(str(file), f"{path} ({what})")) from error
    if refused:
        raise refusal(path, refused)
    return found


def _parse(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of a table")
    return found


def _as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
