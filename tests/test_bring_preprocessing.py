"""What pictures go through: one rule for every verb, nothing that nobody has said, stored once and read back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from command import Program, mynet, write_pictures
from PIL import Image
from torchvision.transforms import v2

import convsurgeon as cs
from convsurgeon.errors import OptionError
from convsurgeon.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, choose_preprocessing
from convsurgeon.record import read_record

FRAMED = '''
import torch
from torch import nn


class Net(nn.Module):
    """Tells the color of a picture's frame of one pixel, and sees nothing else."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1, bias=False)
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(3)[:, :, None, None])
            self.conv.weight.zero_()[range(3), range(3), 1, 1] = 1

    def forward(self, x):
        x = self.conv(self.stem(x))
        return torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).mean(2)
'''
SIZE = ("--size", "16")
SHOWN = "preprocessing: 16x16, rgb, mean 0.485,0.456,0.406, std 0.229,0.224,0.225"
ASSUMED = (
    "note: framed:Net has no stored preprocessing; mean and std are assumed to be ImageNet's: --mean, --std change them"
)
DATA = ("--data", "imagefolder:frames")
VERBS: dict[str, tuple[str, ...]] = {
    "evaluate": ("evaluate", "framed:Net", *DATA),
    "distill": ("distill", "framed:Net", *DATA, "--epochs", "1", "--batch-size", "8", "--only", "conv", "-o", "RUN"),
    "convert": ("convert", "framed:Net", "--calibrate", "frames", "--no-polish", "--only", "conv"),
    "export": ("export", "framed:Net", *DATA),
}


def write_frames(folder: Path, *, each: int = 12, side: int = 16) -> Path:
    """Write pictures whose class is the color of their frame; a wider frame inside of it has the next class's color."""
    rng = random.Random(0)
    for channel, name in enumerate(("a", "b", "c")):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            picture = Image.new("RGB", (side, side), tuple(230 if c == channel else 20 for c in range(3)))
            inner = tuple(230 if c == (channel + 1) % 3 else rng.randrange(40) for c in range(3))
            picture.paste(inner, (1, 1, side - 1, side - 1))
            picture.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def program(tmp_path: Path) -> Program:
    (tmp_path / "framed.py").write_text(FRAMED)
    write_frames(tmp_path / "frames")
    return Program(tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_same_and_no_crop(program: Program, verb: str) -> None:
    outcome = program(*VERBS[verb], *SIZE).done()
    assert outcome.err.splitlines()[:3].count(SHOWN) == 1
    assert outcome.err.splitlines().count(ASSUMED) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_unknown_size(program: Program, verb: str) -> None:
    before = program.files()
    error = program(*VERBS[verb]).error
    assert "the size of the images that framed:Net takes is not known" in error
    assert error.endswith("say it: --size H or --size H,W")
    assert program.files() == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--crop", "0"), "--crop takes a share above 0 and up to 1 such as 0.875, or none; got '0'"),
        (("--crop", "87%"), "--crop takes a share"),
        (("--crop", "nan"), "--crop takes a share"),
        (("--interpolation", "cubic"), "--interpolation is one of bilinear, bicubic, nearest, nearest-exact"),
    ],
)
def test_every_verb_refuses_what_cannot_be(program: Program, verb: str, flags: tuple[str, ...], message: str) -> None:
    assert program(*VERBS[verb], *SIZE, *flags).error.startswith(message)


def accuracy(program: Program, *args: str) -> float:
    found = program("evaluate", *args, *DATA, "--split", "train", "--json").done().data["accuracy"]
    assert isinstance(found, float)
    return found


def test_the_accuracy_is_that_of_the_whole_picture(program: Program) -> None:
    assert accuracy(program, "framed:Net", *SIZE) == 1
    assert accuracy(program, "framed:Net", *SIZE, "--crop", "none") == 1


def test_a_crop_is_taken_where_it_is_said(program: Program) -> None:
    assert accuracy(program, "framed:Net", "--size", "12", "--crop", "0.75") == 0
    outcome = program("evaluate", "framed:Net", *DATA, "--size", "12", "--crop", "0.75").done()
    assert ", crop 0.75" in outcome.err


LOOKS = ("--size", "12,14", "--crop", "0.8", "--interpolation", "bicubic", "--mean", "0.5", "--std", "0.25")
LOOKED = Preprocessing((12, 14), (0.5,) * 3, (0.25,) * 3, crop=0.8, interpolation="bicubic")


class TestReadBack:
    """What one verb stores, each later one takes without a flag and without a remark."""

    def test_after_convert(self, program: Program) -> None:
        program(*VERBS["convert"], *LOOKS, "-o", "student.safetensors").done()
        trust = ("--trust-module", "framed")
        self.check(program, ("evaluate", "student.safetensors", *trust, *DATA))
        self.check(program, ("export", "student.safetensors", *trust, *DATA))
        self.check(program, ("evaluate", "student.onnx", *DATA))
        self.check(program, ("evaluate", "student.onnx", "--teacher", "framed:Net", *DATA))
        self.check(program, ("evaluate", "framed:Net", "--teacher", "student.onnx", *DATA))
        again = ("--calibrate", "frames", "--no-polish", "--to", "none", "--map", "stem=lowrank")
        self.check(program, ("convert", "student.safetensors", *trust, *again))
        self.check(program, ("distill", "framed:Net", "student.safetensors", *DATA, "--epochs", "1", "-o", "RUN"))

    def test_after_distill(self, program: Program) -> None:
        program(*VERBS["distill"], *LOOKS).done()
        report = json.loads((program.folder / "RUN/report.json").read_text())
        assert Preprocessing.from_dict(report["preprocessing"]) == LOOKED
        trust = ("--trust-module", "framed")
        self.check(program, ("evaluate", "RUN/student.safetensors", *trust, *DATA))
        for name in ("student.onnx", "teacher.onnx"):
            self.check(program, ("evaluate", f"RUN/{name}", *DATA))

    def test_after_export(self, program: Program) -> None:
        program(*VERBS["export"], *LOOKS, "-o", "net.onnx").done()
        entries = {entry.key: entry.value for entry in onnx.load(program.folder / "net.onnx").metadata_props}
        assert Preprocessing.from_dict(json.loads(entries["preprocessing"])) == LOOKED
        self.check(program, ("evaluate", "net.onnx", *DATA))

    def test_a_pickled_module(self, program: Program) -> None:
        program(*VERBS["convert"], *LOOKS, "-o", "student.pt").done()
        self.check(program, ("evaluate", "student.pt", "--trust-module", "framed", *DATA))

    def test_flags_still_change_it(self, program: Program) -> None:
        program(*VERBS["export"], *LOOKS, "-o", "net.onnx").done()
        shown = program("evaluate", "net.onnx", *DATA, "--mean", "0.1", "--crop", "none").done().err
        assert shown == "preprocessing: 12x14, rgb, mean 0.1,0.1,0.1, std 0.25,0.25,0.25, bicubic\n"

    def check(self, program: Program, args: tuple[str, ...]) -> None:
        lines = program(*args).done().err.splitlines()
        assert f"preprocessing: {LOOKED}" in lines
        assert not [line for line in lines if "preprocessing" in line and not line.startswith("preprocessing: ")]


def test_an_onnx_file_says_its_size_and_no_more(program: Program) -> None:
    program("export", "framed:Net", "--input-shape", "1,3,16,16", "-o", "bare.onnx").done()
    lines = program("evaluate", "bare.onnx", *DATA).done().err.splitlines()
    assert lines == [ASSUMED.replace("framed:Net", "bare.onnx"), SHOWN]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_export_takes_the_stored_size(program: Program, suffix: str) -> None:
    program(*VERBS["convert"], *LOOKS, "-o", f"student.{suffix}").done()
    trust = ("--trust-module", "framed")
    program("export", f"student.{suffix}", *trust, "-o", "student.onnx").done()
    (entry,) = onnx.load(program.folder / "student.onnx").graph.input
    assert [dim.dim_value for dim in entry.type.tensor_type.shape.dim][1:] == [3, 12, 14]


@pytest.mark.parametrize("shape", [(), ("--input-shape", "1,3,12,14")])
def test_export_writes_what_the_flags_say_without_data(program: Program, shape: tuple[str, ...]) -> None:
    looks = LOOKS if not shape else LOOKS[2:]
    outcome = program("export", "framed:Net", *looks, *shape, "-o", "net.onnx").done()
    assert f"preprocessing: {LOOKED}" in outcome.err.splitlines()
    entries = {entry.key: entry.value for entry in onnx.load(program.folder / "net.onnx").metadata_props}
    assert Preprocessing.from_dict(json.loads(entries["preprocessing"])) == LOOKED
    assert program("evaluate", "net.onnx", *DATA).done().err == f"preprocessing: {LOOKED}\n"


def test_the_crop_of_a_librarys_own_weights_is_told_from_that_of_others(program: Program) -> None:
    model = cs.load("torchvision:squeezenet1_1", model_args={"num_classes": 3})
    torch.save(model.state_dict(), program.folder / "mine.pth")
    args = ("torchvision:squeezenet1_1", "--weights", "mine.pth", "--model-arg", "num_classes=3")
    note = "note: crop 0.875 is that of torchvision's own weights; --crop none, if yours had none"
    data = ("--data", "imagefolder:frames", "--size", "32", "--limit-batches", "1")
    assert program("evaluate", *args, *data).done().err.splitlines().count(note) == 1
    assert note not in program("evaluate", *args, *data, "--crop", "none").done().err
    assert note not in program("evaluate", *args, *data, "--crop", "0.875").done().err
    calibrated = ("--calibrate", "frames", "--no-polish", "--size", "32", "--crop", "0.875", "--only", "features.6.*")
    program("convert", *args, *calibrated, "--to", "group", "-o", "s.safetensors").done()
    assert "crop 0.875 is that" not in program("evaluate", "s.safetensors", *data[:2], *data[4:]).done().err


def test_networks_that_were_stored_with_others_are_told_of(program: Program) -> None:
    program(*VERBS["export"], *LOOKS, "-o", "one.onnx").done()
    program(*VERBS["export"], *SIZE, "-o", "other.onnx").done()
    fixed = ("--size", "16")
    lines = program("evaluate", "other.onnx", "--teacher", "one.onnx", *DATA, *fixed)
    note = f"note: one.onnx was made for images of {LOOKED}; those of other.onnx are taken for both"
    assert note in lines.err.splitlines()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_images_of_a_factory_as_they_are(program: Program, verb: str) -> None:
    (program.folder / "ready.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n\n"
        "def make():\n    part = TensorDataset(torch.rand(24, 3, 16, 16), torch.arange(24) % 3)\n"
        "    return part, part, part\n"
    )
    args = [{"imagefolder:frames": "ready:make", "frames": "ready:make"}.get(each, each) for each in VERBS[verb]]
    assert "preprocessing" not in program(*args).done().err


def test_a_data_set_with_a_name_says_its_own(program: Program) -> None:
    mynet(program.folder)
    args = ("evaluate", "mynet:Net", "--model-arg", "num_classes=10", "--model-arg", "in_chans=1", "--data", "digits")
    note, shown = program(*args).done().err.splitlines()[-2:]
    assert note == (
        "note: mynet:Net has no stored preprocessing; size, mean, std and color are taken from digits: "
        "--size, --mean, --std, --color change them"
    )
    assert shown == "preprocessing: 8x8, gray, mean 0.305, std 0.376"
    said = ("--size", "8", "--mean", "0.3", "--std", "0.4", "--color", "gray")
    assert "stored preprocessing" not in program(*args, *said).done().err


def test_the_sources_own_crop_and_interpolation_stay(program: Program) -> None:
    write_pictures(program.folder / "pictures", each=10, size=40)
    args = ("--model-arg", "num_classes=3", "--data", "imagefolder:pictures", "--limit-batches", "1", "--size", "32")
    shown = program("evaluate", "torchvision:squeezenet1_1", *args).done().err
    assert "preprocessing: 32x32, rgb, mean 0.485,0.456,0.406, std 0.229,0.224,0.225, crop 0.875\n" in shown
    shown = program("evaluate", "timm:mobilenetv3_small_050", *args).done().err
    assert ", crop 0.875, bicubic\n" in shown


CHOICES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "stored": ({"stored": LOOKED}, str(LOOKED), None),
    "stored, changed": ({"stored": LOOKED, "flags": {"crop": "none", "interpolation": "nearest"}}, "nearest", None),
    "of a shape": ({"input_shape": [1, 3, 20, 24]}, "20x24, rgb, mean 0.485", "mean and std are assumed"),
    "of a gray shape": ({"input_shape": [1, 1, 20, 24]}, "20x24, gray, mean 0.449", "mean and std are assumed"),
    "of a gray shape, rgb said": ({"input_shape": [1, 1, 20, 24], "flags": {"color": "rgb"}}, "20x24, rgb", "mean"),
    "size said": ({"input_shape": [1, 3, 20, 24], "flags": {"size": "8"}}, "8x8, rgb", "mean and std are assumed"),
    "mean said": ({"flags": {"size": "8", "mean": "0.5"}}, "8x8, rgb, mean 0.5", "std is assumed to be ImageNet's"),
    "all said": ({"flags": {"size": "8", "mean": "0", "std": "1"}}, "8x8, rgb, mean 0,0,0, std 1,1,1", None),
    "natural": ({"natural": LOOKED}, str(LOOKED), "size, mean, std and color are taken from DATA"),
    "stored before natural": ({"stored": LOOKED, "natural": Preprocessing((3, 3), (0,) * 3, (1,) * 3)}, "12x14", None),
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_comes_first(case: str) -> None:
    given, shown, remark = CHOICES[case]
    arguments = {"stored": None, "natural": None, "flags": {}, **given}
    wanted, said = choose_preprocessing(**arguments, who="NET", data="DATA")
    assert shown in str(wanted)
    assert (said is None) == (remark is None)
    assert remark is None or f"NET has no stored preprocessing; {remark}" in (said or "")


@pytest.mark.parametrize("shape", [None, [1, 16], [1, 3, 8, 8, 8], []])
def test_a_size_that_nobody_has_said_is_refused(shape: list[int] | None) -> None:
    with pytest.raises(OptionError, match="the size of the images that NET takes is not known"):
        choose_preprocessing(None, None, {"mean": "0.5"}, who="NET", data="DATA", input_shape=shape)


@pytest.mark.parametrize("how", ["bilinear", "bicubic", "nearest", "nearest-exact"])
def test_interpolation_is_torchvisions(how: str) -> None:
    photo = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    mode = v2.InterpolationMode(how)
    theirs = v2.Compose([v2.Resize(40, interpolation=mode, antialias=True), v2.CenterCrop(32)])
    ours = Preprocessing((32, 32), IMAGENET_MEAN, IMAGENET_STD, crop=0.8, interpolation=how)
    assert torch.equal(ours.fit(photo), theirs(photo))


def test_timms_own_evaluation_transform_gives_the_same_pixels() -> None:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = cs.load("timm:mobilenetv3_small_050")
    stored = Preprocessing.from_dict(read_record(model)["preprocessing"])
    config = resolve_model_data_config(timm.create_model("mobilenetv3_small_050"))
    photo = Image.effect_noise((300, 260), 60).convert("RGB").resize((400, 300))
    theirs = create_transform(**config)(photo)
    ours = stored.normalize(stored.fit(photo)[None])[0]
    assert (ours - theirs).abs().max() < 0.1  # PIL and tensors round differently
    assert (ours - theirs).abs().mean() < 0.01
