"""How convsurgeon opens an ONNX file: onnxruntime, CPU, no spinning."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from convsurgeon.errors import ExportError, one_line

_FATAL = 4  # onnxruntime's own log; what goes wrong comes back as an exception


def session(path: str | Path, *, threads: int = 0) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU.

    Idle threads do not spin: several sessions that take turns would otherwise slow each other down.

    Args:
        path: the file.
        threads: threads inside one operator; 0 leaves the number to onnxruntime.

    Raises:
        ExportError: if there is no such file, or onnxruntime cannot read it.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} is not a file; give an ONNX file, as `convsurgeon export` writes it")
    if threads < 0:
        raise ExportError(f"threads must be 0 (automatic) or more, not {threads}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes share no base below Exception
        raise ExportError(f"{path} is not an ONNX file that onnxruntime can run ({one_line(error)})") from error


def read_metadata(opened: onnxruntime.InferenceSession) -> dict[str, str]:
    """Return what an ONNX file says about itself, as `export` wrote it."""
    return dict(opened.get_modelmeta().custom_metadata_map)
