"""`convsurgeon ops`: the catalogue of cheap convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any

from convsurgeon.cli import _arguments as arguments


def run(json: arguments.Json = False) -> None:
    """List the cheap convolutions: what they are, their options, their papers."""
    from rich.table import Table

    from convsurgeon import ops
    from convsurgeon.cli._drawing import console, emit

    rows: list[dict[str, Any]] = []
    for name in ops.names():
        op = ops.get(name)
        options = {field.name: field.default for field in dataclasses.fields(op.Options)}
        rows.append({"name": name, "structure": op.summary, "options": options, "reference": op.reference})
    if json:
        emit({"ops": rows})
        return
    table = Table("op", "structure", "options", "reference")
    for row in rows:
        shown = "\n".join(f"{key}={value}" for key, value in row["options"].items())
        table.add_row(str(row["name"]), str(row["structure"]), shown, str(row["reference"]))
    console().print(table)
