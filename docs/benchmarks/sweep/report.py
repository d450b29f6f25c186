"""Rows to docs/coverage.md: totals on top, every miss by name, one line per model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from convsurgeon.files import write_atomically

from .rows import REASON_LENGTH, Row, crashed, latest_run, missed, read_rows, read_runs

# how many reasons why something could not be traced are shown
_SHOWN = 60


def write(rows: Path, table: Path) -> None:
    """Write the table of a file of rows."""
    text = text_of(rows)
    write_atomically(table, lambda path: path.write_text(text, encoding="utf-8"))


def text_of(rows: Path) -> str:
    """Return the page of a file of rows."""
    return render(list(read_rows(rows).values()), runs=read_runs(rows))


def render(rows: Sequence[Row], *, runs: Sequence[Row] = ()) -> str:
    """Return the whole page."""
    rows = sorted(rows, key=lambda row: (row["package"] != "torchvision", row["package"], row["name"], row["op"]))
    ops = sorted({row["op"] for row in rows})
    parts = [_HEAD, _totals(rows, ops, latest_run(runs)), _machine(rows, runs), _misses(rows), _reasons(rows, ops)]
    parts += [_not_run(rows), _meta(rows), _untrained(rows), _untraced(rows), _models(rows, ops)]
    return "\n\n".join(part for part in parts if part) + "\n"


_HEAD = """# Coverage

Every model of torchvision and timm, built with random weights and converted with two ops: survey, plan, rewrite with
the closed forms computed, and one forward pass of teacher and student at the smallest input that the model takes.
Each model has a process of its own with a limit on memory and time. `make sweep` writes this page, and goes on where
it stopped; the rows are in `coverage.jsonl`.

