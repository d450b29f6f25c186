"""Progress and tables on a terminal: progress and remarks on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from convsurgeon.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from convsurgeon.delivery import Comparison

_PLAIN_WIDTH = 160
_PLAIN_SECONDS = 10.0
# of what a line is printed now and then where there is no terminal, and how a step of it is called
_STEPS = {"replace": "convolution", "train": "step", "fit": "fit of convolution", "polish": "step"}


class _Console(Console):
    """A console that says it when nobody reads any more, and does not end the program by itself."""

    def on_broken_pipe(self) -> None:
        """Leave it to the program's end."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """Return a console that takes text as it is; where nobody looks at it, tables are wide enough not to wrap."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def say(message: str) -> None:
    """Print one line on stderr, whatever its length."""
    console(stderr=True).print(message, soft_wrap=True)


def tell(message: str) -> None:
    """Print one line of the result on stdout, whatever its length: a path must stay whole."""
    console().print(message, soft_wrap=True)


def emit(data: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False), flush=True)  # so that a reader that has gone is noticed


class Drawing:
    """Draws `Progress` events: a bar on a terminal, now and then a line elsewhere. A context manager."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._spoke = time.monotonic()

    def __enter__(self) -> Drawing:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
            note = TextColumn("{task.fields[note]}", markup=False)
            self._bar = Bar(*columns, note, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Progress) -> None:
        """Draw one event."""
        if event.stage == "epoch":
            self._console.print(event.message or _epoch_line(event), soft_wrap=True)
        elif event.total is None:
            if event.message:
                self._console.print(event.message, soft_wrap=True)
        elif self._bar is not None:
            self._move(self._bar, event)
        elif event.stage in _STEPS and time.monotonic() - self._spoke >= _PLAIN_SECONDS:
            self._spoke = time.monotonic()
            self._console.print(f"{_STEPS[event.stage]} {event.done}/{event.total}  {_note(event)}", soft_wrap=True)

    def _move(self, bar: Bar, event: Progress) -> None:
        if event.stage not in self._tasks:
            self._tasks[event.stage] = bar.add_task(event.stage, total=event.total, note="")
        task = self._tasks[event.stage]
        bar.update(
            task,
            completed=event.done,
            total=event.total,
            note=_note(event),
            visible=event.done != event.total,
        )


def _note(event: Progress) -> str:
    figures = event.figures
    parts = [f"epoch {figures['epoch']:.0f}/{figures['epochs']:.0f}"] if "epochs" in figures else []
    if "loss" in figures:
        parts.append(f"loss {figures['loss']:.3f}")
    for name in ("student", "teacher"):
        if f"{name}_accuracy" in figures:
            parts.append(f"{name} {100 * figures[f'{name}_accuracy']:.1f}%")
    if "images_per_second" in figures:
        parts.append(f"{figures['images_per_second']:.0f} images/s")
    if "seconds_left" in figures:
        parts.append(f"{_duration(figures['seconds_left'])} left")
    return "  ".join(parts) or event.message


def _epoch_line(event: Progress) -> str:
    figures = event.figures
    line = f"epoch {event.done}/{event.total}  loss {figures['loss']:.3f}"
    if "student_accuracy" in figures:
        line += f"  validation: student {100 * figures['student_accuracy']:.2f}%"
    if "teacher_accuracy" in figures:
        line += f", teacher {100 * figures['teacher_accuracy']:.2f}%"
    return f"{line}  {_duration(figures['seconds'])}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def big(number: float) -> str:
    """Return a number with a unit: 1.81 G, 11.2 M, 640 k.

    >>> big(1_813_561_344), big(11_176_512), big(640)
    ('1.81 G', '11.2 M', '640')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def fewer(before: float, after: float) -> str:
    """Return a ratio as people read it: `9.0x`.

    >>> fewer(9, 1), fewer(1, 0)
    ('9.0x', '–')
    """
    return f"{before / after:.1f}x" if after else "–"


def draw_comparison(comparison: Comparison, *, ended: float | None = None) -> Table:
    """Return the table of what it cost and gained.

    Args:
        ended: test accuracy of the teacher as it ended, where it was trained too.
    """
    before, after = comparison.before, comparison.after
    table = Table(title="teacher → student")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("parameters", big(before.params), big(after.params), fewer(before.params, after.params))
    table.add_row("MACs, one image", big(before.macs), big(after.macs), fewer(before.macs, after.macs))
    if after.counted_macs != after.macs:
        counted = fewer(before.counted_macs, after.counted_macs)
        table.add_row("  with one-hot taps", big(before.counted_macs), big(after.counted_macs), counted)
    if before.converted_macs is not None and after.converted_macs is not None:
        ratio = fewer(before.converted_macs, after.converted_macs)
        table.add_row("  converted convolutions", big(before.converted_macs), big(after.converted_macs), ratio)
    sizes = before.delivery.bytes, after.delivery.bytes
    table.add_row("ONNX file", *(f"{size / 1e6:.3f} MB" for size in sizes), fewer(*sizes))
    if before.accuracy is not None and after.accuracy is not None:
        points = f"{100 * (after.accuracy - before.accuracy):+.2f} points"
        table.add_row("test accuracy", f"{100 * before.accuracy:.2f} %", f"{100 * after.accuracy:.2f} %", points)
    if ended is not None and before.accuracy is not None:
        points = f"{100 * (ended - before.accuracy):+.2f} points"
        table.add_row("  teacher as it ended", f"{100 * before.accuracy:.2f} %", f"{100 * ended:.2f} %", points)
    if after.agreement is not None:
        table.add_row("agrees with the teacher", "", f"{100 * after.agreement:.2f} %", "")
    for threads, latency in before.latency.items():
        other = after.latency[threads]
        what = f"latency, {threads} thread{'s' if threads > 1 else ''}"
        ratio = f"{latency.median_ms / other.median_ms:.2f}x"
        table.add_row(what, f"{latency.median_ms:.3f} ms", f"{other.median_ms:.3f} ms", ratio)
    parities = (before.delivery.parity, after.delivery.parity)
    table.add_row("ONNX parity, of the largest output", *(f"{parity.max_rel:.1e}" for parity in parities), "")
    return table
