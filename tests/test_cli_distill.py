"""`convsurgeon distill`: what a run leaves behind, how it stops, goes on, and refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from command import INSTALLED, Outcome, Program, mynet
from nets import assert_bit_identical

import convsurgeon as cs
from convsurgeon.data import load_data
from convsurgeon.distillation import methods
from convsurgeon.evaluation import evaluate
from convsurgeon.preprocessing import Preprocessing
from convsurgeon.record import read_record
from convsurgeon.storage import load_checkpoint

READER = ("mynet:Net", "--model-arg", "num_classes=10", "--model-arg", "in_chans=1", "--weights", "reader.pt")
DIGITS = ("--data", "digits", "--limit-batches", "2", "--epochs", "1", "--batch-size", "32", "--threads", "1")
TRUST = ("--trust-module", "mynet")
CONTENTS = [
    "best.pt",
    "command.json",
    "config.json",
    "last.pt",
    "metrics.jsonl",
    "report.json",
    "student.onnx",
    "student.safetensors",
    "teacher.onnx",
]


def prepare(folder: Path) -> Program:
    """Put `mynet.py` and the weights of a network for digits into a folder."""
    torch.save(mynet(folder, num_classes=10, in_chans=1).state_dict(), folder / "reader.pt")
    return Program(folder)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return prepare(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Outcome]:
    """A joint run that is over, in `RUN`."""
    program = prepare(tmp_path_factory.mktemp("run"))
    return program, program("distill", *READER, *DIGITS, "--to", "shift", "-o", "RUN").done()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def onnx_metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_muon_comes_with_its_own_rate(tmp_path: Path) -> None:
    program = prepare(tmp_path)
    program("distill", *READER, *DIGITS, "--optimizer", "muon", "-o", "RUN").done()
    config = json.loads((tmp_path / "RUN" / "config.json").read_text())
    assert (config["optimizer"], config["learning_rate"], config["momentum"]) == ("muon", 0.02, 0.95)


class TestFinishedRun:
    def test_folder(self, done: tuple[Program, Outcome]) -> None:
        program, _ = done
        assert sorted(path.name for path in (program.folder / "RUN").iterdir()) == CONTENTS

    def test_what_it_was_told(self, done: tuple[Program, Outcome]) -> None:
        run = done[0].folder / "RUN"
        command, config = (json.loads((run / f"{name}.json").read_text()) for name in ("command", "config"))
        assert command["teacher"] == "mynet:Net"
        assert command["to"] == "shift"
        assert command["model_arg"] == ["num_classes=10", "in_chans=1"]
        for key, value in {"method": "joint", "epochs": 1, "limit_batches": 2, "batch_size": 32, "seed": 0}.items():
            assert command[key] == config[key] == value

    def test_lines_on_stderr(self, done: tuple[Program, Outcome]) -> None:
        note, preprocessing, epoch = done[1].err.splitlines()
        assert "mynet:Net has no stored preprocessing; size, mean, std and color are taken from digits" in note
        assert preprocessing == "preprocessing: 8x8, gray, mean 0.305, std 0.376"
        percent = r"\d+\.\d\d%"
        assert re.fullmatch(
            rf"epoch 1/1  loss \d+\.\d{{3}}  validation: student {percent}, teacher {percent}  \d+:\d\d", epoch
        )

    def test_metrics(self, done: tuple[Program, Outcome]) -> None:
        start, epoch = metrics(done[0].folder / "RUN")
        assert (start["event"], start["step"]) == ("start", 0)
        assert (epoch["event"], epoch["step"], epoch["epoch"]) == ("epoch", 2, 1)
        assert 0 <= epoch["student_accuracy"] <= 1

    def test_table(self, done: tuple[Program, Outcome]) -> None:
        lines = done[1].out.splitlines()
        rows = {}
        for line in lines:
            if line.startswith("│"):
                name, *cells = (cell.strip() for cell in line.strip("│").split("│"))
                rows[name] = cells
        report = json.loads((done[0].folder / "RUN/report.json").read_text())
        before, after = report["before"], report["after"]
        assert rows["test accuracy"][:2] == [f"{100 * side['accuracy']:.2f} %" for side in (before, after)]
        assert rows["latency, 1 thread"][0] == f"{before['latency']['1']['median_ms']:.3f} ms"
        assert rows["converted convolutions"][2] == "9.0x"
        assert set(rows) >= {"parameters", "MACs, one image", "ONNX file", "agrees with the teacher"}
        assert "teacher as it ended" in rows
        assert lines[-3:] == ["student file: RUN/student.safetensors", "onnx file: RUN/student.onnx", "run folder: RUN"]

    def test_report_is_what_the_files_do(self, done: tuple[Program, Outcome]) -> None:
        program, _ = done
        run = program.folder / "RUN"
        report = json.loads((run / "report.json").read_text())
        student = cs.load(run / "student.safetensors", trust=True)
        teacher = mynet(program.folder, num_classes=10, in_chans=1)
        test = load_data("digits").test
        for network in (student, run / "student.onnx"):
            found = evaluate(network, test, teacher=teacher, batch_size=32, limit_batches=2)
            assert (found.accuracy, found.agreement) == (report["after"]["accuracy"], report["after"]["agreement"])
        for network in (teacher, run / "teacher.onnx"):  # the teacher as given, not as it ended
            assert evaluate(network, test, batch_size=32, limit_batches=2).accuracy == report["before"]["accuracy"]
        assert report["after"]["delivery"]["bytes"] == (run / "student.onnx").stat().st_size
        assert report["after"]["delivery"]["parity"]["real_images"] is True
        assert report["before"]["params"] == sum(p.numel() for p in teacher.parameters())
        assert report["after"]["params"] == sum(p.numel() for p in student.parameters())

    def test_student_is_the_best_one_and_was_trained(self, done: tuple[Program, Outcome]) -> None:
        program, _ = done
        student = cs.load(program.folder / "RUN/student.safetensors", trust=True)
        best = load_checkpoint(program.folder / "RUN/best.pt")
        assert all(torch.equal(value, best[key]) for key, value in student.state_dict().items())
        start = cs.rewrite(mynet(program.folder, num_classes=10, in_chans=1), "shift")
        assert not torch.equal(start.fc.weight, student.fc.weight)

    def test_files_know_classes_and_preprocessing(self, done: tuple[Program, Outcome]) -> None:
        run = done[0].folder / "RUN"
        natural = load_data("digits").preprocessing.to_dict()
        record = read_record(cs.load(run / "student.safetensors", trust=True))
        assert record["preprocessing"] == natural
        assert record["classes"] == [str(digit) for digit in range(10)]
        assert record["input_shape"] == [1, 1, 8, 8]
        for name in ("student.onnx", "teacher.onnx"):
            entries = onnx_metadata(run / name)
            assert json.loads(entries["preprocessing"]) == natural
            assert json.loads(entries["classes"]) == record["classes"]

    def test_resumed_it_only_delivers_again(self, done: tuple[Program, Outcome]) -> None:
        program, _ = done
        run = program.folder / "RUN"
        student = cs.load(run / "student.safetensors", trust=True)
        noted = (run / "metrics.jsonl").read_text()
        (run / "student.safetensors").unlink()
        (run / "student.onnx").unlink()
        data = program("distill", "--resume", "RUN", "--json").done().data
        assert sorted(path.name for path in run.iterdir()) == CONTENTS
        assert (run / "metrics.jsonl").read_text() == noted
        assert_bit_identical(cs.load(run / "student.safetensors", trust=True), student)
        assert data == json.loads((run / "report.json").read_text())
        assert [data[key] for key in ("run", "student_file", "onnx_file")] == [
            "RUN",
            "RUN/student.safetensors",
            "RUN/student.onnx",
        ]

    def test_folder_is_not_used_twice(self, done: tuple[Program, Outcome]) -> None:
        line = "RUN holds a run already; go on with it by --resume RUN, or choose another folder with -o"
        assert done[0]("distill", *READER, *DIGITS, "-o", "RUN").error == line

    @pytest.mark.parametrize(
        ("args", "flag"),
        [(("mynet:Net",), "TEACHER"), (("--epochs", "1"), "--epochs"), (("--no-augment",), "--augment")],
    )
    def test_nothing_else_goes_with_resume(
        self, done: tuple[Program, Outcome], args: tuple[str, ...], flag: str
    ) -> None:
        line = f"--resume RUN needs nothing else, the run folder knows how it was started; leave out {flag}"
        assert done[0]("distill", *args, "--resume", "RUN").error == line


class TestMethods:
    @pytest.mark.parametrize("method", methods.names())
    def test_every_method(self, program: Program, method: str) -> None:
        args = ("--method", method, *(("--method-option", "peers=2") if method == "ensemble" else ()))
        data = program("distill", *READER, *DIGITS, *args, "--to", "shift", "--json").done().data
        run = Path("runs") / f"mynet-Net.shift.{method}"
        assert data["run"] == str(run)
        assert data["config"]["method"] == method
        assert sorted(path.name for path in (program.folder / run).iterdir()) == CONTENTS
        needs_teacher = methods.get(method).needs_teacher
        assert (data["teacher_accuracy_ended"] is not None) == needs_teacher
        if method == "frozen":
            assert data["teacher_accuracy_ended"] == data["before"]["accuracy"]

    def test_those_of_the_issue_are_there(self) -> None:
        assert {"joint", "frozen", "ensemble"} <= set(methods.names())


class TestPreprocessing:
    def test_flags_are_stored_everywhere(self, program: Program) -> None:
        args = (*DIGITS, "--size", "12,10", "--mean", "0.5", "--std", "0.25", "--color", "rgb", "-o", "RUN")
        outcome = program("distill", "mynet:Net", "--model-arg", "num_classes=10", *args).done()
        shown = "12x10, rgb, mean 0.5,0.5,0.5, std 0.25,0.25,0.25"
        assert f"preprocessing: {shown}" in outcome.err.splitlines()
        wanted = Preprocessing((12, 10), (0.5,) * 3, (0.25,) * 3)
        run = program.folder / "RUN"
        record = read_record(cs.load(run / "student.safetensors", trust=True))
        assert Preprocessing.from_dict(record["preprocessing"]) == wanted
        for name in ("student.onnx", "teacher.onnx"):
            stored = json.loads(onnx_metadata(run / name)["preprocessing"])
            assert Preprocessing.from_dict(stored) == wanted
        judged = program("evaluate", "RUN/student.onnx", "--data", "digits").done()
        assert judged.err == f"preprocessing: {shown}\n"


REFUSED = {
    "unknown method": (
        ("--method", "joined"),
        f"unknown method 'joined'. Did you mean 'joint'? Available: {', '.join(methods.names())}.",
    ),
    "option of the method": (
        ("--method-option", "wait=1"),
        "joint has no option 'wait'. Did you mean 'weight'? Options: weight, mutual, teacher_rate.",
    ),
    "value of the method": (
        ("--method-option", "weight=much"),
        "joint: option weight must be of type float, got 'much'",
    ),
    "option without a value": (
        ("--objective-option", "temperature"),
        "--objective-option 'temperature' must be of the form NAME=VALUE",
    ),
    "unknown device": (("--device", "tpu"), "device must be cpu or cuda, got 'tpu'"),
    "half precision": (
        ("--device", "cpu", "--precision", "fp16"),
        "precision fp16 needs a GPU; on a CPU use bf16 or no",
    ),
    "unknown optimizer": (("--optimizer", "adam"), "optimizer must be one of sgd, muon, got 'adam'"),
    "unknown precision": (
        ("--precision", "int8"),
        "precision must be one of auto, no, bf16, fp16, got 'int8'",
    ),
    "learning rate": (("--lr", "0"), "learning_rate must be above 0, got 0.0"),
    "share": (
        ("--val-fraction", "1"),
        "val_fraction is a share from 0 up to, not including, 1, not 1.0",
    ),
    "no epochs": (("--epochs", "0"), "Invalid value for '--epochs': Input should be greater than or equal to 1"),
    "seed": (("--seed", "-1"), "Invalid value for '--seed': Input should be greater than or equal to 0"),
    "unknown op": (("--to", "shft"), None),
    "selector": (("--keep", "body"), "--keep 'body' matched no convolution."),
}


class TestRefusals:
    @pytest.mark.parametrize(("args", "line"), REFUSED.values(), ids=REFUSED.keys())
    def test_one_line_and_no_folder(self, program: Program, args: tuple[str, ...], line: str | None) -> None:
        before = program.files()
        said = program("distill", *READER, *DIGITS, *args, "-o", "new/RUN").error
        assert said == line if line is not None else said.startswith("unknown op 'shft'. Did you mean 'shift'?")
        assert program.files() == before

    def test_folder_of_others_is_left_as_it_was(self, program: Program) -> None:
        (program.folder / "notes").mkdir()
        (program.folder / "notes/mine.txt").write_text("mine")
        line = "notes holds other files; choose a new or an empty folder with -o"
        assert program("distill", *READER, *DIGITS, "-o", "notes").error == line
        assert [path.name for path in (program.folder / "notes").iterdir()] == ["mine.txt"]

    def test_missing_fashion_mnist_names_both_ways(self, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("convsurgeon.data._named.DEBIAN_FASHION_MNIST", program.folder / "not-installed")
        before = program.files()
        args = ("--data", "fashion-mnist", "--data-root", "pictures", "-o", "RUN")
        assert program("distill", *READER, *args).error == (
            "fashion-mnist is not under pictures; get it with torchvision.datasets.FashionMNIST('pictures', "
            "download=True) or with apt-get install dataset-fashion-mnist, or name its folder with --data-root"
        )
        assert program.files() == before

    def test_images_that_the_network_cannot_take(self, program: Program) -> None:
        said = program("distill", "mynet:Net", *DIGITS, "--model-arg", "num_classes=10").error
        assert said.startswith("Net cannot take images of 1x8x8: RuntimeError: ")
        assert said.endswith("; --size and --color change them")

    def test_converted_student_is_not_converted(self, program: Program) -> None:
        program("convert", *READER, "--to", "shift").done()
        line = "the student is converted already; leave out --to, --keep, --only, --map, --pointwise and --option"
        for args in (("--to", "shift"), ("--keep", "stem"), ("--pointwise", "lowrank"), ("--option", "groups=2")):
            assert program("distill", *READER, *DIGITS, "Net.shift.safetensors", *args, "-o", "RUN").error == line

    def test_student_of_another_network(self, program: Program) -> None:
        program("convert", "mynet:Net", "--model-arg", "in_chans=1", "--to", "shift").done()
        before = program.files()
        said = program("distill", *READER, "Net.shift.safetensors", *DIGITS, "-o", "RUN").error
        assert said == (
            "the student's output has size (1, 3), expected (1, 10) on the example input 1x1x8x8; "
            "the first module that differs is fc: 1x3, expected 1x10"
        )
        assert program.files() == before

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (None, "RUN holds no run that the command line started: no command.json"),
            ("{", "RUN holds no run that the command line started: no command.json"),
            ("[]", "RUN/command.json is damaged: it holds no JSON object"),
            ("{}", "RUN/command.json is of another version: it lacks 'teacher'"),
        ],
    )
    def test_nothing_to_resume(self, program: Program, text: str | None, line: str) -> None:
        (program.folder / "RUN").mkdir()
        if text is not None:
            (program.folder / "RUN/command.json").write_text(text)
        assert program("distill", "--resume", "RUN").error == line

    def test_run_that_python_started_is_not_taken_over(self, program: Program) -> None:
        (program.folder / "RUN").mkdir()
        (program.folder / "RUN/config.json").write_text("{}")
        assert program("distill", *READER, *DIGITS, "-o", "RUN").error.startswith("RUN holds a run already;")
        assert program.files()[:1] == ["RUN/config.json"]


class TestInterruption:
    def test_ctrl_c_keeps_the_run_and_resume_ends_it(self, program: Program) -> None:
        """SIGINT to the installed program: status 130, one line that names --resume; then to the end."""
        run = program.folder / "RUN"
        args = ("--data", "digits", "--limit-batches", "3", "--epochs", "40", "--threads", "1", "-o", "RUN")
        process = subprocess.Popen(
            [INSTALLED, "distill", *READER, *args], cwd=program.folder, stderr=subprocess.PIPE, text=True
        )
        try:
            until = time.monotonic() + 100
            while not (run / "last.pt").exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130, err
        found = re.fullmatch(r"error: stopped after step (\d+) of 120; go on by --resume RUN", err.splitlines()[-1])
        assert found, err
        assert 0 < int(found[1]) < 120
        assert "Traceback" not in err
        assert not (run / "report.json").exists()
        data = program("distill", "--resume", "RUN", "--json").done().data
        epochs = [event["epoch"] for event in metrics(run) if event["event"] == "epoch"]
        assert epochs == list(range(1, 41))
        assert len(data["training"]["history"]) == 40
        assert sorted(path.name for path in run.iterdir()) == CONTENTS

    def test_ctrl_c_before_the_first_step_leaves_nothing(
        self, program: Program, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("convsurgeon.distillation.distill", stop)
        before = program.files()
        outcome = program("distill", *READER, *DIGITS, "-o", "RUN")
        assert outcome.code == 130
        assert outcome.err.splitlines()[-1] == "error: stopped"
        assert program.files() == before

    def test_run_that_stopped_before_its_settings_were_written_starts_anew(
        self, program: Program, done: tuple[Program, Outcome]
    ) -> None:
        (program.folder / "RUN").mkdir()
        command = (done[0].folder / "RUN/command.json").read_text()
        (program.folder / "RUN/command.json").write_text(command)
        program("distill", "--resume", "RUN").done()
        assert sorted(path.name for path in (program.folder / "RUN").iterdir()) == CONTENTS


@pytest.mark.slow
def test_resnet18_of_torchvision(program: Program) -> None:
    args = (
        "--model-arg",
        "num_classes=10",
        "--data",
        "digits",
        "--size",
        "32",
        "--limit-batches",
        "2",
        "--epochs",
        "1",
    )
    outcome = program("distill", "torchvision:resnet18", *args, "--threads", "1").done()
    run = program.folder / "runs/torchvision-resnet18.depthwise.joint"
    assert "preprocessing: 32x32, rgb, mean 0.485,0.456,0.406, std 0.229,0.224,0.225" in outcome.err
    assert sorted(path.name for path in run.iterdir()) == CONTENTS
    report = json.loads((run / "report.json").read_text())
    assert report["before"]["params"] / report["after"]["params"] > 5
    judged = program("evaluate", "runs/torchvision-resnet18.depthwise.joint/student.onnx", "--data", "digits").done()
    assert judged.err.startswith("preprocessing: 32x32, rgb, ")
