"""`convsurgeon demo`: the whole pipeline, in short form always, and once as people run it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command import Program

import convsurgeon as cs
from convsurgeon import demo
from convsurgeon.data import load_data

NAMES = ["report.json", "student.onnx", "student.shift.pt", "teacher.onnx", "teacher.pt"]


def test_short_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch each: everything but good accuracies."""
    monkeypatch.setattr("convsurgeon.demo._TEACHER_EPOCHS", 1)
    monkeypatch.setattr("convsurgeon.demo._STUDENT_EPOCHS", 1)
    program = Program(tmp_path)
    outcome = program("demo").done()
    assert program.files() == [f"convsurgeon-demo/{name}" for name in NAMES]
    steps = [line for line in outcome.err.splitlines() if re.match(r"\d/\d ", line)]
    assert [step.split()[0] for step in steps] == ["1/5", "2/5", "3/5", "4/5", "5/5"]

    written = re.findall(r"^wrote (.+)$", outcome.out, flags=re.MULTILINE)
    assert sorted(written) == program.files()
    for row in ("parameters", "MACs, one image", "ONNX file", "test accuracy", "latency, 1 thread", "ONNX parity"):
        assert f"│ {row}" in outcome.out

    report = json.loads((tmp_path / "convsurgeon-demo/report.json").read_text())
    folder = tmp_path / "convsurgeon-demo"
    teacher, student = cs.load(folder / "teacher.pt"), cs.load(folder / "student.shift.pt")
    for side, network in (("before", teacher), ("after", student)):
        assert report[side]["params"] == sum(parameter.numel() for parameter in network.parameters())
        assert report[side]["accuracy"] == cs.evaluate(network, load_data("digits").test).accuracy
        assert report[side]["delivery"]["parity"]["real_images"] is True
    assert cs.evaluate(folder / "student.onnx", load_data("digits").test).accuracy == report["after"]["accuracy"]
    assert report["before"]["converted_macs"] == 9 * report["after"]["converted_macs"] > 0
    assert {decision.op for decision in cs.plan_of(student).converted} == {"shift"}


def test_options_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run_demo(folder: Path, **kwargs: object) -> None:
        seen.update(kwargs, folder=folder, threads=torch.get_num_threads())
        raise cs.errors.DataError("far enough")

    monkeypatch.setattr("convsurgeon.demo.run_demo", run_demo)
    args = ("demo", "-o", "here", "--to", "group", "--seed", "7", "--threads", "2")
    assert Program(tmp_path)(*args).error == "far enough"
    del seen["report"]
    assert seen == {"folder": Path("here"), "to": "group", "seed": 7, "threads": 2}


def test_seed_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same student, another one another; the process's own random state does not matter."""

    class EnoughError(Exception):
        """The student is saved; the rest would only cost time."""

    def compare(*args: object, **kwargs: object) -> None:
        raise EnoughError

    monkeypatch.setattr(demo, "_TEACHER_EPOCHS", 1)
    monkeypatch.setattr(demo, "_STUDENT_EPOCHS", 1)
    monkeypatch.setattr(demo, "compare", compare)

    def student(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(1)
        with pytest.raises(EnoughError):
            demo.run_demo(tmp_path, seed=seed)
        return cs.load(tmp_path / "student.shift.pt").state_dict()

    first, again, other = student(0), student(0), student(1)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["head.2.weight"], other["head.2.weight"])


@pytest.mark.slow
def test_as_people_run_it(tmp_path: Path) -> None:
    """The promise of the README, for seed 0."""
    data = Program(tmp_path)("demo", "--json").done().data
    before, after = data["before"], data["after"]
    assert before["converted_macs"] / after["converted_macs"] >= 5
    assert after["accuracy"] >= before["accuracy"] - 0.01
    assert before["accuracy"] > 0.95
    assert data["closed_form"] < after["accuracy"]
    assert 0 <= data["teacher_ended"] <= 1
    for side in (before, after):
        assert side["delivery"]["parity"]["max_rel"] <= 1e-4
        assert side["delivery"]["parity"]["real_images"] is True
    assert sorted(Path(path).name for path in data["paths"]) == NAMES
    for path in data["paths"]:
        assert (tmp_path / path).is_file()
