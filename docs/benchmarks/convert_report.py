"""The page of the benchmark of `rewrite`, from its rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

TARGET = 1.3
STAGES = ("survey", "plan", "closed forms", "copy", "guard")
BARE_STAGES = ("copy", "closed forms", "forward passes")

PAGE = """# How long converting takes, and how much memory

`convsurgeon.rewrite(model, op, example_inputs=image)` beside the bare work that no conversion can do without:
`copy.deepcopy`, the cheapest exact decomposition of every converted kernel (eigenvectors of the small Gram matrix),
and one forward pass of teacher and student each in eval mode and, with a batch of two, in train mode. The target is
at most {target} times the bare work, in time and in peak memory. torchvision's networks with random weights, one image
of 224 x 224.

```console
$ pip install "convsurgeon[bench]"
$ python docs/benchmarks/convert.py --fresh
```

Seconds are medians of {repeats} rounds in one process, in which both take turns; the ratio is the median of the rounds'
ratios, with the lowest and the highest in brackets. Peak memory, in MB (10⁶ bytes), is that of a fresh process each,
above what the process held with the network loaded; the larger of two. A ratio above the target is in bold.

{environment}

| network | MB | op | converted | threads | rewrite, s | bare, s | ratio of times | rewrite, MB | bare, MB | of peaks |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

## Where the time goes

Medians in seconds. The teacher's two passes are in the survey, which observes the first; the student's two in the
guard. What Python does alone (tracing, copying the structure of the modules, building the ops) is no faster with a
second thread, while the forward passes are; it weighs most where many small layers are
converted: so densenet201 and resnet152 miss the target with two threads on some machines.

| network | op | threads | {stages} | bare: {bare_stages} |
|---|---|---|{stage_rules}
{stage_rows}

## The peer

torch-pruning on the same networks and the same image in the same run: its dependency graph and `MagnitudePruner` with
half of the channels, in place (one run in a fresh process; the layer that gives the classes is ignored, as it asks).
It neither copies the network nor checks the result. What it does to a network is another thing; how long one waits
for it can be compared.

| network | threads | torch-pruning, s | convsurgeon, s | torch-pruning, MB | convsurgeon, MB |
|---|---|---|---|---|---|
{peer_rows}
"""


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    mine, peers = [row for row in rows if "rewrite" in row], [row for row in rows if "peer" in row]
    rounds = sorted({len(row["rewrite"]["seconds"]) for row in mine})
    places = dict.fromkeys(_place(row["environment"]) for row in rows)
    return PAGE.format(
        target=TARGET,
        repeats=" or ".join(map(str, rounds)),
        environment="\n\n".join(places),
        rows="\n".join(map(_row, mine)),
        stages=" | ".join((*STAGES, "other")),
        bare_stages=" | bare: ".join(BARE_STAGES),
        stage_rules="---|" * (len(STAGES) + 1 + len(BARE_STAGES)),
        stage_rows="\n".join(map(_stage_row, mine)),
        peer_rows="\n".join(_peer_row(row, mine) for row in peers),
    )


def _place(environment: dict[str, str]) -> str:
    *versions, date = [f"{key} {value}" for key, value in environment.items() if key != "machine"]
    return f"{environment['machine']}; {', '.join(versions)}; {date.removeprefix('date ')}."


def _row(row: dict[str, Any]) -> str:
    ours, bare = row["rewrite"], row["bare"]
    ratios = [a / b for a, b in zip(ours["seconds"], bare["seconds"], strict=True)]
    peaks = max(ours["peak_mb"]), max(bare["peak_mb"])
    return _line(
        row["network"],
        f"{row['model_mb']:.0f}",
        row["op"],
        row["converted"],
        row["threads"],
        f"{statistics.median(ours['seconds']):.2f}",
        f"{statistics.median(bare['seconds']):.2f}",
        f"{_ratio(statistics.median(ratios))} ({min(ratios):.2f}–{max(ratios):.2f})",
        f"{peaks[0]:.0f}",
        f"{peaks[1]:.0f}",
        _ratio(peaks[0] / peaks[1]),
    )


def _ratio(value: float) -> str:
    return f"{value:.2f}" if round(value, 2) <= TARGET else f"**{value:.2f}**"


def _stage_row(row: dict[str, Any]) -> str:
    ours, bare = row["rewrite"], row["bare"]
    other = [total - sum(stages.values()) for total, stages in zip(ours["seconds"], ours["stages"], strict=True)]
    return _line(
        row["network"],
        row["op"],
        row["threads"],
        *(f"{statistics.median(stages[name] for stages in ours['stages']):.3f}" for name in STAGES),
        f"{statistics.median(other):.3f}",
        *(f"{statistics.median(stages[name] for stages in bare['stages']):.3f}" for name in BARE_STAGES),
    )


def _peer_row(row: dict[str, Any], mine: Iterable[dict[str, Any]]) -> str:
    same = next(each for each in mine if all(each[key] == row[key] for key in ("network", "threads")))
    seconds, peak = statistics.median(same["rewrite"]["seconds"]), max(same["rewrite"]["peak_mb"])
    if "error" in row["peer"]:
        theirs = [f"fails: {' '.join(row['peer']['error'].split())[:80]}", "–"]
    else:
        theirs = [f"{row['peer']['seconds']:.2f}", f"{row['peer']['peak_mb']:.0f}"]
    return _line(row["network"], row["threads"], theirs[0], f"{seconds:.2f}", theirs[1], f"{peak:.0f}")


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"
