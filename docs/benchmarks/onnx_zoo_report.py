"""The rows of onnx_zoo.py as a page: totals, what failed and why, one line a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
SIDES = ("dense", "student")
TOLERANCE = 1e-4  # export's own

# what the error line alone does not say, by name; each was looked into by hand
NOTES: dict[str, str] = {}

INTRODUCTION = """\
# Students as ONNX: torchvision and timm

Every classifier and segmenter of torchvision, and a fixed sample of timm: small members of forty families with standard
convolutions, and of four that have none but the stem. Random weights, the dense network exported, rewritten to
`depthwise`, the student exported. `export` raises where onnxruntime and PyTorch differ by more than 1e-4 of the largest
output (or, where PyTorch's own rounding is of that size, by more than four times that), so an exported row is a proven
one. Written by

```console
$ python docs/benchmarks/onnx_zoo.py run
```

which goes on where it stopped; `report` renders the rows that are there.
"""

METHOD = """\
How it was done: constant parameters were given noise, since a branch scaled by zero would hide what lies behind it;
batch-norm statistics are those of 128 random images, estimated anew for the student; layers of networks without any
norm are scaled to outputs of standard deviation 1. Inputs are the smallest of 64 to 384 pixels that the network takes.
Where every convolution is kept by default, the stem was converted on request (`mapping`), so that there is a student
to export. *Difference* is the worst over outputs and two batch sizes, as a
part of the largest output, dense and student; *varies* is how much the student's outputs differ between two images, in
the same unit: agreement means something where it is far larger than the difference. *Norms* are batch norms that
follow a convolution and are left, since something else reads that convolution too. One process a network, one thread.
"""


def good(row: Row) -> bool:
    """Whether dense network and student were both exported."""
    return exported(row, "dense") and exported(row, "student")


def exported(row: Row, side: str) -> bool:
    """Whether one of the two was exported."""
    return "max_rel" in row.get(side, {})


def missed(row: Row) -> bool:
    """Whether the dense network was exported and a student that could be made was not, or the worker died."""
    return exported(row, "dense") and not exported(row, "student")


def outcome(row: Row) -> str:
    """Say in a few words what came of a network."""
    if "error" in row:
        return f"cut off at {row['stage']}: {row['error']}"
    for side in SIDES:
        if "error" in row.get(side, {}):
            return f"{side} not exported: {row[side]['error']}"
    if "student" not in row:
        return f"no student: {row['nothing']}"
    kind = "stem on request" if "nothing" in row else f"{row['converted']} of {row['convolutions']}"
    return f"exported ({kind}), {row['student']['max_rel']:.1e}"


def render(rows: Mapping[str, Row], names: Sequence[str]) -> str:
    """Return the page."""
    there = [rows[name] for name in names if name in rows]
    parts = [INTRODUCTION, _totals(there, names), _failures(there), METHOD, _table(there)]
    return "\n".join(part for part in parts if part)


def _totals(rows: Sequence[Row], names: Sequence[str]) -> str:
    def count(test: Callable[[Row], bool]) -> str:
        return " | ".join(
            str(sum(test(row) for row in rows if row["name"].startswith(library)))
            for library in ("torchvision:", "timm:", "")
        )

    libraries = Counter(name.partition(":")[0] for name in names)
    lines = [
        "| | torchvision | timm | all |\n|---|---|---|---|",
        f"| networks | {libraries['torchvision']} | {libraries['timm']} | {len(names)} |",
        f"| looked at | {count(lambda row: True)} |",
        f"| dense exported | {count(lambda row: exported(row, 'dense'))} |",
        f"| **dense exported, student not** | {count(missed)} |",
        f"| student exported, of standard convolutions | {count(lambda row: good(row) and 'nothing' not in row)} |",
        f"| student exported, stem on request | {count(lambda row: good(row) and 'nothing' in row)} |",
        f"| batch norms left in students | {_sum(rows, 'batch_norms_left')} |",
    ]
    students = [row for row in rows if exported(row, "student")]
    if not students:
        return "\n".join(lines) + "\n"
    worst = max(students, key=lambda row: row["student"]["max_rel"])
    dullest = min(students, key=lambda row: row["student"]["varies"])
    hours = sum(row["seconds"] for row in rows) / 3600
    lines += [
        "",
        f"The worst difference of a student is {worst['student']['max_rel']:.1e} ({_plain(worst)}).",
        f"The outputs that vary least with the image do so by {dullest['student']['varies']:.1e} ({_plain(dullest)},",
        f"difference {dullest['student']['max_rel']:.1e}). All took {hours:.1f} hours on a shared machine.",
    ]
    if magnified := [row for row in rows if any(row.get(side, {}).get("max_rel", 0) > TOLERANCE for side in SIDES)]:
        lines.append(f"Above 1e-4, by PyTorch's own rounding: {', '.join(map(_plain, magnified))}.")
    if empty := [row for row in students if row["student"]["max_rel"] > 0.01 * row["student"]["varies"]]:
        lines.append(
            f"Answers that hardly depend on the image, so that agreement says little: {', '.join(map(_plain, empty))}."
        )
    if (versions := len({row["code"] for row in rows})) > 1:
        lines.append(f"The rows were made by {versions} versions of the code; `run --stale` makes the older ones anew.")
    return "\n".join(lines) + "\n"


def _sum(rows: Sequence[Row], key: str) -> str:
    return " | ".join(
        str(sum(row.get("student", {}).get(key, 0) for row in rows if row["name"].startswith(library)))
        for library in ("torchvision:", "timm:", "")
    )


def _failures(rows: Sequence[Row]) -> str:
    lines = [
        f"- `{row['name']}`: {outcome(row)}. {NOTES.get(row['name'], '')}".rstrip() for row in rows if not good(row)
    ]
    return "Not exported:\n\n" + "\n".join(lines) + "\n" if lines else "Nothing failed.\n"


def _plain(row: Row) -> str:
    return str(row["name"].partition(":")[2])


def _table(rows: Sequence[Row]) -> str:
    header = "| network | pixels | converted | difference | varies | norms | nodes | MB | seconds |"
    lines = [header, "|---" * header[1:].count("|") + "|"]
    return "\n".join(lines + [_line(row) for row in rows]) + "\n"


def _line(row: Row) -> str:
    converted = f"{row['converted']} of {row['convolutions']}" if "converted" in row else "–"
    cells = [
        f"`{row['name']}`",
        row.get("size", "–"),
        f"stem, of {row['convolutions']}" if "nothing" in row and "converted" in row else converted,
        _both(row, "max_rel", lambda value: f"{value:.0e}"),
        f"{row['student']['varies']:.0e}" if exported(row, "student") else "–",
        _both(row, "batch_norms_left", str),
        _both(row, "nodes", str),
        _both(row, "bytes", lambda value: f"{value / 1e6:.1f}"),
        f"{row['seconds']:.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _both(row: Row, key: str, show: Callable[[Any], str]) -> str:
    """Return a figure of the dense network and the student's, or a word where one was not exported."""
    dense, student = (row.get(side, {}) for side in SIDES)
    return " → ".join(show(side[key]) if key in side else "–" for side in (dense, student))