A *standard* convolution, counted here by a walk independent of the survey, is an `nn.Conv2d` with one group, a kernel
larger than 1x1 and more than four input channels: what reads fewer is a stem, or makes a map of attention. Those of a
subclass are counted beside them."""


def _models_of(rows: Iterable[Row]) -> int:
    return len({(row["package"], row["name"]) for row in rows})


def _totals(rows: Sequence[Row], ops: Sequence[str], run: Row | None) -> str:
    same = [row for row in rows if row["preserved"] == "yes"]
    nothing = [row for row in rows if row.get("converted") == 0 and not missed(row) and not crashed(row)]
    standard = [row for row in rows if row.get("standard", 0) + row.get("standard_subclass", 0)]
    partly = [row for row in same if row["converted"] < row["standard"] + row["standard_subclass"]]
    lines = [
        ("models", _models_of(rows)),
        ("models not done yet", run["models"] - _models_of(rows) if run else 0),
        ("rows, one a model and op", len(rows)),
        ("crashes", sum(map(crashed, rows))),
        ("changed outputs", sum(row["preserved"] == "no" and not crashed(row) for row in rows)),
        ("sites without a reason", sum(row.get("without_reason", 0) for row in rows)),
        ("models with standard convolutions", _models_of(standard)),
        ("of these, models with none converted", _models_of(filter(missed, rows))),
        ("rows with outputs compared and the same", len(same)),
        ("of these, rows compared in eval mode only", sum(bool(row.get("untrained")) for row in same)),
        ("of these, rows with some standard convolution kept, with a reason", len(partly)),
        ("rows without a standard convolution, so with nothing to convert", len(nothing)),
        ("rows converted but not run", len(_unrun(rows))),
        ("rows on the meta device only (shapes, no numbers)", sum(row["mode"] == "meta" for row in rows)),
    ]
    for op in ops:
        mine = [row for row in rows if row["op"] == op]
        lines.append((f"convolutions found / converted to {op}", f"{_sum(mine, 'found')} / {_sum(mine, 'converted')}"))
    return "\n".join(["## Totals", "", "| | |", "|---|---:|", *(f"| {what} | {n} |" for what, n in lines)])


def _sum(rows: Iterable[Row], name: str) -> str:
    return f"{sum(row.get(name, 0) for row in rows):,}"


def _machine(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    seconds = sum(_seconds(group) for group in _by_model(rows))
    took = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    each = seconds / max(_models_of(rows), 1)
    text = f"All rows together took {took}, {each:.1f} s a model on average"
    run = latest_run(runs)
    if run is None:
        return text + "."
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    old = sum(row.get("fingerprint") != run["fingerprint"] for row in rows)
    text += f", one process and one thread at a time on {run['machine']}, with {versions}."
    return text + (f" {old} of the rows were made by an older version of convsurgeon's surgery." if old else "")


def _misses(rows: Sequence[Row]) -> str:
    lines = ["## Misses", ""]
    for row in rows:
        who = f"- `{row['package']}:{row['name']}`, {row['op']}: "
        if crashed(row):
            lines.append(f"{who}crashed. {_plain(row['error'])}")
        elif row["preserved"] == "no":
            lines.append(f"{who}outputs changed. {_plain(row['note'])}")
        elif missed(row):
            what = f"{row['standard']} standard and {row['standard_subclass']} of a subclass, none converted"
            lines.append(f"{who}{what}: {_counts(row['kept'])}.")
        if row.get("without_reason"):
            lines.append(f"{who}{row['without_reason']} sites without a reason.")
    return "\n".join(lines if len(lines) > 2 else [*lines, "None."])


def _reasons(rows: Sequence[Row], ops: Sequence[str]) -> str:
    totals = {op: Counter[str]() for op in ops}
    for row in rows:
        totals[row["op"]].update(row.get("kept", {}))
    labels = sorted({label for total in totals.values() for label in total}, key=lambda x: (-totals[ops[0]][x], x))
    if not labels:
        return ""
    lines = [f"| {label} | " + " | ".join(f"{totals[op][label]:,}" for op in ops) + " |" for label in labels]
    head = "| reason | " + " | ".join(ops) + " |"
    return "\n".join(["## Convolutions kept, by reason", "", head, "|---|" + "---:|" * len(ops), *lines])


def _unrun(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["preserved"] == "not run" and row.get("converted")]


def _not_run(rows: Sequence[Row]) -> str:
    unrun = _unrun(rows)
    lines = [f"- `{row['package']}:{row['name']}`, {row['op']}: {_plain(row['note'])}" for row in unrun]
    return "\n".join(["## Converted but not run", "", *lines]) if lines else ""


def _meta(rows: Sequence[Row]) -> str:
    done = [row for row in rows if row["mode"] == "meta"]
    lines = [f"- `{row['package']}:{row['name']}`, {row['op']}: {_plain(row['meta_because'])}" for row in done]
    return "\n".join(["## On the meta device only", "", *lines]) if lines else ""


def _untrained(rows: Sequence[Row]) -> str:
    """Name the models whose outputs were compared in eval mode only, by why."""
    who: dict[str, list[str]] = {}
    for row in rows:
        if why := str(row.get("untrained") or "").partition("; left out")[0]:
            names = who.setdefault(why, [])
            names += [name] if (name := f"`{row['package']}:{row['name']}`") not in names else []
    lines = [f"- {_plain(why)}: {', '.join(names)}" for why, names in sorted(who.items())]
    return "\n".join(["## Compared in eval mode only", "", *lines]) if lines else ""


def _untraced(rows: Sequence[Row]) -> str:
    """Count why `torch.fx` could not trace something; the sites in there were found by the module walk."""
    why: Counter[str] = Counter()
    for group in _by_model(rows):
        why.update({reason.partition(". ")[0][:REASON_LENGTH] for _, reason in group[0].get("untraced", ())})
    if not why:
        return ""
    ranked = sorted(why.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"| {_plain(reason)} | {count} |" for reason, count in ranked[:_SHOWN]]
    return "\n".join(["## What could not be traced", "", "| reason | models |", "|---|---:|", *lines])


def _models(rows: Sequence[Row], ops: Sequence[str]) -> str:
    numbers, texts = (
        ["found", "standard (+ subclass)", *ops, "not traced", "s"],
        ["kept, by reason", "route", "outputs", "input"],
    )
    head = f"| model | {' | '.join([*numbers, *texts])} |"
    lines = ["## Every model", "", head, "|---|" + "---:|" * len(numbers) + "---|" * len(texts)]
    return "\n".join([*lines, *(_line(group, ops) for group in _by_model(rows))])


def _line(group: Sequence[Row], ops: Sequence[str]) -> str:
    first = next((row for row in group if not crashed(row)), group[0])
    by_op = {row["op"]: row for row in group}
    subclass = first.get("standard_subclass", 0)
    outcomes = list(dict.fromkeys(_outcome(row) for row in group))
    cells = [
        f"`{first['package']}:{first['name']}`",
        str(first.get("found", "")),
        f"{first.get('standard', '')}" + (f" + {subclass}" if subclass else ""),
        *(str(by_op.get(op, {}).get("converted", "")) for op in ops),
        str(len(first.get("untraced", ()))),
        f"{_seconds(group):.1f}",
        _kept(group),
        _counts(first.get("routes", {})),
        ", ".join(outcomes),
        first.get("input") or "",
    ]
    return f"| {' | '.join(cells)} |"


def _outcome(row: Row) -> str:
    if crashed(row):
        return "**crash**"
    if row["preserved"] == "no":
        return "**changed**"
    said = "same" if row["preserved"] == "yes" else "**not run**" if row["converted"] else "nothing to convert"
    if missed(row):
        said = "**missed**"
    return said + (" (meta)" if row["mode"] == "meta" else "")


def _kept(group: Sequence[Row]) -> str:
    """Return the reasons of the first op, and of the others what differs."""
    base = group[0].get("kept", {})
    said = [_counts(base)]
    for row in group[1:]:
        other = {label: n for label, n in row.get("kept", {}).items() if base.get(label) != n}
        said += [f"{row['op']}: {_counts(other)}"] if other else []
    return "; ".join(filter(None, said))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {label}" for label, n in counts.items())


def _seconds(group: Sequence[Row]) -> float:
    return float(group[0].get("shared_seconds", 0) + sum(row.get("seconds", 0) for row in group))


def _by_model(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["package"], row["name"]), []).append(row)
    return list(groups.values())


def _plain(text: str) -> str:
    """Return text that neither breaks a table nor reads as markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
