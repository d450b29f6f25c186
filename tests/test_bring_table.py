"""docs/bring-your-own.md: every row of its tables is run."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from brought import write_brought
from command import Program, mynet
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

import convsurgeon as cs

PAGE = Path(__file__).parent.parent / "docs" / "bring-your-own.md"


@dataclass(frozen=True)
class Row:
    """One row: what people bring, what to type, what is printed."""

    what: str
    typed: str
    printed: tuple[str, ...]
    refused: bool


def rows(*, of_commands: bool) -> list[Row]:
    """Return the rows with a command, or those with Python."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else []
        if len(cells) == 3 and cells[1].startswith("`") and cells[1].startswith("`convsurgeon ") == of_commands:
            what, typed, printed = cells
            spans = tuple(re.findall(r"`([^`]+)`", printed))
            found.append(Row(what, typed.strip("`"), spans, printed.startswith("refused:")))
    return found


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brought(tmp_path_factory.mktemp("brought"))


@pytest.mark.parametrize("row", rows(of_commands=True), ids=lambda row: row.what)
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


class Embedder(nn.Module):
    """An embedding network that nobody has trained as a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.embed = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.embed(torch.relu(self.conv1(torch.relu(self.stem(x)))).mean((2, 3)))
        return embedding


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of TorchScript
@pytest.mark.parametrize("row", rows(of_commands=False), ids=lambda row: row.what)
def test_what_is_printed_in_python(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net: nn.Module = Embedder().eval() if "linear" in row.what or "classifier" in row.what else mynet(tmp_path)
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    names = {
        "cs": cs,
        "nn": nn,
        "torch": torch,
        "AveragedModel": AveragedModel,
        "net": net,
        "images": images,
        "data": TensorDataset(images, torch.arange(32) % 3),
        "say": lambda event: print(event.message),
    }
    monkeypatch.chdir(tmp_path)
    if row.refused:
        with pytest.raises(cs.errors.ConvSurgeonError) as caught:
            exec(row.typed, names)
        said = str(caught.value)
        assert "\n" not in said
    else:
        exec(row.typed, names)
        said = capsys.readouterr().out
    for each in row.printed:
        assert each in said, said


def test_the_tables_are_read() -> None:
    commands, python = rows(of_commands=True), rows(of_commands=False)
    assert len(commands) > 20
    assert len(python) > 5
    assert all(row.printed for row in (*commands, *python))
    assert any(row.refused for row in commands)
    text = PAGE.read_text()
    assert text.count("| `convsurgeon ") == len(commands)
    assert len(re.findall(r"^\| [^|]+ \| `", text, flags=re.MULTILINE)) == len(commands) + len(python)
