"""What a file is, told from its first bytes and its table of contents, and what to do if it is no model."""

from __future__ import annotations

import enum
import stat
import zipfile
from pathlib import Path

from convsurgeon.errors import ModelError, one_line

_READ_AHEAD = 64
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled


class Kind(enum.Enum):
    """The formats that can hold a model or its weights."""

    ARCHIVE = "a zip archive that torch.save wrote"
    LEGACY = "a file that torch.save wrote before PyTorch 1.6"
    SAFETENSORS = "a safetensors file"
    PROGRAM = "an exported program that torch.export.save wrote"


def identify(path: Path) -> Kind:
    """Return what kind of file `path` is.

    Raises:
        ModelError: one line that says what it is instead, and what to do.
    """
    size = _regular_size(path)
    if size == 0:
        raise ModelError(f"{path} is empty; copy or save it again")
    head = _first_bytes(path)
    if path.suffix == ".onnx" or _is_onnx(path, head):
        raise ModelError(f"{path} is an ONNX file, which has no PyTorch modules; give the model it was exported from")
    if head.startswith(b"PK\x03\x04"):
        return _identify_archive(path)
    if head.startswith(_LEGACY_MAGIC):
        return Kind.LEGACY
    if path.suffix == ".pt2":
        raise ModelError(
            f"{path} is no exported program: torch.export.save writes another kind of file; export it again"
        )
    if _is_safetensors(head, size):
        return Kind.SAFETENSORS
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is truncated or damaged: its safetensors header is cut; copy or save it again")
    if head.startswith(b"\x80"):
        raise ModelError(f"{path} is a pickle that torch.save did not write; save the model with torch.save")
    raise ModelError(
        f"{path} is no model: neither a file that torch.save wrote nor safetensors; "
        "give such a file, or an architecture such as torchvision:resnet18"
    )


def _regular_size(path: Path) -> int:
    """Return the file's size in bytes; anything that is no regular file is refused before it is opened."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ModelError(_missing(path)) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {one_line(error)}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"{path} is a folder; give the model file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is no regular file but a pipe, socket or device; give a model file")
    return status.st_size


def _missing(path: Path) -> str:
    if path.suffix or len(path.parts) > 1:
        return f"{path} does not exist; give a file that does, or an architecture such as torchvision:resnet18"
    return f"there is no file {path}; an architecture is written with where it is from: torchvision:{path}"


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_READ_AHEAD)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _identify_archive(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except Exception as error:  # whatever zipfile raises for sizes and places that cannot be
        raise ModelError(
            f"{path} is truncated or damaged: a PyTorch archive without its end; copy or save it again"
        ) from error
    if "serialized_exported_program.json" in names:
        raise ModelError(
            f"{path} is an exported program as PyTorch wrote them before 2.8; load it there with torch.export.load "
            "and save it again with a newer one"
        )
    if "archive_format" in names:
        return Kind.PROGRAM
    if "constants.pkl" in names:
        raise ModelError(
            f"{path} is a TorchScript archive, whose modules are compiled; "
            "give the model it was made from, as a pickled module or by name"
        )
    if "data.pkl" not in names:
        raise ModelError(f"{path} is a zip archive, and no model that torch.save wrote; give the model file itself")
    return Kind.ARCHIVE


def _is_safetensors(head: bytes, size: int) -> bool:
    """A header's length in 8 bytes, then the header, which is JSON."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= size


def _is_onnx(path: Path, head: bytes) -> bool:
    """ONNX has no magic number: field 1 (a varint) comes first, and the rest must parse and have a graph."""
    if not head.startswith(b"\x08"):
        return False
    import onnx  # a second to import, and needed for hardly any file

    try:
        return len(onnx.load(path, load_external_data=False).graph.node) > 0
    except Exception:  # whatever protobuf raises for bytes that are none of its own
        return False
