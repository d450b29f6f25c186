"""The command line, verb by verb, in this process: what it says, what it writes, and how it refuses."""

from __future__ import annotations

import io
import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import onnx
import onnxruntime
import pytest
import torch
from command import Program, installed, mynet, write_pictures
from nets import assert_bit_identical
from rich.console import Console
from torch import nn

import convsurgeon as cs
from convsurgeon import cli, ops
from convsurgeon.cli._drawing import Drawing
from convsurgeon.data import load_data
from convsurgeon.preprocessing import Preprocessing, preprocessing_of
from convsurgeon.progress import Progress
from convsurgeon.record import read_record, update_record

VERBS = [module.name for module in pkgutil.iter_modules(cli.__path__) if not module.name.startswith("_")]
TRUST = ("--trust-module", "mynet")
SHAPE = ("--input-shape", "1,3,16,16")
GRAY = Preprocessing((10, 10), (0.25,), (0.5,), color="gray")


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """The command line in a folder with `mynet.py`, `model.pt` (a pickled module) and `weights.pt` (its state dict)."""
    net = mynet(tmp_path)
    torch.save(net, tmp_path / "model.pt")
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    return Program(tmp_path)


def digit_reader(folder: Path) -> nn.Module:
    """Write `reader.pt`, a network for digits that remembers its preprocessing; return it."""
    net = mynet(folder, num_classes=10, in_chans=1)
    update_record(net, preprocessing=GRAY.to_dict(), input_shape=[1, 1, 10, 10], classes=[f"n{i}" for i in range(10)])
    torch.save(net, folder / "reader.pt")
    return net


