"""`convsurgeon ops`: the catalogue of cheap convolutions."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from convsurgeon.cli import _arguments as arguments

_LETTERS = (
    "I, O: input and output channels; K: positions of the kernel, Y*X; H*W, P*Q: size of input and output; "
    "a dense convolution costs I*O*K*P*Q MACs"
)


def run(
    op: Annotated[str | None, typer.Argument(metavar="[OP]", help="Show this one only.")] = None,
    json: arguments.Json = False,
) -> None:
    """List the cheap convolutions: what they are, cost and keep, where they are slow, their options and papers."""
    from rich.table import Table

    from convsurgeon import ops
    from convsurgeon.cli._drawing import console, emit, tell

    entries = [_entry(ops.get(name)) for name in ([op] if op else ops.names())]
    if json:
        emit({"ops": entries})
        return
    table = Table("op", "", show_lines=True)
    for entry in entries:
        facts = Table.grid(padding=(0, 1))
        for what in ("structure", "cost", "keeps", "slow"):
            facts.add_row(what, entry[what])
        for name, option in entry["options"].items():
            facts.add_row("option", f"{name}={option['default']}  ({option['allowed']})")
        facts.add_row("paper", entry["reference"])
        table.add_row(entry["name"], facts)
    console().print(table)
    tell(_LETTERS)


def _entry(op: Any) -> dict[str, Any]:
    hints = get_type_hints(op.Options)
    options = {
        field.name: {"default": field.default, "allowed": _allowed(hints[field.name])}
        for field in dataclasses.fields(op.Options)
    }
    return {
        "name": op.name,
        "structure": op.summary,
        "cost": op.cost,
        "keeps": op.keeps,
        "slow": op.slow,
        "options": options,
        "reference": op.reference,
    }


def _allowed(kind: Any) -> str:
    """Say what an option of that type takes."""
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    members = set(get_args(kind)) or {kind}
    if {int, float, str} <= members:
        return "a number, a share as 0.25, or of the energy as 90%" + (", or none" if type(None) in members else "")
    return " or ".join(sorted({int: "a number", float: "a number", str: "text"}.get(each, "none") for each in members))
