"""How long ONNX files take, timed against one another."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from convsurgeon.delivery._session import session
from convsurgeon.errors import ExportError, one_line
from convsurgeon.progress import Progress, Report, be_silent

_WARM_UP = 5
_SEED = 0
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Latency:
    """What one call of a file takes, in milliseconds of wall time.

    Args:
        name: the file's name in the comparison.
        threads: threads inside one operator.
        median_ms: the median.
        low_ms: the 10th percentile.
        high_ms: the 90th percentile.
        runs: how many calls were timed.
    """

    name: str
    threads: int
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def measure_latency(
    models: Mapping[str, str | Path],
    *,
    threads: Sequence[int] | None = None,
    rounds: int = 50,
    batch_size: int = 1,
    report: Report = be_silent,
) -> list[Latency]:
    """Time files in turns, so that whatever else the machine does falls on all of them alike.

    Each round calls every file once, in an order that alternates; a few rounds before are not counted.

    Args:
        models: files by name.
        threads: thread counts to time with, by default one and all cores.
        rounds: timed calls per file and thread count.
        batch_size: images per call, where the file leaves the batch open.
        report: is told of each round.

    Raises:
        ExportError: if a file cannot be read or run, or its input size is not known.
    """
    counts = list(dict.fromkeys(threads if threads is not None else (1, os.cpu_count() or 1)))
    if not models or not counts or min(counts) < 1 or rounds < 1 or batch_size < 1:
        raise ExportError(
            "timing needs a file, and threads, rounds and batch_size of at least 1; "
            f"got {len(models)} files, threads {counts}, rounds {rounds}, batch_size {batch_size}"
        )
    names = list(models)
    results: list[Latency] = []
    for index, count in enumerate(counts):
        sessions = {name: session(path, threads=count) for name, path in models.items()}
        feeds = {name: _feed(opened, batch_size, name) for name, opened in sessions.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(-_WARM_UP, rounds):
            for name in names if turn % 2 else reversed(names):
                elapsed = _call(sessions[name], feeds[name], name)
                if turn >= 0:
                    times[name].append(elapsed)
            if turn >= 0:
                report(Progress("latency", index * rounds + turn + 1, len(counts) * rounds))
        results += [_summary(name, count, taken) for name, taken in times.items()]
    return results


def ratio(latencies: Sequence[Latency], before: str, after: str, *, threads: int) -> float:
    """Return how many times faster `after` is than `before`: the quotient of their medians.

    Raises:
        ExportError: if either was not timed with that number of threads.

    >>> timed = [Latency("a", 1, 6.0, 5.0, 7.0, 50), Latency("b", 1, 2.0, 1.9, 2.1, 50)]
    >>> ratio(timed, "a", "b", threads=1)
    3.0
    """
    medians = {latency.name: latency.median_ms for latency in latencies if latency.threads == threads}
    for name in (before, after):
        if name not in medians:
            raise ExportError(
                f"{name!r} was not timed with threads={threads}; timed: "
                + (", ".join(f"{latency.name!r} with {latency.threads}" for latency in latencies) or "nothing")
            )
    return medians[before] / medians[after]


def _feed(opened: onnxruntime.InferenceSession, batch_size: int, name: str) -> dict[str, np.ndarray]:
    """Return random inputs of the sizes that the file names."""
    generator = np.random.default_rng(_SEED)
    feed = {}
    for entry in opened.get_inputs():
        shape = [
            batch_size if index == 0 and not isinstance(size, int) else size for index, size in enumerate(entry.shape)
        ]
        if any(not isinstance(size, int) for size in shape) or entry.type not in _DTYPES:
            raise ExportError(
                f"{name}: cannot make an input {entry.name!r} of {entry.type} and shape {entry.shape}; "
                "every size but the batch must be a number"
            )
        if shape and shape[0] != batch_size:
            raise ExportError(f"{name}: the file's batch size is fixed to {shape[0]}; batch_size is {batch_size}")
        feed[entry.name] = _draw(generator, shape, _DTYPES[entry.type])
    return feed


def _draw(generator: np.random.Generator, shape: Sequence[int], dtype: Any) -> np.ndarray:
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2, shape).astype(dtype)


def _call(opened: onnxruntime.InferenceSession, feed: dict[str, np.ndarray], name: str) -> float:
    """Return the milliseconds of one call."""
    start = time.perf_counter_ns()
    try:
        opened.run(None, feed)
    except Exception as error:  # onnxruntime's classes share no base below Exception
        raise ExportError(f"{name}: onnxruntime cannot run the file ({one_line(error)})") from error
    return (time.perf_counter_ns() - start) / 1e6


def _summary(name: str, threads: int, taken: Sequence[float]) -> Latency:
    low, median, high = np.percentile(taken, [10, 50, 90])
    return Latency(name, threads, float(median), float(low), float(high), len(taken))
