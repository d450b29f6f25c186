"""How many steps a polish takes: what was asked for, whatever else the machine does, or a word about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import stripes, tiny
from torch import nn

import convsurgeon as cs
from convsurgeon.calibration import CalibrationResult, Polish, PolishRun, _polish, calibrate_and_report
from convsurgeon.cli import _calibrating
from convsurgeon.errors import DivergenceError
from convsurgeon.progress import Progress, be_silent

IMAGES, _ = stripes(80)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Let steps seem to take some seconds; what the loop was told is listed."""
    told: list[dict[str, Any]] = []
    distill = _polish.distill

    def set_to(seconds: float, *, later: float | None = None) -> list[dict[str, Any]]:
        def run(*args: Any, **more: Any) -> Any:
            steps = len(args[2])
            told.append({"steps": steps, "real": more["report"] is not be_silent, **more})
            result = distill(*args, **more)
            result.metrics["seconds"] = 0.5 + steps * (later or seconds if told[-1]["real"] else seconds)
            return result

        monkeypatch.setattr(_polish, "distill", run)
        return told

    return set_to


def calibrated(polish: Polish) -> tuple[CalibrationResult, list[str]]:
    said: list[Progress] = []
    torch.manual_seed(0)
    teacher = tiny()
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, polish=polish, report=said.append)
    return result, [event.message for event in said if event.message]


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.3])
def test_all_steps_are_taken_where_they_fit(clock: Any, seconds: float) -> None:
    told = clock(seconds)
    result, said = calibrated(Polish(steps=40, seconds=20.0, learning_rate=0.02))
    assert result.polish is not None
    assert (result.polish.steps, result.polish.wanted, result.polish.cut) == (40, 40, "")
    assert told[-1]["steps"] == 40
    assert not any("only" in line for line in said)
    assert result.stages[-1].note in ("", "undone: it was further off")


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, 20), (0.75, 26), (1.9, 10), (100.0, 10)])
def test_a_cut_is_said_before_and_afterwards(clock: Any, seconds: float, steps: int) -> None:
    told = clock(seconds)
    result, said = calibrated(Polish(steps=3000, seconds=20.0, learning_rate=0.02))
    run = result.polish
    assert run is not None
    assert (run.steps, run.wanted, told[-1]["steps"]) == (steps, 3000, steps)
    assert result.stages[-1].note.endswith(f"{steps} of 3,000 steps")
    (line,) = [line for line in said if "only" in line]
    found = re.fullmatch(
        rf"polish: only {steps} of 3000 steps fit into 20 s; for all of them say "
        r"Polish\(seconds=(\d+)\) \(--polish-minutes (\d+)\)",
        line,
    )
    assert found is not None
    # enough, by the time that was measured; where steps are long, the first one alone is, with what comes before it
    assert 3000 * seconds <= int(found[1]) == 60 * int(found[2]) <= 3000 * (seconds + 0.5) + 60


def test_trials_of_the_rate_count_and_the_run_has_a_schedule_for_its_own_steps(clock: Any) -> None:
    told = clock(0.05)
    result, _ = calibrated(Polish(steps=300, seconds=10.0))  # 200 fit
    run = result.polish
    assert run is not None
    assert (run.steps, run.trial_steps, run.wanted, run.cut) == (180, 20, 300, "200 of 300 steps")
    assert [each["steps"] for each in told[-3:]] == [10, 10, 180]
    assert [each["real"] for each in told[-3:]] == [False, False, True]


