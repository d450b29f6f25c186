"""What the README and the docs say works: their Python runs, their commands exist, the examples finish."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command import Program

from convsurgeon import cli, ops

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
VERBS = [module.name for module in pkgutil.iter_modules(cli.__path__) if not module.name.startswith("_")]
NOT_RUN = "<!-- no-run -->"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its first line's number, its text, and whether it is to be run."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found, before = [], ""
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        if fence := re.match(r"(\s*)```(\w*)", line):
            inside = []
            for _, each in lines:
                if each.strip() == "```":
                    break
                inside.append(each.removeprefix(fence[1]))
            found.append(Block(page, number + 1, fence[2], "\n".join(inside), runs=before != NOT_RUN))
        if line.strip():
            before = line.strip()
    return found


def code_of(page: Path, text: str) -> list[str]:
    """Return every line of code but Python's: of fenced blocks, continued lines joined, and between backticks."""
    shell = [block.text for block in blocks(page, text) if block.language != "python"]
    fenced = [line for each in shell for line in each.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def mistakes(code: list[str], flags: dict[str, set[str]]) -> list[str]:
    """Return what the code says about the command line that is not so."""
    found = []
    for line in code:
        command = re.search(r"(?<![\w/.-])convsurgeon +([a-z]\w*)", line)
        if command is None and not line.startswith("--"):
            continue
        verb = command[1] if command else None
        if verb is not None and verb not in flags:
            found.append(f"no verb {verb}: {line}")
            continue
        known = set().union(*flags.values()) if verb is None else flags[verb]
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line):
            if flag not in known:
                found.append(f"no flag {flag}: {line}")
    return found


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The flags of each verb, as its help shows them."""
    program = Program(tmp_path_factory.mktemp("help"))
    return {verb: set(re.findall(r"--[a-z][a-z-]*", program(verb, "--help").done().out)) for verb in VERBS}


PYTHON = [block for page in PAGES for block in blocks(page, page.read_text()) if block.language == "python"]


@pytest.mark.parametrize("block", [each for each in PYTHON if each.runs], ids=lambda block: block.name)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile(block.text, block.name, "exec"), {"__name__": "__docs__"})


@pytest.mark.parametrize("block", [each for each in PYTHON if not each.runs], ids=lambda block: block.name)
def test_python_that_is_not_run_is_python(block: Block) -> None:
    compile(block.text, block.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path, flags: dict[str, set[str]]) -> None:
    assert mistakes(code_of(page, page.read_text()), flags) == []


def test_the_catalogue_says_what_the_ops_say() -> None:
    page = (ROOT / "docs" / "ops.md").read_text()
    for op in map(ops.get, ops.names()):
        (row,) = re.findall(rf"^\| `{op.name}` \| (.+) \| (\d+ %) \| \d+ % \| (.+) \|$", page, flags=re.MULTILINE)
        keeps, share, slow = row
        assert op.keeps == f"{keeps}; {share} of the energy of a trained ResNet-20"
        assert op.slow == slow


def test_readme_shows_every_verb() -> None:
    shown = re.findall(r"convsurgeon +([a-z]\w*)", "\n".join(code_of(ROOT, (ROOT / "README.md").read_text())))
    assert set(shown) == set(VERBS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_finishes(example: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "CONVSURGEON_EXAMPLE_FAST": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    assert "Warning" not in ran.stderr


PAGE = f"""\
Say `convsurgeon inspect MODEL --input-shape 1` or `--force`, see `convsurgeon.ops`.

```python
x = 1
```

{NOT_RUN}
```python
y = 2
```

- in a list:

  ```console
  $ convsurgeon convert m.pt \\
      --to shift
  ```
"""


def test_pages_are_read_as_meant(flags: dict[str, set[str]]) -> None:
    found = [(block.language, block.line, block.text, block.runs) for block in blocks(ROOT, PAGE)]
    assert found[:2] == [("python", 4, "x = 1", True), ("python", 9, "y = 2", False)]
    assert found[2] == ("console", 15, "$ convsurgeon convert m.pt \\\n    --to shift", True)
    code = code_of(ROOT, PAGE)
    assert "convsurgeon inspect MODEL --input-shape 1" in code
    assert mistakes(code, flags) == []
    assert len(mistakes(code_of(ROOT, PAGE.replace("--to", "--too")), flags)) == 1
    assert len(mistakes(code_of(ROOT, PAGE.replace("--force", "--farce")), flags)) == 1
    assert len(mistakes(code_of(ROOT, PAGE.replace("inspect", "dissect")), flags)) == 1
    assert len(mistakes(code_of(ROOT, PAGE.replace("inspect", "ops")), flags)) == 1  # which has no --input-shape


def test_there_is_something_to_run() -> None:
    assert any(block.page.name == "README.md" and block.runs for block in PYTHON)
    assert len(EXAMPLES) >= 2
