"""A stranger's own network, from its file to a proven ONNX student: by the installed command, and in Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from command import Outcome, Program, installed, list_files, mynet, write_pictures

import convsurgeon as cs
from convsurgeon.data import load_data
from convsurgeon.preprocessing import Preprocessing

PICTURES = ("--data", "imagefolder:pictures")
LOOK = ("--size", "16", "--mean", "0.5", "--std", "0.25")
TRAINING = ("--epochs", "15", "--batch-size", "16", "--threads", "1", "--to", "shift")
TRUST = ("--trust-module", "mynet")
GRAYED = Preprocessing((16, 16), (0.5,) * 3, (0.25,) * 3)

Command = Callable[..., Outcome]


SLOW = pytest.mark.slow  # the installed program imports torch anew for every verb: half a minute a journey


@pytest.fixture
def command(tmp_path: Path, request: pytest.FixtureRequest) -> Command:
    """`convsurgeon`, run as the test says, in a folder with `mynet.py`, what a stranger saved of it, and PNG files."""
    net = mynet(tmp_path)
    torch.save(net, tmp_path / "model.pt")
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "w.pth")
    write_pictures(tmp_path / "pictures")
    if request.param == "installed":
        return lambda *args: installed(tmp_path, *args)
    return Program(tmp_path)


def accuracy(outcome: Outcome) -> float:
    return float(outcome.done().data["accuracy"])


@pytest.mark.parametrize("command", ["in this process", pytest.param("installed", marks=SLOW)], indirect=True)
def test_pickled_module(command: Command, tmp_path: Path) -> None:
    refusal = "model.pt holds mynet.Net, not yet allowed; if you trust that code: --trust-module mynet, or --trust"
    before = list_files(tmp_path)
    assert command("convert", "model.pt", "--to", "shift").error == refusal
    assert list_files(tmp_path) == before

    command("convert", "model.pt", "--to", "shift", *TRUST).done()
    student = "model.shift.pt"
    given = ("model.pt", student, *TRUST, *PICTURES, *LOOK)
    training = [each for each in TRAINING if each not in ("--to", "shift")]
    report = command("distill", *given, *training, "-o", "RUN", "--json").done().data
    assert report["student_file"] == "RUN/student.pt"
    assert report["after"]["accuracy"] > 0.75

    seen = command("evaluate", "RUN/student.pt", *PICTURES, "--teacher", "model.pt", *TRUST, "--json")
    assert seen.err.splitlines() == [f"preprocessing: {GRAYED}"]
    assert accuracy(seen) == report["after"]["accuracy"]
    assert seen.data["agreement"] == report["after"]["agreement"]
    assert accuracy(command("evaluate", "RUN/student.onnx", *PICTURES, "--json")) == report["after"]["accuracy"]

    command("export", "RUN/student.pt", "-o", "mine.onnx", *PICTURES, *TRUST, "--threads", "1").done()
    check_onnx(tmp_path / "mine.onnx", tmp_path / "RUN/student.pt")


@pytest.mark.parametrize("command", ["in this process", pytest.param("installed", marks=SLOW)], indirect=True)
def test_state_dict(command: Command, tmp_path: Path) -> None:
    named = ("mynet:Net", "--weights", "w.pth")
    converted = command("convert", *named, "--to", "shift", "--input-shape", "1,3,16,16").done()
    assert "student: Net.shift.safetensors" in converted.out.splitlines()

    trained = command("distill", *named, *PICTURES, *LOOK, *TRAINING, "-o", "RUN").done()
    assert "student file: RUN/student.safetensors" in trained.out.splitlines()
    report = json.loads((tmp_path / "RUN/report.json").read_text())
    assert report["after"]["accuracy"] > 0.75

    seen = command("evaluate", "RUN/student.safetensors", *PICTURES, *TRUST, "--json")
    assert accuracy(seen) == report["after"]["accuracy"]
    both = ("RUN/student.onnx", *PICTURES, "--teacher", "RUN/teacher.onnx", "--json")
    assert command("evaluate", *both).done().data["agreement"] == report["after"]["agreement"]

    command("export", "RUN/student.safetensors", "-o", "mine.onnx", *TRUST, "--threads", "1").done()
    check_onnx(tmp_path / "mine.onnx", tmp_path / "RUN/student.safetensors")


def check_onnx(path: Path, student_file: Path) -> None:
    """Fail unless the file has the student's outputs on real pictures, and says what they are."""
    opened = onnxruntime.InferenceSession(str(path))
    entries = opened.get_modelmeta().custom_metadata_map
    assert json.loads(entries["classes"]) == ["blue", "green", "red"]
    assert Preprocessing.from_dict(json.loads(entries["preprocessing"])) == GRAYED
    mynet(path.parent)  # its class may stand in the file
    student = cs.load(student_file, trust_modules=["mynet"]).eval()
    images, _ = load_data(f"imagefolder:{path.parent / 'pictures'}", preprocessing=GRAYED).test.__getitems__([0, 1, 2])
    with torch.no_grad():
        expected = student(images)
    (name,) = (entry.name for entry in opened.get_inputs())
    torch.testing.assert_close(torch.from_numpy(opened.run(None, {name: images.numpy()})[0]), expected)


def test_class_saved_from_a_script(tmp_path: Path) -> None:
    mynet(tmp_path)
    code = "import torch\n" + (tmp_path / "mynet.py").read_text() + "\ntorch.save(Net(), 'scripted.pt')\n"
    (tmp_path / "train.py").write_text(code)
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True, timeout=60)
    line = (
        "scripted.pt holds __main__.Net: a class saved from a script, which no other program can find; "
        "save model.state_dict() instead and name the script and class: SCRIPT:Net --weights FILE "
        "(mynet:Net for mynet.py)"
    )
    program = Program(tmp_path)
    assert program("convert", "scripted.pt").error == line
    assert program("convert", "scripted.pt", *TRUST).error == line
    assert installed(tmp_path, "convert", "scripted.pt", "--trust").error == line


@pytest.mark.parametrize("saved_as", ["pickled module", "state dict"])
def test_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_as: str) -> None:
    net = mynet(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    splits = load_data(f"imagefolder:{write_pictures(tmp_path / 'pictures')}", preprocessing=GRAYED)
    if saved_as == "pickled module":
        torch.save(net, tmp_path / "model.pt")
        with pytest.raises(cs.errors.ConvSurgeonError, match="--trust-module mynet"):
            cs.load(tmp_path / "model.pt")
        model = cs.load(tmp_path / "model.pt", trust_modules=["mynet"])
        file = tmp_path / "student.pt"
    else:
        torch.save(net.state_dict(), tmp_path / "w.pt")
        model = cs.load("mynet:Net", weights=tmp_path / "w.pt")
        file = tmp_path / "student.safetensors"

    example = splits.train[0][0][None]
    student = cs.rewrite(model, "shift", example_inputs=example)
    assert {decision.fqn for decision in cs.plan_of(student).converted} == {"conv1", "conv2"}
    result = cs.distill(model, student, splits.train, splits.val, epochs=15, batch_size=16, run_dir=tmp_path / "RUN")
    found = cs.evaluate(result.student, splits.test, teacher=model)
    assert found.accuracy > 0.75
    delivery = cs.export(result.student, tmp_path / "mine.onnx", example_inputs=example)
    assert delivery.parity.max_rel <= 1e-4
    assert cs.evaluate(delivery.path, splits.test, teacher=model) == found
    cs.save(result.student, file)
    again = cs.load(file, trust_modules=["mynet"])
    assert cs.evaluate(again, splits.test, teacher=model) == found
    assert cs.plan_of(again) == cs.plan_of(student)
