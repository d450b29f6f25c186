"""Forked workers with a memory and a time limit, one at a time."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .examine import work as examine_cheaply
from .rows import Row, append, bad, describe_run, fingerprint, read_rows
from .zoo import Entry, entries

Examine = Callable[..., None]
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """What one worker may use: seconds, and bytes of resident memory."""

    seconds: float = 300.0
    memory: float = 14e9


@dataclass
class _Outcome:
    """What came of one worker: its rows, the stage it reached, and what cut it off, if anything did."""

    rows: list[Row] = field(default_factory=list)
    stage: str = "start"
    cut: str = ""
    at_limit: bool = False


def sweep(
    wanted: Iterable[Entry],
    ops: Sequence[str],
    *,
    path: Path,
    limits: Limits,
    refresh: bool = False,
    failed: bool = False,
    tell: Callable[[str], None] = print,
    work: Examine = examine_cheaply,
) -> None:
    """Do every model whose rows are not there yet, and append them as they come.

    Args:
        refresh: also those whose rows come from another version of the code.
        failed: only those that have a bad row.
        work: what a worker does.
    """
    code, present = fingerprint(), read_rows(path)
    append(path, {**describe_run(code), "models": len(entries())})
    for entry in wanted:
        rows = {op: present.get((entry.package, entry.name, op)) for op in ops}
        due = [op for op, row in rows.items() if _due(row, code, refresh=refresh, failed=failed)]
        for row in run_entry(entry, due, limits=limits, work=work) if due else ():
            append(path, {**row, "fingerprint": code})
            tell(line_of(row))


def _due(row: Row | None, code: str, *, refresh: bool, failed: bool) -> bool:
    if row is None:
        return not failed
    if failed:
        return bad(row)
    return refresh and row.get("fingerprint") != code


def run_entry(entry: Entry, ops: Sequence[str], *, limits: Limits, work: Examine = examine_cheaply) -> list[Row]:
    """Return one row per op: with real weights, or on the meta device for what the limits cut off."""
    real = _run_worker(entry, ops, device="cpu", limits=limits, work=work)
    rows, last = real.rows, real
    missing = [op for op in ops if op not in {row["op"] for row in rows}]
    if missing and real.at_limit:
        last = _run_worker(entry, missing, device="meta", limits=limits, work=work)
        rows = [*rows, *({**row, "meta_because": real.cut} for row in last.rows)]
    got = {row["op"] for row in rows}
    base = {"package": entry.package, "name": entry.name, "family": entry.family, "mode": "lost", "preserved": "no"}
    return [*rows, *({**base, "op": op, "error": last.cut, "seconds": 0.0} for op in ops if op not in got)]


def _run_worker(entry: Entry, ops: Sequence[str], *, device: str, limits: Limits, work: Examine) -> _Outcome:
    context = mp.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(send, work, entry, tuple(ops), device), daemon=True)
    process.start()
    send.close()
    outcome = _Outcome()
    _watch(outcome, process.pid, receive, limits=limits)
    if outcome.at_limit:
        process.kill()
    process.join()
    receive.close()
    if process.exitcode and not outcome.at_limit:
        # the kernel kills what takes the machine's last memory
        outcome.at_limit = process.exitcode == -signal.SIGKILL
        code = process.exitcode
        outcome.cut = f"died: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
    if not outcome.cut:
        outcome.cut = "the worker ended without a row"
    outcome.cut += f", at {outcome.stage!r} ({'meta' if device == 'meta' else 'real'})"
    return outcome


def _watch(outcome: _Outcome, pid: int | None, receive: Connection, *, limits: Limits) -> None:
    """Take in what a worker sends until it closes its end, or a limit is passed."""
    started, peak = time.monotonic(), 0
    while not outcome.at_limit:
        try:
            while receive.poll(0.05):
                kind, value = receive.recv()
                if kind == "row":
                    outcome.rows.append({**value, "peak_gb": round(peak / 1e9, 1)})
                else:
                    outcome.stage = value
        except EOFError:
            return
        used = _resident(pid)
        peak = max(peak, used)
        if used > limits.memory:
            outcome.cut, outcome.at_limit = f"memory: more than {limits.memory / 1e9:.1f} GB", True
        elif time.monotonic() - started > limits.seconds:
            outcome.cut, outcome.at_limit = f"time: more than {limits.seconds:g} s", True


def _work(send: Connection, work: Examine, entry: Entry, ops: Sequence[str], device: str) -> None:
    def emit(kind: str, value: Any) -> None:
        send.send((kind, value))

    # a worker that is told to end ends, also within a long decomposition
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # the libraries' warnings are no concern of this table
    warnings.simplefilter("ignore")
    work(entry, ops, device=device, emit=emit)


def _resident(pid: int | None) -> int:
    """Return the resident bytes of a process, or 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def line_of(row: Row) -> str:
    """Return a row as one line for the terminal."""
    counts = f"{row.get('converted', '?')} of {row.get('found', '?')}"
    took = f"{row.get('seconds', 0) + row.get('shared_seconds', 0):.1f}s"
    said = row.get("error") or (row.get("note", "") if row.get("converted") else "")
    parts = ["BAD" if bad(row) else "ok ", f"{row['package']}:{row['name']}", row["op"], counts, row["mode"]]
    return " ".join([*parts, f"same: {row['preserved']}", took, said]).rstrip()
