"""Payloads in every kind of file, broken files, and files that ask for too much: one line each, and nothing done."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bombs import BOMBS, LIMIT_MB
from command import Program
from torch import fx, nn

import convsurgeon as cs
from convsurgeon import storage
from convsurgeon.errors import ConvSurgeonError, PlanError
from convsurgeon.surgery import Plan, plan


class Payload:
    """Pickles as a shell command that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch '{self.mark}'",)


class Tracer(nn.Module):
    """Something that torch.fx can trace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def in_state_dict(payload: Payload) -> object:
    return {"epoch": 1, "optimizer": [payload], "state_dict": {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}}


def in_graph_module(payload: Payload) -> object:
    traced = fx.symbolic_trace(Tracer())
    traced.meta["a"] = payload
    return traced


def in_module(payload: Payload) -> object:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net._forward_hooks[1] = payload
    return net


def in_tensor(payload: Payload) -> object:
    tensor = torch.zeros(2)
    tensor.note = payload
    return {"a": tensor}


def old_tar(value: object, path: Path) -> None:
    """The very first format: a tar with a pickle in it."""
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("storages", pickle.dumps(0)),
            ("tensors", pickle.dumps(0)),
            ("pickle", pickle.dumps(value)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "zip": torch.save,
    "old": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "tar": old_tar,
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
    "pickle 2": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
}


def refusal_of(call: Callable[[], object]) -> str:
    """Return what a call was refused with, or nothing if it was not."""
    try:
        call()
    except ConvSurgeonError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("wrap", [lambda payload: payload, in_state_dict, in_graph_module, in_module, in_tensor])
def test_no_payload_runs(tmp_path: Path, wrap: Callable[[Payload], object], writer: str) -> None:
    path, mark = tmp_path / "net.pt", tmp_path / "ran"
    WRITERS[writer](wrap(Payload(mark)), path)
    before = path.read_bytes()
    (tmp_path / "linear_net.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 3)\n")
    sys.path.insert(0, str(tmp_path))
    try:
        for call in (
            lambda: storage.load(path),
            lambda: storage.load(path, trust_modules=["torch", "os", "posix", "test_hostile_files", "builtins"]),
            lambda: storage.load("linear_net:build", weights=path),
            lambda: storage.load_checkpoint(path),
        ):
            said = refusal_of(call)
            assert said.isprintable()
            # the weights beside a payload are of use
            assert said or (wrap is in_state_dict and writer == "zip")
            assert not mark.exists()
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("linear_net", None)
    assert path.read_bytes() == before


def test_a_payload_does_run_when_trusted(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "ran"), tmp_path / "net.pt")
    with pytest.raises(ConvSurgeonError):
        storage.load(tmp_path / "net.pt", trust=True)
    assert (tmp_path / "ran").exists()


def test_small_files_take_little(tmp_path: Path) -> None:
    for name, write in BOMBS.items():
        write(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 10_000
    program = Path(__file__).with_name("bombs.py")
    child = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    outcomes = [json.loads(line) for line in child.stdout.splitlines()]
    assert [outcome["file"] for outcome in outcomes] == sorted(BOMBS)
    for outcome in outcomes:
        assert outcome["file"] in outcome["said"]
        assert outcome["said"].isprintable()
        assert outcome["MB"] < LIMIT_MB
        assert outcome["s"] < 60


def odd_places(folder: Path) -> list[Path]:
    """A pipe, a folder, a socket, endless and empty devices, an empty file, a dangling link."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "empty").touch()
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "zero").symlink_to("/dev/zero")
    return [*(folder / name for name in ("pipe", "folder", "socket", "empty", "link", "zero")), Path("/dev/null")]


