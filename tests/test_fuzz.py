"""Mutated files: what comes out of the loaders and the plan parser is a one-line refusal, or a model."""

from __future__ import annotations

import collections
import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convsurgeon.storage
from convsurgeon.storage import _pickles
from convsurgeon.surgery import Plan

PROGRAM = Path(__file__).parent.parent / "docs" / "benchmarks" / "fuzz.py"
CASES = 200


def load_program() -> ModuleType:
    """Return the benchmark as a module: the mutations are those of its hundred thousand cases."""
    spec = importlib.util.spec_from_file_location("fuzz", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(PROGRAM.parent))  # as where it runs as a program
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(PROGRAM.parent))
    return module


fuzz = load_program()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return fuzz.make_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_valid_files_load(seeds: dict[str, bytes], kind: str, tmp_path: Path) -> None:
    stages: collections.Counter[str] = collections.Counter()
    with fuzz.noticing(stages):
        fuzz.consume(kind, seeds[kind], tmp_path / "case.pt", stages)
    assert stages == {"past the header": 1, "loaded": 1}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_files_are_loaded_or_refused(seeds: dict[str, bytes], kind: str, tmp_path: Path) -> None:
    stages: collections.Counter[str] = collections.Counter()

    @settings(max_examples=CASES, database=None, suppress_health_check=list(HealthCheck))
    @given(chance=st.randoms(use_true_random=False))
    def check(chance: random.Random) -> None:
        how, data = fuzz.mutate(kind, seeds[kind], chance)
        stages[how] += 1
        fuzz.consume(kind, data, tmp_path / "case.pt", stages)

    with fuzz.noticing(stages):
        check()
    assert stages["past the header"] > CASES / 5
    assert stages["structure"] > CASES / 10


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_files_cut_anywhere_are_loaded_or_refused(seeds: dict[str, bytes], kind: str, tmp_path: Path) -> None:
    data = seeds[kind]
    for length in sorted({*range(0, 64, 7), *(len(data) * n // 40 for n in range(40)), len(data) - 1}):
        stages: collections.Counter[str] = collections.Counter()
        fuzz.consume(kind, data[:length], tmp_path / "case.pt", stages)
        # the last byte of a plan is a line's end
        assert not stages["loaded"] or (kind == "plan" and length == len(data) - 1)


def test_the_fuzzer_sees_a_loader_that_is_broken(
    seeds: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> object:
        raise KeyError("a traceback")

    for owner, name, kind in (
        (_pickles, "_unreadable", "module"),
        (Plan, "from_json", "plan"),
        (convsurgeon.storage, "load", "student"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            _, _, stages, failures = fuzz.run_in_process(seeds, kind, range(40), tmp_path)
        assert stages["bytes"] + stages["structure"] == 40
        assert len(failures) > 5
        assert "a traceback" in failures[0][1]


def test_the_program_runs_and_writes(tmp_path: Path) -> None:
    written = tmp_path / "fuzz.md"
    command = [sys.executable, str(PROGRAM), "--cases", "50", "--write", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = written.read_text()
    assert "50 files, 0 tracebacks" in text
    assert all(f"| {kind} |" in text for kind in fuzz.KINDS)
