"""What `convert` prints, line by line, against files under `golden/`; `pytest --update-golden` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import Program, mynet

GOLDEN = Path(__file__).with_name("golden")
SHAPE = ("--input-shape", "1,3,16,16")
CASES = {
    "shift": ("--to", "shift", *SHAPE),
    "no-shape": ("--to", "depthwise"),
    "mixed": (
        *("--to", "group", "--option", "group.groups=3", "--option", "shift.assignment=fixed", *SHAPE),
        *("--map", "stem=shift", "--map", "point=bsconv", "--keep", "conv1"),
    ),
}


def compare(name: str, text: str, *, update: bool) -> None:
    """Compare with a golden file, or write it."""
    path = GOLDEN / name
    if update:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.fixture
def program(tmp_path: Path) -> Program:
    net = mynet(tmp_path)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    return Program(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_convert_prints(program: Program, request: pytest.FixtureRequest, case: str) -> None:
    outcome = program("convert", "mynet:Net", "--weights", "weights.pt", "--dry-run", *CASES[case])
    lines = (line.rstrip() for line in outcome.done().out.splitlines())
    text = outcome.err + "".join(f"{line}\n" for line in lines)
    compare(f"convert-{case}.txt", text, update=request.config.getoption("--update-golden"))


def test_convert_writes(program: Program, request: pytest.FixtureRequest) -> None:
    outcome = program("convert", "mynet:Net", "--weights", "weights.pt", *CASES["mixed"]).done()
    name = "Net.group-shift"
    assert outcome.out.endswith(f"student: {name}.safetensors\nplan file: {name}.plan.json\n")
    plan = (program.folder / f"{name}.plan.json").read_text(encoding="utf-8")
    compare("convert-mixed.plan.json", plan, update=request.config.getoption("--update-golden"))


def test_a_golden_file_can_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_cli_golden.GOLDEN", tmp_path)
    compare("a.txt", "one\n", update=True)
    compare("a.txt", "one\n", update=False)
    with pytest.raises(AssertionError):
        compare("a.txt", "two\n", update=False)
