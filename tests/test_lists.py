"""The lists that people read name every variant there is, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from convsurgeon import ops
from convsurgeon.distillation import methods

ROOT = Path(__file__).parents[1]


def first_column(file: str, header: str) -> set[str]:
    """Return the names in backticks in the first column of the Markdown table whose first header is given."""
    table = (ROOT / file).read_text().split(f"| {header} |", 1)[1].split("\n\n", 1)[0]
    return set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("file", "header", "names"),
    [
        ("README.md", "op", ops.names()),
        ("README.md", "method", methods.names()),
        ("docs/distillation.md", "method", methods.names()),
    ],
)
def test_tables_name_every_variant(file: str, header: str, names: list[str]) -> None:
    assert first_column(file, header) == set(names)


def test_verbs_in_readme_are_those_of_the_program() -> None:
    verbs = {path.stem for path in (ROOT / "convsurgeon" / "cli").glob("*.py") if not path.stem.startswith("_")}
    text = (ROOT / "README.md").read_text().split("| verb |", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"^\| `convsurgeon (\w+)", text, flags=re.MULTILINE)) == verbs
