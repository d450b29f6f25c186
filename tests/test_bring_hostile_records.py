"""Objects of a trusted package where a file should have a record or a dict: nothing of them runs while it is read."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import convsurgeon as cs
from convsurgeon.errors import ConvSurgeonError, ModelError

PACKAGE = """
from collections import UserDict
from collections.abc import Mapping

import torch
from torch import nn

RAN = []


def wipe(*args, **kwargs):
    RAN.append("wipe")
    return []


class Plain:
    pass


class Table(Mapping):
    def __getitem__(self, key):
        RAN.append("getitem")
        return torch.ones(1)

    def __iter__(self):
        RAN.append("iter")
        return iter(["a"])

    def __len__(self):
        RAN.append("len")
        return 1


class User(UserDict):
    def __getitem__(self, key):
        RAN.append("getitem")
        return super().__getitem__(key)

    def __iter__(self):
        RAN.append("iter")
        return super().__iter__()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "hostpack.py").write_text(PACKAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("hostpack")
    sys.modules.pop("hostpack", None)


def made(kind: type, **attributes: Any) -> Any:
    found = object.__new__(kind)
    found.__dict__.update(attributes)
    return found


def with_record(net: nn.Module, record: Any) -> nn.Module:
    net.__dict__["convsurgeon_record"] = record
    return net


RECORDS = {
    "an object": lambda package: made(package.Plain, keys=package.wipe),
    "a namespace": lambda package: argparse.Namespace(keys=package.wipe),
    "a mapping": lambda package: made(package.Table),
    "a user's dict": lambda package: made(package.User, data={"source": {"name": "x"}}),
    "a mapping inside": lambda package: {"plan": made(package.Table)},
    "a partial": lambda package: argparse.Namespace(keys=functools.partial(nn.Linear, 4, 4)),
}


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_record_that_is_none_is_refused_unread(package: Any, kind: str, nested: bool) -> None:
    net = with_record(package.Net(), RECORDS[kind](package))
    torch.save({"model": net, "epoch": 1} if nested else net, "net.pt")
    package.RAN.clear()
    with pytest.raises(ModelError, match="carries a record that is no plain data; save the model again"):
        cs.load("net.pt", trust_modules=["hostpack"])
    assert package.RAN == []


def test_a_record_builds_no_module_without_any_trust(tmp_path: Path) -> None:
    built: list[int] = []

    class Count(nn.Linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            built.append(1)
            super().__init__(*args, **kwargs)

    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    with_record(net, argparse.Namespace(keys=functools.partial(nn.Linear, 4, 4)))
    torch.save(net, tmp_path / "net.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "__init__", Count.__init__)
        with pytest.raises(ModelError, match="carries a record that is no plain data"):
            cs.load(tmp_path / "net.pt")
    assert built == []


@pytest.mark.parametrize("kind", ["Table", "User"])
@pytest.mark.parametrize("place", ["state_dict", "model", "ema", "", "own"])
def test_a_mapping_of_a_package_is_no_state_dict(package: Any, kind: str, place: str) -> None:
    state = package.Net().state_dict()
    table = made(getattr(package, kind), **({"data": dict(state)} if kind == "User" else {}))
    torch.save({place: table, "epoch": 1} if place else table, "w.pth")
    package.RAN.clear()
    with pytest.raises(ConvSurgeonError, match="no state dict"):
        cs.load("hostpack:Net", weights="w.pth", trust_modules=["hostpack"])
    with pytest.raises(ConvSurgeonError):
        cs.load("w.pth", trust_modules=["hostpack"])
    assert package.RAN == []


def test_a_module_beside_such_a_mapping_is_loaded(package: Any) -> None:
    torch.save({"model": made(package.Table), "ema": package.Net()}, "w.pth")
    package.RAN.clear()
    assert type(cs.load("w.pth", trust_modules=["hostpack"])).__name__ == "Net"
    assert package.RAN == []
