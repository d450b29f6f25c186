"""The command line in tests: in this process, or as the installed program; and a stranger's network and pictures."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from convsurgeon.cli._app import main

INSTALLED = Path(sys.executable).with_name("convsurgeon")

MYNET = '''\
"""A stranger's network: a file in the working directory."""

import torch
from torch import nn


class Net(nn.Module):
    """Small pictures in color, a few classes."""

    def __init__(self, num_classes: int = 3, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.point(self.conv2(x)))
        return self.fc(x.mean((2, 3)))
'''


@dataclass(frozen=True)
class Outcome:
    """What one command came to."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> str:
        """The message of a user's error: one `error: ...` line, the last one, nothing on stdout, status 2."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], self.err
        return lines[-1].removeprefix("error: ")

    def done(self) -> Outcome:
        """Return itself, having checked that the command did its work."""
        assert self.code == 0, self.err
        assert "Traceback" not in self.err
        assert "Warning" not in self.err
        assert "error:" not in self.err
        return self


class Program:
    """`convsurgeon`, run in this process in a folder of its own, without a trace in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *args: str) -> Outcome:
        """Run it with these arguments."""
        out, err = io.StringIO(), io.StringIO()
        threads = torch.get_num_threads()
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.random.fork_rng(devices=[]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.chdir(self.folder)
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "argv", ["convsurgeon", *args])
            forget_mynet()
            with pytest.raises(SystemExit) as stopped:
                main()
        torch.set_num_threads(threads)
        assert isinstance(stopped.value.code, int)
        return Outcome(stopped.value.code, out.getvalue(), err.getvalue())

    def files(self) -> list[str]:
        """Return every file and empty folder below the folder, caches of Python aside."""
        return list_files(self.folder)


def installed(folder: Path, *args: str, timeout: float = 120) -> Outcome:
    """Run the installed program in a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [INSTALLED, *args], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Outcome(ran.returncode, ran.stdout, ran.stderr)


def list_files(folder: Path) -> list[str]:
    """Return every file and empty folder below `folder`, sorted; caches of Python are left out."""
    found = [each for each in folder.rglob("*") if "__pycache__" not in each.parts]
    return sorted(str(each.relative_to(folder)) for each in found if each.is_file() or not any(each.iterdir()))


def forget_mynet() -> None:
    """Let the next import of `mynet` look for the file again."""
    sys.modules.pop("mynet", None)
    importlib.invalidate_caches()


def mynet(folder: Path, *, seed: int = 0, **kwargs: Any) -> nn.Module:
    """Write `mynet.py` into a folder, and return a `mynet.Net` in eval mode, whose norm has seen a batch."""
    (folder / "mynet.py").write_text(MYNET)
    forget_mynet()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(sys, "path", [str(folder), *sys.path])
        torch.manual_seed(seed)
        net: nn.Module = importlib.import_module("mynet").Net(**kwargs)
        net(torch.randn(8, net.stem.in_channels, 16, 16))
    return net.eval()


def write_pictures(folder: Path, *, each: int = 30, size: int = 16) -> Path:
    """Write PNG files of three colors into `red`, `green` and `blue`, noisy but easy to tell apart."""
    rng = random.Random(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = [
                tuple(rng.randrange(120, 256) if c == channel else rng.randrange(0, 140) for c in range(3))
                for _ in range(size * size)
            ]
            picture = Image.new("RGB", (size, size))
            picture.putdata(pixels)
            picture.save(folder / name / f"{number}.png")
    return folder
