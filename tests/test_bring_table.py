"""docs/bring-your-own.md: every row of its tables is run."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from brought import write_brought
from command import Program

PAGE = Path(__file__).parent.parent / "docs" / "bring-your-own.md"


@dataclass(frozen=True)
class Row:
    """One row: what people bring, what to type, what is printed."""

    what: str
    typed: str
    printed: tuple[str, ...]
    refused: bool


def rows() -> list[Row]:
    """Return the rows with a command."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else []
        if len(cells) == 3 and cells[1].startswith("`convsurgeon "):
            what, typed, printed = cells
            spans = tuple(re.findall(r"`([^`]+)`", printed))
            found.append(Row(what, typed.strip("`"), spans, printed.startswith("refused:")))
    return found


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brought(tmp_path_factory.mktemp("brought"))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.what)
def test_what_is_printed(row: Row, brought: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(brought, tmp_path / "work")
    program = Program(folder)
    before = program.files()
    name, *args = shlex.split(row.typed)
    assert name == "convsurgeon"
    outcome = program(*args)
    if row.refused:
        said = outcome.error
        assert program.files() == before
    else:
        outcome.done()
        said = outcome.out + outcome.err
    for each in row.printed:
        assert each in said, said


def test_the_tables_are_read() -> None:
    assert len(rows()) > 20
    assert all(row.printed for row in rows())
    assert any(row.refused for row in rows())
    text = PAGE.read_text()
    assert text.count("| `convsurgeon ") == len(rows())