class TestHelp:
    @pytest.mark.parametrize("verb", ["", *VERBS])
    def test_help_comes_without_heavy_imports(self, verb: str, tmp_path: Path) -> None:
        code = (
            "import sys\nfrom convsurgeon.cli import main\n"
            f"sys.argv = {['convsurgeon', *verb.split(), '--help']!r}\n"
            "try:\n    main()\nexcept SystemExit as stopped:\n    assert stopped.code == 0, stopped.code\n"
            "heavy = {'torch', 'torchvision', 'numpy', 'onnx', 'onnxruntime', 'sklearn', 'scipy', 'accelerate'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == ""
        assert ran.stdout.startswith(f"Usage: convsurgeon {verb}".rstrip())

    def test_program_lists_all_verbs(self, tmp_path: Path) -> None:
        helped = installed(tmp_path, "--help").done()
        listed = re.findall(r"^  (\w+)  +\S", helped.out.partition("Commands:")[2], flags=re.MULTILINE)
        assert listed == sorted(VERBS)
        assert helped.err == ""

    def test_without_arguments_it_helps(self, program: Program) -> None:
        assert program().done().out == program("--help").done().out

    def test_version_is_the_installed_one(self, program: Program) -> None:
        version = metadata.version("convsurgeon")
        assert program("--version").done().out == f"convsurgeon {version}\n"
        assert cs.__version__ == version


def refusals() -> dict[str, tuple[str, str]]:
    """Mistakes by a short name: what was typed, and the line that must come, whole."""
    known, named = ", ".join(ops.names()), "mynet:Net"
    plan_alone = "--plan is carried out as it is; leave out --to, --keep, --only, --map, --pointwise and --option"
    which_data = (
        "which data? Say --data with one of cifar10, cifar100, digits, fashion-mnist, imagefolder:DIR or "
        "package.module:factory"
    )
    shape = "--input-shape must be like 1,3,224,224, got"
    return {
        "unknown verb": ("surgery", "No such command 'surgery'."),
        "unknown option": ("convert model.pt --frce", "No such option: --frce (Possible options: --force)"),
        "missing argument": ("convert", "Missing argument 'MODEL'."),
        "unknown op": (f"convert {named} --to shft", f"unknown op 'shft'. Did you mean 'shift'? Available: {known}."),
        "keep matches nothing": (
            f"convert {named} --keep conv9",
            "--keep 'conv9' matched no convolution. Did you mean 'conv2'?",
        ),
        "only matches nothing": (f"convert {named} --only body.*", "--only 'body.*' matched no convolution."),
        "map matches nothing": (f"convert {named} --map x=shift", "--map 'x' matched no convolution."),
        "nothing to convert": (
            f"convert {named} --keep *",
            "nothing to convert: 0 of 4 convolutions of Net can become 'depthwise': 4 are kept by selector; "
            "`convsurgeon inspect` shows each",
        ),
        "map without op": (f"convert {named} --map stem", "--map 'stem' must be of the form NAME=VALUE"),
        "unknown option of the op": (
            f"convert {named} --to group --option group=2",
            "group has no option 'group'. Did you mean 'groups'? Options: stride_on, groups.",
        ),
        "bad value": (
            f"convert {named} --to group --option groups=many",
            "group: option groups must be of type int, got 'many'",
        ),
        "ambiguous option": (
            f"convert {named} --to shift --map conv1=group --option groups=2",
            "option 'groups' is ambiguous among shift, group; say which op it is for: group.groups",
        ),
        "shape in words": (f"convert {named} --input-shape large", f"{shape} 'large'"),
        "shape of nothing": (f"inspect {named} --input-shape 1,3,0,16", f"{shape} '1,3,0,16'"),
        "empty shape": (f"inspect {named} --input-shape=", f"{shape} ''"),
        "missing file": (
            "convert lost.pt",
            "lost.pt does not exist; give a file that does, or an architecture such as torchvision:resnet18",
        ),
        "bare name": (
            "inspect resnet18",
            "there is no file resnet18; an architecture is written with where it is from: torchvision:resnet18",
        ),
        "folder as model": ("inspect .", ". is a folder; give the model file in it"),
        "empty file": ("convert empty.pt", "empty.pt is empty; copy or save it again"),
        "half a file": (
            "convert half.pt",
            "half.pt is truncated or damaged: a PyTorch archive without its end; copy or save it again",
        ),
        "weights only": (
            "convert weights.pt",
            "weights.pt holds only weights, no architecture; name the one they are of, such as mynet:Net or "
            "torchvision:resnet18: convsurgeon convert mynet:Net --weights weights.pt",
        ),
        "an ONNX file": (
            "inspect other.onnx",
            "other.onnx is an ONNX file, which has no PyTorch modules; give the model it was exported from",
        ),
        "no trust": (
            "convert model.pt --to shift",
            "model.pt holds mynet.Net, not yet allowed; if you trust that code: --trust-module mynet, or --trust",
        ),
        "arguments for a file": (
            "convert model.pt --trust --model-arg num_classes=4",
            "--model-arg goes with an architecture such as torchvision:resnet18, not with the file model.pt",
        ),
        "unknown class": (f"inspect {named}s", "unknown name in mynet: 'Nets'. Did you mean 'Net'? Available: Net."),
        "unknown module": (
            "inspect yournet:Net",
            "yournet:Net: there is no module 'yournet'; run where it can be imported, such as the folder that holds it",
        ),
        "not an argument": (
            f"inspect {named} --model-arg num_classes",
            "--model-arg 'num_classes' must look like NAME=VALUE, such as num_classes=10",
        ),
        "fetching by the back door": (
            "inspect torchvision:resnet18 --model-arg weights=DEFAULT",
            "--model-arg weights is not taken; weights are given by --weights FILE or --weights DEFAULT",
        ),
        "plan with --to": (f"convert {named} --plan p.json --to shift", plan_alone),
        "plan with --keep": (f"convert {named} --plan p.json --keep stem", plan_alone),
        "plan with --option": (f"convert {named} --plan p.json --option groups=8", plan_alone),
        "no plan file": (
            f"convert {named} --plan lost.json",
            "cannot read the plan lost.json: [Errno 2] No such file or directory: 'lost.json'",
        ),
        "not a plan": (
            f"convert {named} --plan other.json",
            'other.json: this is no plan: expected a JSON object with "format": "convsurgeon-plan"',
        ),
        "output exists": (
            f"convert {named} -o model.pt",
            "model.pt exists already; choose another name or say --force",
        ),
        "output of another kind": (
            f"convert {named} -o student.bin",
            "student.bin: a model is saved as .safetensors (name, plan and weights), .pt (pickled module) or .pt2 "
            "(exported program)",
        ),
        "output is a folder": (f"convert {named} -o .", ". exists already; choose another name or say --force"),
        "output without a folder": (
            f"convert {named} -o no/where.pt",
            "cannot write no/where.pt: the folder no is not there; make it first",
        ),
        "calibration without data": (
            f"convert {named} --size 32",
            "--size is about calibration; say --calibrate DATA, too",
        ),
        "calibration data that is not": (
            f"convert {named} --calibrate nowhere",
            "unknown data set 'nowhere'. Available: cifar10, cifar100, digits, fashion-mnist, imagefolder:DIR, "
            "package.module:factory. There is no folder of that name either.",
        ),
        "a place of data sets beside a folder": (
            f"convert {named} --calibrate . --data-root elsewhere",
            ". is a folder of its own; leave out --data-root: downloaded data sets lie there",
        ),
        "a place of data sets beside a folder of classes": (
            f"evaluate {named} --data imagefolder:pictures --data-root elsewhere",
            "imagefolder:pictures is a folder of its own; leave out --data-root: downloaded data sets lie there",
        ),
        "size of calibration images that come as they are": (
            f"convert {named} --calibrate mydata:make --size 8",
            "mydata:make gives its images as they are to be taken; leave out --size",
        ),
        "a polish of no time": (
            f"convert {named} --calibrate digits --polish-minutes 0",
            "--polish-minutes must be a number above 0, got 0; or say --no-polish",
        ),
        "a number of images without a calibration": (
            f"convert {named} --calibration-images 20",
            "--calibration-images is about calibration; say --calibrate DATA, too",
        ),
        "no polish of no calibration": (
            f"convert {named} --no-polish",
            "--no-polish is about calibration; say --calibrate DATA, too",
        ),
        "a polish that is none": (
            f"convert {named} --calibrate digits --no-polish --polish-minutes 2",
            "--polish-minutes and --no-polish contradict each other; say one of them",
        ),
        "answers of another kind": (
            f"convert {named} --calibrate digits --answers boxes",
            "--answers must be one of auto, scores, values, probabilities, multilabel, got 'boxes'",
        ),
        "a dry run of a calibration": (
            f"convert {named} --calibrate digits --dry-run",
            "--dry-run writes nothing and calibrates nothing; leave out --calibrate",
        ),
        "images of no name": (
            f"convert {named} --calibrate=",
            "--calibrate needs a folder of images or the name of a data set, got an empty string",
        ),
        "no folder of images": (
            f"convert {named} --calibrate ./pictures",
            "./pictures is no folder; give a folder of images, or a data set: cifar10, cifar100, digits, fashion-mnist",
        ),
        "a polish of endless time": (
            f"convert {named} --calibrate digits --polish-minutes inf",
            "--polish-minutes must be a number above 0, got inf; or say --no-polish",
        ),
        "no data": (f"evaluate {named}", which_data),
        "no data to learn from": (f"distill {named}", which_data),
        "unknown data": (
            f"evaluate {named} --data digit",
            "unknown data set 'digit'. Did you mean 'digits'? "
            "Available: cifar10, cifar100, digits, fashion-mnist, imagefolder:DIR, package.module:factory.",
        ),
        "missing data": (
            f"evaluate {named} --data cifar10 --data-root pictures",
            "cifar10 is not under pictures; get it with torchvision.datasets.CIFAR10('pictures', download=True), "
            "or name its folder with --data-root",
        ),
        "missing folder": (
            f"evaluate {named} --data imagefolder:pictures",
            "imagefolder:pictures: pictures does not exist; give a folder with one subfolder for each class",
        ),
        "size of data that come as they are": (
            f"evaluate {named} --data mydata:make --size 8",
            "mydata:make gives its images as they are to be taken; leave out --size",
        ),
        "a script that ends": (
            "convert script:Net",
            "code that was imported ended the program by sys.exit(0); "
            "put what a script does under: if __name__ == '__main__'",
        ),
        "another number of classes": (
            f"evaluate {named} --data digits --color rgb",
            "the model gives 3 scores, the data has 10 classes; build the model for them "
            "(--model-arg num_classes=10, or as its builder calls that) or give the data that it was trained on",
        ),
        "another number of classes to learn": (
            f"distill {named} --data digits --color rgb",
            "the model gives 3 scores, digits has 10 classes; build the model for them "
            "(--model-arg num_classes=10, or as its builder calls that) or give the data that it was trained on",
        ),
        "unknown split": (
            f"evaluate {named} --data digits --split all",
            "digits has no split 'all'; choose test, val or train, as it has them",
        ),
        "unknown color": (f"evaluate {named} --data digits --color blue", "--color is 'rgb' or 'gray', not 'blue'"),
        "bad size": (
            f"evaluate {named} --data digits --size big",
            "--size takes pixels such as 32, or height,width such as 32,48; got 'big'",
        ),
        "weights for an ONNX file": (
            "evaluate other.onnx --weights weights.pt --data digits",
            "--weights and --model-arg go with an architecture, not with the ONNX file other.onnx",
        ),
        "missing ONNX file": (
            "evaluate lost.onnx --data digits",
            "lost.onnx is not a file; give an ONNX file, as `convsurgeon export` writes it",
        ),
        "weights of no teacher": (
            f"evaluate {named} --data digits --teacher-weights weights.pt",
            "--teacher-weights are for the --teacher; say which one it is",
        ),
        "shape not known": (
            f"export {named}",
            "the input's shape is not known for this model; say it: --input-shape 1,3,224,224",
        ),
        "not an ONNX name": (f"export {named} -o s.pt {' '.join(SHAPE)}", "s.pt must end in .onnx; try s.onnx"),
        "ONNX file exists": (
            f"export {named} -o other.onnx {' '.join(SHAPE)}",
            "other.onnx exists already; choose another name or say --force",
        ),
        "folder of no data": (
            f"export {named} --data-root there",
            "--data-root is about --data; say which data",
        ),
        "mean of no size": (
            f"export {named} --mean 0.5",
            "the size of the images that mynet:Net takes is not known; say it: --size H or --size H,W",
        ),
        "unknown teacher": (
            f"export {named} {' '.join(SHAPE)} --teacher mynet:Not",
            "unknown name in mynet: 'Not'. Did you mean 'Net'? Available: Net.",
        ),
        "no teacher to distil from": (
            "distill --data digits",
            "distill needs a TEACHER, such as torchvision:resnet18, or --resume RUN",
        ),
        "demo of an unknown op": ("demo --to shft", f"unknown op 'shft'. Did you mean 'shift'? Available: {known}."),
        "demo into a file": ("demo -o model.pt", "cannot make the folder model.pt: File exists"),
    }


class TestRefusals:
    @pytest.mark.parametrize(("typed", "line"), refusals().values(), ids=refusals().keys())
    def test_one_whole_line_and_nothing_written(self, program: Program, typed: str, line: str) -> None:
        folder = program.folder
        (folder / "empty.pt").touch()
        (folder / "half.pt").write_bytes((folder / "model.pt").read_bytes()[:1000])
        (folder / "other.onnx").write_bytes(b"not really")
        (folder / "other.json").write_text("{}")
        (folder / "script.py").write_text("import sys\nsys.exit(0)\n")
        before = {name: (folder / name).read_bytes() for name in program.files()}
        assert program(*typed.split()).error == line
        assert {name: (folder / name).read_bytes() for name in program.files()} == before

    @pytest.mark.parametrize("shape", ["1,5,16,16", "1,3", "1,3,99999999,99999999", f"1,3,{10**30},1"])
    @pytest.mark.parametrize("verb", ["inspect", "convert", "export"])
    def test_shape_that_cannot_be(self, program: Program, verb: str, shape: str) -> None:
        before = program.files()
        said = program(verb, "mynet:Net", "--input-shape", shape).error
        assert re.match(r"(--input-shape|Net (itself fails|cannot be called)) .*\d", said)
        assert program.files() == before

    def test_plan_for_another_model(self, program: Program) -> None:
        program("convert", "mynet:Net", "-o", "a.pt").done()
        other = (program.folder / "mynet.py").read_text().replace("conv2", "body")
        (program.folder / "mynet.py").write_text(other)
        before = program.files()
        said = program("convert", "mynet:Net", "--plan", "a.plan.json", "-o", "b.pt").error
        assert "conv2" in said
        assert program.files() == before

    def test_bug_is_a_traceback_and_status_1(self, tmp_path: Path) -> None:
        code = (
            "import sys, convsurgeon.cli.ops as verb\nfrom convsurgeon.cli import main\n"
            "def run() -> None:\n    raise RuntimeError('a bug of ours')\n"
            "verb.run = run\nsys.argv = ['convsurgeon', 'ops']\nmain()\n"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == 1
        assert ran.stdout == ""
        assert ran.stderr.startswith("Traceback")
        assert ran.stderr.endswith("RuntimeError: a bug of ours\n")

    @pytest.mark.parametrize(("said", "line"), [("", "error: stopped\n"), ("after step 3", "error: after step 3\n")])
    def test_ctrl_c_is_one_line_and_status_130(
        self, program: Program, monkeypatch: pytest.MonkeyPatch, said: str, line: str
    ) -> None:
        def run() -> None:
            raise KeyboardInterrupt(said)

        monkeypatch.setattr("convsurgeon.cli.ops.run", run)
        outcome = program("ops")
        assert (outcome.code, outcome.out, outcome.err) == (130, "", line)


class TestConvert:
    def test_named_model(self, program: Program) -> None:
        before = program.files()
        args = ("--model-arg", "num_classes=10", "--to", "shift")
        outcome = program("convert", "torchvision:resnet18", *args).done()
        new = ["resnet18.shift.plan.json", "resnet18.shift.safetensors"]
        assert program.files() == sorted([*before, *new])
        assert outcome.err == "note: torchvision:resnet18 has random weights: no --weights was given\n"
        *table, totals, checked, student, plan_file = outcome.out.splitlines()
        assert table[0].strip() == "ResNet: 16 converted, 4 kept"
        assert re.fullmatch(r"parameters 11.2 M → 1.42 M .*; MACs of convolutions 1.81 G → .* fewer\).*", totals)
        assert checked == (
            "checked: on 1x3x224x224 all outputs have the structure, dtypes and sizes of the original's "
            "in eval and in train mode"
        )
        assert student == "student: resnet18.shift.safetensors"
        assert plan_file == "plan file: resnet18.shift.plan.json"
        loaded = cs.load(program.folder / new[1])
        assert loaded.fc.out_features == 10
        assert cs.plan_of(loaded) == cs.Plan.from_json((program.folder / new[0]).read_text())

    def test_pickled_model_stands_beside_its_student(self, program: Program) -> None:
        (program.folder / "nets").mkdir()
        (program.folder / "model.pt").rename(program.folder / "nets/model.pt")
        outcome = program("convert", "nets/model.pt", "--to", "shift", *TRUST).done()
        assert "random weights" not in outcome.err
        assert [name for name in program.files() if "shift" in name] == [
            "nets/model.shift.plan.json",
            "nets/model.shift.pt",
        ]
        student = cs.load(program.folder / "nets/model.shift.pt", trust_modules=["mynet"])
        assert [type(student.get_submodule(fqn)).__name__ for fqn in ("stem", "conv1", "conv2", "point")] == [
            "Conv2d",
            "ShiftConv2d",
            "ShiftConv2d",
            "Conv2d",
        ]

    def test_only_1x1_convolutions(self, program: Program) -> None:
        flags = ("--to", "none", "--pointwise", "lowrank", "--option", "rank=2", *SHAPE)
        data = program("convert", "mynet:Net", *flags, "--json").done().data
        assert {row["fqns"][0]: row["op"] for row in data["plan"]["decisions"]} == {
            "stem": None,
            "conv1": None,
            "conv2": None,
            "point": "lowrank",
        }
        assert data["student"] == "Net.lowrank.safetensors"
        both = program("convert", "mynet:Net", "--pointwise", "lowrank", *SHAPE, "--dry-run", "--json").done().data
        assert [row["op"] for row in both["plan"]["decisions"]] == [None, "depthwise", "depthwise", "lowrank"]

    @pytest.mark.parametrize(
        ("flags", "line"),
        [
            (("--pointwise", "shift"), "--pointwise 'shift': it needs a spatial kernel, not 1x1. Ops for 1x1 "),
            (("--pointwise", "lowrnk"), "unknown op 'lowrnk'. Did you mean 'lowrank'?"),
            (("--to", "none"), "--to none converts nothing by itself; say --pointwise OP or --map PATTERN=OP, too"),
        ],
    )
    def test_what_is_no_op_for_1x1_is_said_in_a_line(self, program: Program, flags: tuple[str, ...], line: str) -> None:
        assert program("convert", "mynet:Net", *flags).error.startswith(line)

    def test_without_shape_it_says_so_and_names_no_macs(self, program: Program) -> None:
        outcome = program("convert", "model.pt", *TRUST).done()
        assert outcome.err == (
            "note: no input shape is known, so there are no sizes and no MACs; say --input-shape 1,3,224,224 for them\n"
        )
        assert re.search(r"^parameters \S+ k → \S+ k \(\S+x fewer\)$", outcome.out, flags=re.MULTILINE)
        header = next(line for line in outcome.out.splitlines() if "geometry" in line)
        assert "MACs" not in header
        assert (program.folder / "model.depthwise.pt").exists()

    def test_weights_come_from_a_file(self, program: Program) -> None:
        outcome = program("convert", "mynet:Net", "--weights", "weights.pt", "--to", "shift").done()
        assert "random" not in outcome.err
        student = cs.load(program.folder / "Net.shift.safetensors", trust_modules=["mynet"])
        expected = cs.rewrite(mynet(program.folder), "shift")
        assert_bit_identical(student, expected)

    def test_student_file_does_not_decide_what_is_imported(self, program: Program) -> None:
        program("convert", "mynet:Net", "--to", "shift").done()
        assert program("inspect", "Net.shift.safetensors").error == (
            "Net.shift.safetensors is built by mynet:Net, which is code not yet allowed; "
            "if you trust that code: --trust-module mynet, or --trust"
        )
        program("inspect", "Net.shift.safetensors", *TRUST).done()

    def test_plan_is_replayed(self, program: Program) -> None:
        choice = ("--to", "group", "--option", "group.groups=2", "--map", "conv2=shift", "--keep", "stem")
        program("convert", "model.pt", *TRUST, *choice).done()
        assert (program.folder / "model.group-shift.pt").exists()
        plan = "model.group-shift.plan.json"
        program("convert", "model.pt", *TRUST, "--plan", plan, "-o", "again.pt").done()
        first, again = (cs.load(program.folder / f"{n}.pt", trust=True) for n in ("model.group-shift", "again"))
        assert_bit_identical(first, again)
        assert (program.folder / "again.plan.json").read_bytes() == (program.folder / plan).read_bytes()

    def test_edited_plan_is_followed(self, program: Program) -> None:
        program("convert", "model.pt", *TRUST, "--to", "shift").done()
        plan = json.loads((program.folder / "model.shift.plan.json").read_text())
        conv1 = next(each for each in plan["decisions"] if each["fqns"] == ["conv1"])
        conv1.update(op=None, options={}, label="by hand", reason="it matters")
        (program.folder / "edited.json").write_text(json.dumps(plan))
        data = program("convert", "model.pt", *TRUST, "--plan", "edited.json", "-o", "e.pt", "--json").done().data
        assert [each["fqns"] for each in data["plan"]["decisions"] if each["op"]] == [["conv2"]]
        assert type(cs.load(program.folder / "e.pt", trust=True).conv1) is nn.Conv2d

    @pytest.mark.parametrize(("op", "rank"), [("lowrank", "90%"), ("cp", "60%"), ("cp", 0.5), ("lowrank", 10**6)])
    def test_a_plan_that_asks_for_a_share_holds_numbers_once_carried_out(
        self, program: Program, op: str, rank: object
    ) -> None:
        program("convert", "mynet:Net", "--weights", "weights.pt", "--to", op, "-o", "a.safetensors").done()
        plan = json.loads((program.folder / "a.plan.json").read_text())
        conv2 = next(each for each in plan["decisions"] if each["fqns"] == ["conv2"])
        conv2["options"] = {"rank": rank}
        (program.folder / "edited.json").write_text(json.dumps(plan))
        choice = ("--weights", "weights.pt", "--plan", "edited.json", "-o", "b.safetensors")
        program("convert", "mynet:Net", *choice).done()
        program("inspect", "b.safetensors", *TRUST).done()  # it can be read again
        written = json.loads((program.folder / "b.plan.json").read_text())["decisions"]
        done = written[plan["decisions"].index(conv2)]
        assert type(done["options"]["rank"]) is int
        assert 1 <= done["options"]["rank"] < 10**4
        assert f"rank={done['options']['rank']}" in done["reason"]

    def test_selectors(self, program: Program) -> None:
        def converted(*args: str) -> dict[str, str]:
            data = program("convert", "mynet:Net", "--dry-run", "--json", *args).done().data
            return {each["fqns"][0]: each["op"] for each in data["plan"]["decisions"] if each["op"]}

        assert converted() == {"conv1": "depthwise", "conv2": "depthwise"}
        assert converted("--keep", "conv1") == {"conv2": "depthwise"}
        assert converted("--only", "conv1") == {"conv1": "depthwise"}
        assert converted("--only", "conv*", "--keep", "*2", "--to", "shift") == {"conv1": "shift"}
        assert converted("--map", "stem=bsconv") == {"stem": "bsconv", "conv1": "depthwise", "conv2": "depthwise"}
        # of several matches the last one that was said wins, also where a pattern is said twice
        twice = ("--map", "conv1=shift", "--map", "conv*=bsconv", "--map", "conv1=group")
        assert converted(*twice) == {"conv1": "group", "conv2": "bsconv"}

    def test_options(self, program: Program) -> None:
        data = program("convert", "mynet:Net", "--to", "group", "--option", "groups=2", "--json").done().data
        groups = {each["fqns"][0]: each["options"].get("groups") for each in data["plan"]["decisions"]}
        assert groups == {"stem": None, "conv1": 2, "conv2": 2, "point": None}
        assert cs.load(program.folder / "Net.group.safetensors", trust=True).conv2.spatial.groups == 2

    def test_dry_run_writes_nothing(self, program: Program) -> None:
        before = program.files()
        outcome = program("convert", "model.pt", *TRUST, "--dry-run", *SHAPE).done()
        assert program.files() == before
        assert "2 converted, 2 kept" in outcome.out
        assert "student" not in outcome.out

    def test_dry_run_works_where_the_output_exists(self, program: Program) -> None:
        existing = program.folder / "model.shift.pt"
        existing.write_bytes(b"precious")
        assert "2 converted" in program("convert", "model.pt", *TRUST, "--to", "shift", "--dry-run").done().out
        assert existing.read_bytes() == b"precious"

    def test_json_is_all_there_is_on_stdout(self, program: Program) -> None:
        data = program("convert", "mynet:Net", "--to", "shift", "--json", *SHAPE).done().data
        assert data["student"] == "Net.shift.safetensors"
        assert data["plan_file"] == "Net.shift.plan.json"
        assert json.loads((program.folder / data["plan_file"]).read_text()) == data["plan"]
        net = mynet(program.folder)
        params = sum(parameter.numel() for parameter in net.parameters())
        assert data["params"]["before"] == params > data["params"]["after"]
        macs = 3 * 8 * 9 * 256 + 8 * 16 * 9 * 64 + 16 * 16 * 9 * 64 + 16 * 16 * 64
        assert data["convolutions"]["macs_before"] == macs > data["convolutions"]["macs_after"]
        assert data["sites"]["conv2"]["macs_before"] == 16 * 16 * 9 * 64
        assert data["sites"]["conv2"]["macs_after"] == 16 * 16 * 64

    @pytest.mark.parametrize("source", ["pictures", "imagefolder:pictures"])
    def test_calibrated_on_a_folder_of_pictures(self, program: Program, source: str) -> None:
        write_pictures(program.folder / "pictures")
        look = ("--size", "16", "--calibrate", source, "--calibration-images", "40", "--polish-minutes", "0.02")
        outcome = program("convert", "model.pt", *TRUST, *look).done()
        assert "calibration: 32 images fitted, 8 held out" in outcome.out
        assert "preprocessing: 16x16, rgb" in outcome.err
        assert "no input shape is known" not in outcome.err  # the pictures say it
        assert "MACs" in outcome.out
        assert re.search(
            r"^fit: 2 convolutions, squared error of their outputs \S+ → \S+ \(medians\)$", outcome.out, re.M
        )
        assert re.search(r"^calibrated in \d+ s, peak memory \d+\.\d GB$", outcome.out, re.M)
        report = json.loads((program.folder / "model.depthwise.calibration.json").read_text())
        assert (report["data"], report["model"], report["seed"]) == (source, "model.pt", 0)
        assert report["convsurgeon"] == cs.__version__
        assert report["polish"]["batch_size"] == 32
        remembered = cs.load(program.folder / "model.depthwise.pt", trust=True)
        assert preprocessing_of(remembered).size == (16, 16)
        assert [stage["name"] for stage in report["stages"]] == [
            "closed form",
            "batch-norm statistics",
            "fit",
            "polish",
        ]
        assert report["stages"][-1]["error"] < report["stages"][0]["error"]
        assert [site["fqn"] for site in report["sites"]] == ["conv1", "conv2"]
        student = cs.load(program.folder / "model.depthwise.pt", trust=True)
        plain = program("convert", "model.pt", *TRUST, "-o", "plain.pt").done()
        assert not torch.equal(
            student.conv2.spatial.weight, cs.load(program.folder / "plain.pt", trust=True).conv2.spatial.weight
        )
        assert "calibration" not in plain.out

    def test_calibration_as_json_without_polish(self, program: Program) -> None:
        digit_reader(program.folder)
        look = ("--calibrate", "digits", "--calibration-images", "50", "--no-polish", "--json")
        data = program("convert", "reader.pt", *TRUST, *look).done().data
        assert data["calibration"]["images"] == {"fitted": 40, "held_out": 10}
        assert [stage["name"] for stage in data["calibration"]["stages"]][-1] == "fit"
        written = json.loads((program.folder / data["calibration_file"]).read_text())
        assert written == data["calibration"]

    def test_student_plan_and_report_are_written_all_or_none(
        self, program: Program, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digit_reader(program.folder)
        before = program.files()

        def fail(*_args: object, **_more: object) -> None:
            raise cs.errors.OutputError("the disk is full")

        monkeypatch.setattr("convsurgeon.storage.save", fail)
        look = ("--calibrate", "digits", "--calibration-images", "20", "--no-polish")
        assert program("convert", "reader.pt", *TRUST, *look).error == "the disk is full"
        assert program.files() == before

    @pytest.mark.parametrize(
        ("output", "said"),
        [
            ("out.xyz", "out.xyz: a model is saved as .safetensors"),
            ("/proc/out.pt", "cannot write /proc/out.pt: No such file or directory (folder /proc)"),
        ],
    )
    def test_what_cannot_be_written_is_said_before_the_calibration(
        self, program: Program, monkeypatch: pytest.MonkeyPatch, output: str, said: str
    ) -> None:
        digit_reader(program.folder)

        def calibrate(*_args: object, **_more: object) -> None:
            raise AssertionError("it went on")

        monkeypatch.setattr("convsurgeon.cli._calibrating.CalibrationRequest.run", calibrate)
        assert program("convert", "reader.pt", *TRUST, "--calibrate", "digits", "-o", output).error.startswith(said)

    def test_images_that_the_model_does_not_take_are_told_with_the_flags_that_change_them(
        self, program: Program
    ) -> None:
        error = program("convert", "mynet:Net", "--calibrate", "digits").error
        assert error.endswith("; the images of --calibrate are 1,1,8,8: --size and --color change them")

    def test_weights_and_plans_that_were_given_are_not_overwritten(self, program: Program) -> None:
        torch.save(mynet(program.folder).state_dict(), program.folder / "own.pt")
        written = (program.folder / "own.pt").read_bytes()
        refused = program("convert", "mynet:Net", "--weights", "own.pt", "-o", "own.pt", "--force", *SHAPE)
        assert (
            refused.error == "own.pt is the file of weights itself; choose another name with -o, so that none is lost"
        )
        assert (program.folder / "own.pt").read_bytes() == written

    def test_the_report_of_another_student_does_not_stay(self, program: Program) -> None:
        digit_reader(program.folder)
        look = ("--calibrate", "digits", "--calibration-images", "20", "--no-polish")
        program("convert", "reader.pt", *TRUST, "-o", "out.pt", *look).done()
        for name in ("out.pt", "out.plan.json"):
            (program.folder / name).unlink()
        refused = program("convert", "reader.pt", *TRUST, "-o", "out.pt", "--to", "shift")
        assert refused.error == "out.calibration.json exists already; choose another name or say --force"
        outcome = program("convert", "reader.pt", *TRUST, "-o", "out.pt", "--to", "shift", "--force").done()
        assert "note: out.calibration.json was the report of another student, and is removed" in outcome.err
        assert "out.calibration.json" not in program.files()

    def test_what_a_calibration_refuses_is_said_before_the_conversion(
        self, program: Program, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def convert(*_args: object, **_more: object) -> None:
            raise AssertionError("converted before it was looked at")

        write_pictures(program.folder / "few", each=2)
        monkeypatch.setattr("convsurgeon.surgery.rewrite", convert)
        few = program("convert", "model.pt", *TRUST, "--calibrate", "few", "--size", "16")
        assert few.error == "calibration needs at least 10 images, got 6; give more"
        digit_reader(program.folder)
        half = cs.load(program.folder / "reader.pt", trust=True).bfloat16()
        torch.save(half, program.folder / "half.pt")
        assert (
            "in which the polish cannot train" in program("convert", "half.pt", *TRUST, "--calibrate", "digits").error
        )

    def test_a_folder_of_a_data_sets_name_is_told(self, program: Program) -> None:
        digit_reader(program.folder)
        write_pictures(program.folder / "digits", each=8)
        look = ("--calibrate", "digits", "--no-polish", "--size", "8", "--color", "L", "-o", "out.pt")
        outcome = program("convert", "reader.pt", *TRUST, *look)
        assert "note: digits is the folder of that name here, not the data set; ./digits says so, too\n" in outcome.err

    def test_a_refusal_of_all_says_why(self, program: Program) -> None:
        error = program("convert", "model.pt", *TRUST, "--option", "expansion=2", "--option", "assignment=learned",
                        "--to", "shift").error  # fmt: skip
        assert "2 are shift refused (assignment=learned takes expansion=1, not 2), 1 is" in error

    def test_a_calibration_that_fails_writes_nothing(self, program: Program) -> None:
        write_pictures(program.folder / "few", each=2)
        before = program.files()
        outcome = program("convert", "model.pt", *TRUST, "--calibrate", "few", "--size", "16")
        assert outcome.error == "calibration needs at least 10 images, got 6; give more"
        assert program.files() == before

    def test_existing_files_stay_without_force(self, program: Program) -> None:
        program("convert", "model.pt", *TRUST, "--to", "shift").done()
        (program.folder / "model.shift.pt").unlink()
        line = "model.shift.plan.json exists already; choose another name or say --force"
        assert program("convert", "model.pt", *TRUST, "--to", "shift").error == line
        assert not (program.folder / "model.shift.pt").exists()
        program("convert", "model.pt", *TRUST, "--to", "shift", "--force").done()
        assert (program.folder / "model.shift.pt").exists()

    def test_student_is_converted_only_once(self, program: Program) -> None:
        program("convert", "model.pt", *TRUST, "--to", "shift").done()
        said = program("convert", "model.shift.pt", *TRUST, "--to", "depthwise").error
        assert said.startswith(
            "nothing to convert: 0 of 4 convolutions of Net can become 'depthwise': 2 are converted already"
        )

    def test_brackets_in_a_pattern_are_shown(self, program: Program) -> None:
        outcome = program("convert", "mynet:Net", "--keep", "conv[a1]", "--dry-run").done()
        assert "kept by --keep 'conv[a1]'" in outcome.out

    def test_long_paths_stay_on_one_line(self, program: Program) -> None:
        folder = Path(*["a-rather-long-name-of-a-folder"] * 7)
        (program.folder / folder).mkdir(parents=True)
        outcome = program("convert", "mynet:Net", "-o", str(folder / "student.safetensors")).done()
        assert f"student: {folder / 'student.safetensors'}" in outcome.out.splitlines()


class TestInspect:
    def test_json(self, program: Program) -> None:
        data = program("inspect", "mynet:Net", *SHAPE, "--json").done().data
        rows = {row["fqns"][0]: row for row in data["convolutions"]}
        assert list(rows) == ["stem", "conv1", "conv2", "point"]
        assert data["model"] == "Net"
        assert data["macs"] == sum(row["macs"] for row in rows.values())
        assert rows["conv1"]["macs"] == 8 * 16 * 9 * 8 * 8
        assert rows["conv1"]["geometry"] == "8→16, 3x3, stride 2, padding 1"
        assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
        assert [row["kept_because"] for row in rows.values()] == [
            "it is the stem: the first layer, with 3 input channels",
            None,
            None,
            "it is cheap already: 1x1",
        ]
        for row in rows.values():
            assert sorted(row["ops"]) == ops.names()
            assert all((row["ops"][name] is None) == (name in row["refusals"]) for name in ops.names())
        assert rows["conv2"]["ops"]["shift"] == 9.0
        assert set(rows["point"]["refusals"]) >= {"shift", "depthwise"}

    def test_table(self, program: Program) -> None:
        outcome = program("inspect", "mynet:Net", *SHAPE).done()
        lines = outcome.out.splitlines()
        assert lines[0].strip() == "Net: 4 convolutions"
        titles = [cell.strip() for cell in lines[2].strip("┃").split("┃")]
        assert titles == ["name", "geometry", "MACs", "share", "kept by default, because"]
        rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
        assert [row[:4] for row in rows[:4]] == [
            ["stem", "3→8, 3x3, padding 1", "55.3 k", "18.9 %"],
            ["conv1", "8→16, 3x3, stride 2, padding 1", "73.7 k", "25.2 %"],
            ["conv2", "16→16, 3x3, padding 1", "147 k", "50.3 %"],
            ["point", "16→16, 1x1", "16.4 k", "5.6 %"],
        ]
        assert [row[0] for row in rows[4:]] == ops.names()
        # the two that are no 1x1 and no stem, nine times each: 293 k - 8/9 of 73.7 k and 147 k
        assert next(row for row in rows if row[0] == "shift") == [
            "shift",
            ops.get("shift").summary,
            "2",
            "9.0x",
            "96.3 k (3.0x)",
        ]
        assert lines[-1] == "all convolutions: 293 k MACs for one image"

    def test_without_shape(self, program: Program) -> None:
        outcome = program("inspect", "model.pt", *TRUST).done()
        assert outcome.err == "sizes and MACs need an input's shape: --input-shape 1,3,224,224\n"
        assert "share" not in outcome.out
        data = program("inspect", "model.pt", *TRUST, "--json").done().data
        assert data["macs"] is None
        assert {row["share"] for row in data["convolutions"]} == {None}

    def test_shape_of_named_models_is_known(self, program: Program) -> None:
        data = program("inspect", "torchvision:resnet18", "--json").done().data
        assert data["macs"] == 1_813_561_344

    def test_student_shows_what_it_was(self, program: Program) -> None:
        program("convert", "model.pt", *TRUST, "--to", "shift").done()
        data = program("inspect", "model.shift.pt", *TRUST, "--json").done().data
        kept = {row["fqns"][0]: row["kept_because"] for row in data["convolutions"]}
        assert kept["conv1"] == "it is a cheap convolution already: shift"

    def test_untraceable_model_is_one_note(self, program: Program) -> None:
        code = (program.folder / "mynet.py").read_text()
        branch = "        if x.sum() > 0:\n            x = -x\n        return self.fc"
        (program.folder / "mynet.py").write_text(code.replace("        return self.fc", branch))
        outcome = program("inspect", "mynet:Net", *SHAPE).done()
        notes = [line for line in outcome.err.splitlines() if "torch.fx" in line]
        assert len(notes) == 1
        assert notes[0].startswith("note: torch.fx could not trace (root) (")
        assert notes[0].endswith("; its convolutions were found all the same")


class TestOps:
    def test_catalogue_is_the_registry(self, program: Program) -> None:
        data = program("ops", "--json").done().data
        assert [row["name"] for row in data["ops"]] == ops.names()
        for row in data["ops"]:
            op = ops.get(row["name"])
            assert (row["structure"], row["reference"]) == (op.summary, op.reference)
            assert (row["cost"], row["keeps"], row["slow"]) == (op.cost, op.keeps, op.slow)
            assert "not said" not in row.values()
        options = {row["name"]: row["options"] for row in data["ops"]}
        assert options["group"]["groups"] == {"default": 8, "allowed": "a number"}
        assert options["tucker"]["rank_in"]["allowed"] == "a number, a share as 0.25, or of the energy as 90%, or none"
        assert options["shift"]["assignment"]["allowed"] == "energy, fixed, balanced, learned"
        table = program("ops").done().out
        for name in ops.names():
            assert re.search(rf"^│ {name} ", table, flags=re.MULTILINE)
        assert "groups=8" in table

    def test_one_op(self, program: Program) -> None:
        all_of_them = {row["name"]: row for row in program("ops", "--json").done().data["ops"]}
        assert program("ops", "shift", "--json").done().data == {"ops": [all_of_them["shift"]]}
        table = program("ops", "shift").done().out
        assert "expansion=1" in table
        assert "groups=8" not in table
        assert program("ops", "shft").error.startswith("unknown op 'shft'. Did you mean 'shift'?")


class TestEvaluate:
    def test_module_and_its_teacher(self, program: Program) -> None:
        net = digit_reader(program.folder)
        program("convert", "reader.pt", *TRUST, "-o", "student.pt", "--to", "shift").done()
        student = cs.load(program.folder / "student.pt", trust=True).eval()
        test = load_data("digits", preprocessing=GRAY).test
        images, labels = test.__getitems__(range(len(test)))
        with torch.no_grad():
            answers, expected = student(images).argmax(1), net(images).argmax(1)
        accuracy = (answers == labels).float().mean().item()
        agreement = (answers == expected).float().mean().item()
        args = ("evaluate", "student.pt", "--data", "digits", *TRUST)
        outcome = program(*args, "--teacher", "reader.pt", "--json").done()
        assert outcome.err.splitlines()[0] == "preprocessing: 10x10, gray, mean 0.25, std 0.5"
        assert "was made for the classes n0, n1" in outcome.err
        assert outcome.data == {
            "model": "student.pt",
            "data": "digits",
            "split": "test",
            "preprocessing": GRAY.to_dict(),
            "images": 360,
            "accuracy": pytest.approx(accuracy),
            "agreement": pytest.approx(agreement),
        }
        line = f"accuracy {100 * accuracy:.2f} % on 360 images of digits (test)"
        assert program(*args).done().out == f"{line}\n"
        agrees = f"; agrees with the teacher on {100 * agreement:.2f} %"
        assert program(*args, "--teacher", "reader.pt").done().out == f"{line}{agrees}\n"

    def test_onnx_file_is_read_with_its_preprocessing(self, program: Program) -> None:
        digit_reader(program.folder)
        program("export", "reader.pt", *TRUST).done()
        args = ("--data", "digits", "--json")
        outcome = program("evaluate", "reader.onnx", *args, "--teacher", "reader.pt", *TRUST).done()
        assert outcome.err.splitlines()[0] == "preprocessing: 10x10, gray, mean 0.25, std 0.5"
        module = program("evaluate", "reader.pt", *args, *TRUST).done()
        assert outcome.data["accuracy"] == module.data["accuracy"]
        assert outcome.data["agreement"] == 1

    def test_splits_and_limits(self, program: Program) -> None:
        digit_reader(program.folder)
        args = ("evaluate", "reader.pt", *TRUST, "--data", "digits", "--json")
        splits = load_data("digits")
        counts = {name: program(*args, "--split", name).done().data["images"] for name in ("train", "val", "test")}
        assert counts == {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)}
        assert program(*args, "--batch-size", "16", "--limit-batches", "2").done().data["images"] == 32

    def test_flags_change_the_preprocessing(self, program: Program) -> None:
        digit_reader(program.folder)
        args = ("evaluate", "reader.pt", *TRUST, "--data", "digits")
        flags = ("--size", "6,7", "--mean", "0.1", "--std", "0.2")
        assert program(*args, *flags).done().err.splitlines()[0] == "preprocessing: 6x7, gray, mean 0.1, std 0.2"

    def test_foreign_metadata_is_refused_in_a_line(self, program: Program) -> None:
        digit_reader(program.folder)
        program("export", "reader.pt", *TRUST).done()
        path = program.folder / "reader.onnx"
        proto = onnx.load(path)
        next(entry for entry in proto.metadata_props if entry.key == "preprocessing").value = "imagenet"
        onnx.save(proto, path)
        said = program("evaluate", "reader.onnx", "--data", "digits").error
        assert said == "reader.onnx has preprocessing in its metadata that is no JSON object: 'imagenet'"


class TestExport:
    def test_random_inputs_only(self, program: Program) -> None:
        before = program.files()
        outcome = program("export", "model.pt", *TRUST, *SHAPE, "--threads", "1").done()
        assert program.files() == sorted([*before, "model.onnx"])
        first, parity, latency = outcome.out.splitlines()
        size = (program.folder / "model.onnx").stat().st_size
        assert re.fullmatch(rf"model.onnx: {size / 1e6:.3f} MB, opset \d+", first)
        assert re.fullmatch(
            r"parity: \d\.\de[+-]\d\d of the largest output \(allowed 1e-04\), batches of 1, 3, random inputs only",
            parity,
        )
        assert re.match(r"latency of student, 1 thread: median \d+\.\d{3} ms of \d+ \(", latency)
        opened = onnxruntime.InferenceSession(str(program.folder / "model.onnx"))
        images = torch.randn(5, 3, 16, 16)
        with torch.no_grad():
            expected = mynet(program.folder)(images)
        torch.testing.assert_close(torch.from_numpy(opened.run(None, {"x": images.numpy()})[0]), expected)

    def test_real_images_a_teacher_and_metadata(self, program: Program) -> None:
        digit_reader(program.folder)
        program("convert", "reader.pt", *TRUST, "-o", "student.pt", "--to", "shift").done()
        args = ("--teacher", "reader.pt", *TRUST, "--data", "digits", "--threads", "1")
        outcome = program("export", "student.pt", "-o", "s.onnx", *args).done()
        assert outcome.err.splitlines()[0] == "preprocessing: 10x10, gray, mean 0.25, std 0.5"
        assert outcome.out.splitlines()[1].endswith("random and real inputs")
        assert re.search(r"^latency of teacher, 1 thread: ", outcome.out, flags=re.MULTILINE)
        assert re.search(r"^teacher / student, 1 thread: \d+\.\d\dx$", outcome.out, flags=re.MULTILINE)
        entries = {each.key: each.value for each in onnx.load(program.folder / "s.onnx").metadata_props}
        assert json.loads(entries["preprocessing"]) == GRAY.to_dict()
        assert json.loads(entries["classes"]) == [f"n{i}" for i in range(10)]
        assert json.loads(entries["plan"])["converted"] == {"shift": 2}
        assert [name for name in program.files() if name.endswith(".onnx")] == ["s.onnx"]

    def test_json_and_flags_of_the_preprocessing(self, program: Program) -> None:
        args = ("--model-arg", "num_classes=10", "--data", "digits", "--size", "12", "--color", "rgb", "--threads", "1")
        data = program("export", "mynet:Net", *args, "--json").done().data
        assert data["path"] == "mynet-Net.onnx"
        assert data["bytes"] == (program.folder / "mynet-Net.onnx").stat().st_size
        assert data["parity"]["real_images"] is True
        assert 0 <= data["parity"]["max_rel"] <= data["parity"]["tolerance"] == 1e-4
        assert len(set(data["parity"]["batches"])) >= 2
        assert [each["threads"] for each in data["latency"]] == [1]
        opened = onnxruntime.InferenceSession(str(program.folder / "mynet-Net.onnx"))
        assert opened.get_inputs()[0].shape == ["batch", 3, 12, 12]
        entries = opened.get_modelmeta().custom_metadata_map
        assert json.loads(entries["preprocessing"])["size"] == [12, 12]
        assert json.loads(entries["classes"]) == [str(digit) for digit in range(10)]

    def test_classes_of_other_data_are_not_stored(self, program: Program) -> None:
        args = ("--data", "digits", "--color", "rgb", "--threads", "1", "--json")
        data = program("export", "mynet:Net", *args).done().data  # three scores, ten digits
        assert "classes" not in data["metadata"]

    def test_failure_leaves_nothing(self, program: Program) -> None:
        code = (program.folder / "mynet.py").read_text()
        branch = "        if x.sum() > 0:\n            x = -x\n        return self.fc"
        (program.folder / "mynet.py").write_text(code.replace("        return self.fc", branch))
        (program.folder / "mynet-Net.onnx").write_bytes(b"of yesterday")
        before = program.files()
        said = program("export", "mynet:Net", *SHAPE, "--force").error
        assert said.startswith("torch.onnx cannot export Net: ")
        assert program.files() == before
        assert (program.folder / "mynet-Net.onnx").read_bytes() == b"of yesterday"

    def test_failing_teacher_leaves_nothing(self, program: Program) -> None:
        before = program.files()
        teacher = ("--teacher", "torchvision:alexnet", "--model-arg", "num_classes=3")
        assert (
            "cannot be called with an input of 2x3x16x16"
            in program("export", "model.pt", *TRUST, *SHAPE, *teacher).error
        )
        assert program.files() == before


def test_load_and_save_keep_the_record(program: Program) -> None:
    digit_reader(program.folder)
    program("convert", "reader.pt", *TRUST, "-o", "student.pt").done()
    record = read_record(cs.load(program.folder / "student.pt", trust=True))
    assert record["preprocessing"] == GRAY.to_dict()
    assert record["classes"] == [f"n{i}" for i in range(10)]


class TestDrawing:
    FIGURES: ClassVar = {
        "epoch": 2,
        "epochs": 5,
        "loss": 1.2345,
        "student_accuracy": 0.5,
        "teacher_accuracy": 0.75,
        "images_per_second": 1234.4,
        "seconds_left": 3671,
    }
    NOTE = "epoch 2/5  loss 1.234  student 50.0%  teacher 75.0%  1234 images/s  1:01:11 left"

    def test_bar_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = io.StringIO()
        terminal = Console(file=seen, force_terminal=True, width=160, color_system=None)
        monkeypatch.setattr("convsurgeon.cli._drawing.console", lambda *, stderr: terminal)
        with Drawing() as drawing:
            drawing(Progress("train", 30, 100, self.FIGURES))
        assert "train" in seen.getvalue()
        assert "30/100" in seen.getvalue()
        assert self.NOTE in seen.getvalue()

    def test_a_line_now_and_then_elsewhere(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock = [100.0]
        monkeypatch.setattr("convsurgeon.cli._drawing.time.monotonic", lambda: clock[0])
        with Drawing() as drawing:
            for step, clock[0] in enumerate((101.0, 109.0, 111.0, 112.0, 122.0), start=1):
                drawing(Progress("train", step, 5, self.FIGURES))
                drawing(Progress("evaluate", step, 5))
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"step 3/5  {self.NOTE}\nstep 5/5  {self.NOTE}\n"

    def test_messages_and_epochs_are_lines_of_their_own(self, capsys: pytest.CaptureFixture[str]) -> None:
        with Drawing() as drawing:
            drawing(Progress("demo", message="1/5 [bold]x[/] :smile:"))
            drawing(Progress("epoch", 1, 2, {"loss": 2.0, "student_accuracy": 0.25, "seconds": 62}))
            drawing(Progress("epoch", message="no validation data: the last student is kept"))
        assert capsys.readouterr().err.splitlines() == [
            "1/5 [bold]x[/] :smile:",
            "epoch 1/2  loss 2.000  validation: student 25.00%  1:02",
            "no validation data: the last student is kept",
        ]


ODD = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.weight = nn.Parameter(torch.zeros(8, 8, 3, 3))

    def forward(self, x):
        return self.up(nn.functional.conv2d(self.conv(x), self.weight))
"""


def test_what_is_not_converted_is_named_and_has_no_made_up_figures(tmp_path: Path) -> None:
    (tmp_path / "oddnet.py").write_text(ODD)
    program = Program(tmp_path)
    flags = ("oddnet:Odd", "--input-shape", "1,8,16,16")
    converted = program("convert", *flags, "--dry-run").done()
    (row,) = [line for line in converted.out.splitlines() if line.startswith("│ weight ")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:3] == ["weight", "8→8, 3x3", "depthwise"]
    (row,) = [line for line in program("inspect", *flags).done().out.splitlines() if line.startswith("│ weight ")]
    assert "8→8, 3x3, in oddnet.py:14" in row
    (row,) = [line for line in converted.out.splitlines() if line.startswith("│ up ")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["up", "–", "kept", "–", "–", "ConvTranspose2d is not a Conv2d"]


@pytest.mark.parametrize("arguments", [("ops",), ("ops", "--json")])
def test_a_reader_that_leaves_is_no_mistake(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "from convsurgeon.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", code, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    code = "from convsurgeon.cli import main; main()"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code, "ops"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "error: cannot write what there is to say: No space left on device; files that it names are there"
    ]


@pytest.mark.parametrize(("length", "named"), [(240, "plan.json"), (300, "pt")])
def test_a_name_too_long_leaves_neither_student_nor_plan(length: int, named: str, tmp_path: Path) -> None:
    (tmp_path / "oddnet.py").write_text(ODD)
    program = Program(tmp_path)
    before = program.files()
    assert f"{named}: File name too long" in program("convert", "oddnet:Odd", "-o", f"{'c' * length}.pt").error
    assert program.files() == before