@pytest.mark.parametrize("steps", [30, 90])
def test_the_schedule_is_that_of_the_steps_that_there_are(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Whatever was asked for: the rate falls to zero, and the progress, by which blocks fade, runs to 1."""
    from convsurgeon.distillation._muon import Muon
    from convsurgeon.distillation.methods.imitate import Imitate

    seen: list[tuple[float, float]] = []
    step, forward = Muon.step, Imitate.forward
    progress: list[float] = []

    def look(self: Imitate, *args: Any) -> Any:
        progress.append(self.progress)
        return forward(self, *args)

    def note(self: Muon, closure: Any = None) -> Any:
        seen.append((progress[-1], self.param_groups[0]["lr"]))
        return step(self, closure)

    monkeypatch.setattr(Imitate, "forward", look)
    monkeypatch.setattr(Muon, "step", note)
    monkeypatch.setattr(_polish, "_time_step", lambda _run: 1.0)
    calibrated(Polish(steps=5000, seconds=float(steps), learning_rate=0.02))
    assert [share for share, _ in seen] == pytest.approx([index / steps for index in range(steps)])
    assert seen[-1][1] < 0.02 * 0.01
    assert max(rate for _, rate in seen) > 10 * seen[-1][1]


@pytest.mark.parametrize(("later", "late"), [(0.1, False), (0.14, False), (0.2, True), (3.0, True), (0.01, False)])
def test_a_polish_that_takes_longer_than_expected_says_so(clock: Any, later: float, late: bool) -> None:
    clock(0.1, later=later)
    result, said = calibrated(Polish(steps=60, learning_rate=0.02))
    assert result.polish is not None
    assert result.polish.step_seconds == pytest.approx(later + 0.5 / 60)
    lines = [line for line in said if "were expected" in line]
    assert len(lines) == late
    if late:
        assert lines[0] == f"polish: took {_polish._minutes(0.5 + 60 * later)} where 6 s were expected"


@pytest.mark.parametrize("slow", [1, 2])
def test_a_hiccup_while_steps_are_timed_does_not_cut_them(slow: int) -> None:
    """Of the measurements the faster one counts."""
    calls: list[int] = []

    def run(steps: int, _rate: float, _report: Any) -> tuple[nn.Module, float]:
        calls.append(steps)
        return nn.Identity(), 0.5 + 0.1 * steps + (30.0 if len(calls) - 1 == slow else 0.0)

    assert _polish._time_step(run) == pytest.approx(0.1)
    assert calls == [1, 6, 6]


def test_long_steps_are_timed_once() -> None:
    calls: list[int] = []

    def run(steps: int, _rate: float, _report: Any) -> tuple[nn.Module, float]:
        calls.append(steps)
        return nn.Identity(), 9.0 * steps

    assert _polish._time_step(run) == 9.0
    assert calls == [1]


def test_what_was_done_is_plain_data(clock: Any) -> None:
    clock(1.0)
    result, _ = calibrated(Polish(steps=50, seconds=20.0, learning_rate=0.02))
    assert result.to_dict()["polish"] == {
        "steps": 20,
        "trial_steps": 0,
        "wanted_steps": 50,
        "step_seconds": 1.025,
        "learning_rate": 0.02,
        "batch_size": 64,
    }


def test_a_polish_that_diverges_took_no_steps_worth_a_word(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_args: Any, **_more: Any) -> Any:
        raise DivergenceError("the loss is nan at step 1")

    monkeypatch.setattr(_polish, "distill", diverge)
    result, said = calibrated(Polish(steps=20))
    assert result.polish is not None
    assert (result.polish.steps, result.polish.cut, result.polish.step_seconds) == (0, "", 0.0)
    assert not any("expected" in line for line in said)


def test_steps_and_not_seconds_are_the_measure_by_default() -> None:
    assert (Polish().steps, Polish().seconds) == (2000, 1800.0)
    assert _calibrating._MINUTES == 30


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (
            PolishRun(None, 1800, 0.02, 64, "", 2000, 200, 0.0512),
            "2,000 of 2,000 steps of 64 images, 200 of them to find",
        ),
        (PolishRun(None, 700, 0.02, 32, "", 2000, 0, 2.5), "700 of 2,000 steps of 32 images, 2.5 s a step"),
    ],
)
def test_the_line_of_the_command_line(run: PolishRun, line: str) -> None:
    assert _calibrating._steps_line(run).startswith(f"polish: {line}")
