"""What an ONNX file says about itself, as strings in its `metadata_props`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib import metadata as distributions
from typing import Any

import onnx

from convsurgeon.errors import ExportError
from convsurgeon.surgery import Plan

_PRODUCER = "convsurgeon"


def version() -> str:
    """Return the installed version of convsurgeon, or `unknown` where it runs without an install."""
    try:
        return distributions.version(_PRODUCER)
    except distributions.PackageNotFoundError:
        return "unknown"


def compose_metadata(record: Mapping[str, Any], extra: Mapping[str, str] | None) -> dict[str, str]:
    """Return the file's metadata: from the model's record, then the caller's own, which win.

    Raises:
        ExportError: if the caller's are not strings.
    """
    entries = {key: _json(record[key]) for key in ("classes", "preprocessing", "source") if key in record}
    if "plan" in record:
        entries["plan"] = _json(_summary(Plan.from_dict(record["plan"])))
    entries["producer"] = f"{_PRODUCER} {version()}"
    for key, value in (extra or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ExportError(f"metadata maps str to str; got {key!r}: a {type(value).__name__}")
        entries[key] = value
    return entries


def write_metadata(model: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    """Replace what the exporter says about itself, stack traces with local paths among it."""
    model.producer_name, model.producer_version = _PRODUCER, version()
    graph = model.graph
    for owner in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del owner.metadata_props[:]
        owner.doc_string = ""
    del model.metadata_props[:]
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)


def _summary(plan: Plan) -> dict[str, Any]:
    """Return what was done, in short: the model's class, convolutions per op, and how many were kept."""
    ops = Counter(decision.op for decision in plan.converted)
    return {"model": plan.model, "converted": dict(sorted(ops.items())), "kept": len(plan.kept)}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