def test_what_is_no_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    for place in odd_places(Path(".")):
        for call in (
            lambda place=place: storage.load(place),
            lambda place=place: storage.load("torchvision:squeezenet1_1", weights=place),
            lambda place=place: storage.load_checkpoint(place),
            lambda place=place: storage.read_plan(place),
        ):
            with pytest.raises(ConvSurgeonError) as caught:
                call()
            assert place.name in str(caught.value)
            assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe{", "cannot read the plan"),
        (b"", "not JSON"),
        (b"[" * 10**6, "not JSON"),
        (b'{"format": "convsurgeon-plan", "version": ' + b"9" * 10**5 + b"}", "not JSON"),
        (b'{"format": "convsurgeon-plan", "version": ' + b"9" * 4000 + b"}", "plan version a number too large"),
        (b'{"format": "convsurgeon-plan", "version": 2}', "expected 1; install a newer convsurgeon"),
        (b'{"format": "convsurgeon-plan", "version": true}', "plan version True is not known"),
        (b'{"format": "convsurgeon-plan", "version": 1, "a": NaN}', "NaN is no number"),
        (b'{"format": "convsurgeon-plan", "version": 1, "a": 1e999}', "1e999 is no number"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        storage.read_plan(path)
    message = str(caught.value)
    assert said in message
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 400


def test_a_huge_plan_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.plan.json").open("wb") as file:
        file.truncate(10**12)  # a sparse file
    with pytest.raises(PlanError, match="has 1000000 MB, which no plan has"):
        storage.read_plan(tmp_path / "a.plan.json")


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(model="a\nb"), "model must be a text without control characters"),
        (lambda d: d.update(model="\ud800"), "model must be a text"),
        (lambda d: d.update(colour=1), "a plan has no 'colour'"),
        (lambda d: d["decisions"].append(3), "a decision must be an object, got 3"),
        (lambda d: d["decisions"][1].update(opp="shift"), "a decision has no 'opp'"),
        (lambda d: d["decisions"][1].update(reason="\x1b[2J"), "reason must be a text without"),
        (lambda d: d["decisions"][1].update(spec=None), "op must be a name, with a spec, or null"),
        (lambda d: d["decisions"][1].update(options={"a": [1]}), "option 'a' must be a plain value"),
        (lambda d: d["decisions"][1].update(options={"groups": 10**12}), "option 'groups' must be a plain value"),
        (lambda d: d["decisions"][1]["spec"].update(groups=0), "groups must be a whole number from 1 on, got 0"),
        (lambda d: d["decisions"][1]["spec"].update(groups=3), "groups=3 divides not both 8 and 8 channels"),
        (lambda d: d["decisions"][1]["spec"].update(stride=[0, 1]), "stride must be two whole numbers from 1 on"),
        (lambda d: d["decisions"][1]["spec"].update(dilation=[1, 10**12]), "dilation must be two whole numbers"),
        (lambda d: d["decisions"][1]["spec"].update(padding="full"), "padding must be two whole numbers, 'same'"),
        (lambda d: d["decisions"][1]["spec"].update(padding_mode="odd"), "padding_mode one of zeros"),
        (lambda d: d["decisions"][1]["spec"].update(bias=1), "bias must be true or false"),
        (lambda d: d["decisions"].append(d["decisions"][0]), "decides twice about '0'"),
    ],
)
def test_plans_that_are_wrong_inside(change: Callable[[dict[str, Any]], object], said: str) -> None:
    data = plan(small()).to_dict()
    change(data)
    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(data))
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_absurd_options_are_refused_when_the_plan_is_carried_out() -> None:
    for options in ({"groups": 2**31 - 1}, {"groups": "a"}, {"gruops": 2}, {"groups": -5}, {"stride_on": "moon"}):
        data = plan(small(), "group", options={"groups": 2}).to_dict()
        data["decisions"][1]["options"] = options
        if options == {"groups": 2**31 - 1}:  # as many as there are channels
            assert cs.rewrite(small(), Plan.from_dict(data))[1].options["groups"] == 8
            continue
        with pytest.raises(ConvSurgeonError) as caught:
            cs.rewrite(small(), Plan.from_dict(data))
        assert str(caught.value).isprintable()


def test_the_command_line_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Payload(tmp_path / "ran"), "net.pt")
    os.mkfifo("pipe")
    BOMBS["large network.safetensors"](Path("large.safetensors"))
    torch.save(small(), "small.pt")
    Path("small.shift.pt").write_text("precious")
    for line in (
        "convert net.pt",
        "inspect large.safetensors",
        "inspect pipe",
        "convert small.pt --plan pipe",
        "convert torchvision:squeezenet1_1 --weights pipe",
        "convert small.pt --to shift",
    ):
        assert Program(tmp_path)(*line.split()).error.isprintable()
    assert not Path("ran").exists()
    assert Path("small.shift.pt").read_text() == "precious"
    assert sorted(os.listdir()) == ["large.safetensors", "net.pt", "pipe", "small.pt", "small.shift.pt"]
