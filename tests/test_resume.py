"""A run that was killed goes on as if nothing had happened, at every step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from killable_run import EPOCHS, STEPS_PER_EPOCH, train
from nets import assert_bit_identical

from convsurgeon.distillation import DistillResult, methods
from convsurgeon.storage import load_checkpoint

HERE = Path(__file__).parent
STEPS = STEPS_PER_EPOCH * EPOCHS


@cache
def uninterrupted(method: str) -> DistillResult:
    return train(method, None)


def assert_same(found: DistillResult, expected: DistillResult) -> None:
    assert_bit_identical(found.student, expected.student)
    assert (found.teacher is None) == (expected.teacher is None)
    if found.teacher is not None and expected.teacher is not None:
        assert_bit_identical(found.teacher, expected.teacher)
    for key in ("student", "teacher_before", "teacher_after", "chosen"):
        assert found.metrics[key] == expected.metrics[key], key


def start(method: str, folder: Path, *, pause: float) -> subprocess.Popen[bytes]:
    """Start a slow run in a process of its own and wait until it is in the middle of an epoch."""
    command = [sys.executable, str(HERE / "killable_run.py"), method, str(folder), str(pause)]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / "last.pt").exists() and load_checkpoint(folder / "last.pt")["step"] > STEPS_PER_EPOCH:
            return process
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"the run made no progress: {process.communicate()[1].decode()}")


@pytest.mark.parametrize("method", ["joint", "ensemble"])
def test_killed_and_resumed_is_as_uninterrupted(method: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(method, folder, pause=0.01)
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    process.communicate()
    step = load_checkpoint(folder / "last.pt")["step"]
    assert STEPS_PER_EPOCH < step < STEPS
    seen: list[None] = []
    found = train(method, folder, resume=True, on_read=lambda: seen.append(None))
    assert_same(found, uninterrupted(method))
    # it did go on, and did not start again: the epochs behind it were not read
    assert len(seen) <= 8 * (STEPS - step // STEPS_PER_EPOCH * STEPS_PER_EPOCH) + 2 * 8


def test_ctrl_c_ends_cleanly_and_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("joint", folder, pause=0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 130, said
    step = load_checkpoint(folder / "last.pt")["step"]
    assert said.strip() == f"stopped after step {step} of {STEPS}; go on by --resume {folder}"
    assert STEPS_PER_EPOCH < step < STEPS
    assert_same(train("joint", folder, resume=True), uninterrupted("joint"))


class Power(BaseException):
    """The power goes off."""


def after(reads: int, do: Any) -> Any:
    """A callback that acts once so many images were read."""
    count = iter(range(10**6))
    return lambda: do() if next(count) == reads else None


def fail() -> None:
    raise Power


@pytest.mark.parametrize("method", methods.names())
def test_a_crash_at_any_step_and_a_second_one(method: str, tmp_path: Path) -> None:
    # images are read one batch ahead, and one batch before the start
    for first, second in ((0, 8), (9, 40), (57, 20), (8 * 7, 8 * 3), (8 * 17, 1)):
        folder = tmp_path / f"{first}"
        with pytest.raises(Power):
            train(method, folder, on_read=after(first, fail))
        resume = (folder / "config.json").exists()
        with pytest.raises(Power):
            train(method, folder, resume=resume, on_read=after(second, fail))
        resume = (folder / "config.json").exists()
        assert_same(train(method, folder, resume=resume), uninterrupted(method))


def test_a_run_with_muon_goes_on_as_it_was(tmp_path: Path) -> None:
    expected = train("frozen", None, optimizer="muon")
    with pytest.raises(Power):
        train("frozen", tmp_path, optimizer="muon", on_read=after(60, fail))
    assert_same(train("frozen", tmp_path, resume=True, optimizer="muon"), expected)
    plain = train("frozen", None)
    moved = [
        any(not torch.equal(a, b) for a, b in zip(expected.student.parameters(), net.parameters(), strict=True))
        for net in (plain.student, expected.student)
    ]
    assert moved == [True, False]


def test_a_crash_between_the_files_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convsurgeon.distillation import RunFolder

    for index, name in enumerate(["save_best", "save_last", "note"]):
        folder = tmp_path / name
        write = getattr(RunFolder, name)
        calls: list[int] = []

        def once(
            self: RunFolder,
            what: Any,
            write: Any = write,
            calls: list[int] = calls,
            late: int = 2 + 8 * (index == 1),
        ) -> None:
            calls.append(1)
            if len(calls) == late:
                raise Power
            write(self, what)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, name, once)
            with pytest.raises(Power):
                train("joint", folder)
        found = train("joint", folder, resume=True)
        assert_same(found, uninterrupted("joint"))
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [(event["event"], event["step"]) for event in events] == [
            ("start", 0),
            *(("epoch", STEPS_PER_EPOCH * (epoch + 1)) for epoch in range(EPOCHS)),
        ]


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("limit", [1, 2, None])
def test_ctrl_c_at_the_end_of_an_epoch_loses_no_validation(limit: int | None, tmp_path: Path) -> None:
    expected = train("joint", None, limit_batches=limit)
    steps = min(limit or STEPS_PER_EPOCH, STEPS_PER_EPOCH) * EPOCHS
    for reads in (8 * 2, 8 * 4, 8 * 6):
        folder = tmp_path / str(reads)
        handler = signal.getsignal(signal.SIGINT)
        stops: list[str] = []
        found = None
        while found is None and len(stops) <= steps:
            try:
                found = train("joint", folder, resume=bool(stops), limit_batches=limit, on_read=after(reads, interrupt))
            except KeyboardInterrupt as stop:
                stops.append(str(stop))
        assert found is not None
        assert stops
        assert all("go on by --resume" in said for said in stops)
        assert signal.getsignal(signal.SIGINT) is handler
        assert_same(found, expected)
        assert len(found.metrics["history"]) == EPOCHS


def test_ctrl_c_without_a_folder_says_that_nothing_was_kept() -> None:
    with pytest.raises(KeyboardInterrupt, match="nothing was kept: no run folder"):
        train("frozen", None, on_read=after(20, interrupt))


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    def twice() -> None:
        interrupt()
        interrupt()
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        train("frozen", None, on_read=after(20, twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_random_state_of_the_caller_has_no_say() -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    found = train("joint", None)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(found, uninterrupted("joint"))
