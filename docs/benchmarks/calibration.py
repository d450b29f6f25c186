"""Calibration without labels on Fashion-MNIST: what each stage is worth for each op.

    python docs/benchmarks/calibration.py

trains the teachers (once; they are kept), then every row of the grid that is not in the results yet, and
appends one JSON line a row, so it can be stopped and started again at any time. `--latency` times the networks
in onnxruntime, in turns; the tables come from `--table`, which trains nothing.

The images are training images without their labels; the test set is looked at after each stage, and
decides nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon.calibration import Polish, calibrate_and_report
from convsurgeon.data import DataSplits, load_data
from convsurgeon.delivery import measure_latency, ratio
from convsurgeon.distillation import Augmentation
from convsurgeon.surgery import count_macs, count_params

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "paper"))
from resnet import resnet20

HERE = Path(__file__).parent
LATENCIES = HERE / "calibration_latency.json"
IMAGE = torch.zeros(1, 1, 28, 28)
TEACHERS: dict[str, dict[str, Any]] = {"resnet20": {"epochs": 14}, "vgg": {"epochs": 8, "optimizer": "muon"}}
"""How each was trained."""
MAIN = ("group", "depthwise", "bsconv", "shift")
OPTIONS: dict[str, dict[str, Any]] = {"group": {"groups": 4}, "cp rank=0.055": {"rank": 0.055}}
"""Where they are not the op's defaults; a name of more than one word begins with the op."""
STAGES = ("closed form", "batch-norm statistics", "fit", "polish")


class Vgg(nn.Module):
    """A VGG-like classifier of small gray images: nine 3x3 convolutions of 32 to 256 channels, no shortcut."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for width in (32, 32, 0, 64, 64, 0, 128, 128, 0, 256, 256):
            if width:
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 1, H, W)` to `(B, num_classes)`."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def grid() -> Iterator[dict[str, Any]]:
    """The rows: the main ops first, with three seeds of the calibration."""
    for network in ("resnet20", "vgg"):
        for seed in (0, 1, 2):
            for op in MAIN:
                yield {"network": network, "op": op, "images": 2048, "seed": seed}
    for op in MAIN:
        yield {"network": "resnet20", "op": op, "images": 512, "seed": 0}
    for op in cs.ops.names():
        if op not in MAIN:
            yield {"network": "resnet20", "op": op, "images": 2048, "seed": 0}
    for network, seeds in (("resnet20", (0, 1, 2)), ("vgg", (0,))):
        for seed in seeds:
            for op in ("cp rank=0.055", "cp"):
                yield {"network": network, "op": op, "images": 2048, "seed": seed}


def convert(network: nn.Module, op: str) -> nn.Module:
    """Return the student of a row's op."""
    return cs.rewrite(network, op.split()[0], options=OPTIONS.get(op))


def teacher_of(name: str, data: DataSplits, folder: Path) -> nn.Module:
    """Return a dense network, trained from labels; from its file where there is one."""
    torch.manual_seed(0)
    net: nn.Module = resnet20(in_channels=1) if name == "resnet20" else Vgg()
    file = folder / ("teacher.pt" if name == "resnet20" else f"teacher.{name}.pt")
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / file.stem
    result = cs.distill(
        None,
        net,
        data.train,
        data.val,
        method="supervised",
        **TEACHERS[name],
        augmentation=Augmentation.usual((28, 28), flip=True),
        run_dir=run,
        resume=(run / "config.json").exists(),
    )
    torch.save(result.student.state_dict(), file)
    return result.student


def measure(row: dict[str, Any], teacher: nn.Module, data: DataSplits, seconds: float) -> dict[str, Any]:
    """Convert and calibrate once, and test after each stage."""
    student = convert(teacher, row["op"])
    result = calibrate_and_report(
        teacher,
        student,
        data.train,
        polish=Polish(seconds=seconds, flip=data.flip),
        limit=row["images"],
        seed=row["seed"],
        judge=lambda net: cs.evaluate(net, data.test).accuracy,
    )
    return {
        **row,
        "teacher": cs.evaluate(teacher, data.test).accuracy,
        "scores": {stage.name: stage.score for stage in result.stages},
        "agreement": {stage.name: stage.agreement for stage in result.stages},
        "stage_seconds": {stage.name: stage.seconds for stage in result.stages},
        "seconds": round(result.seconds, 1),
        "peak_gb": round(result.peak_memory / 1e9, 2),
        "polish": result.to_dict()["polish"],
        "params": count_params(student),
        "macs": count_macs(student, IMAGE).true,
        "teacher_macs": count_macs(teacher, IMAGE).true,
        "threads": torch.get_num_threads(),
    }


def latency_ratios(network: str, rounds: int) -> dict[str, float]:
    """Return how many times faster than the teacher each op's student is in onnxruntime, with one thread."""
    dense: nn.Module = resnet20(in_channels=1) if network == "resnet20" else Vgg()
    ops = dict.fromkeys(row["op"] for row in grid() if row["network"] == network)
    networks = {"dense": dense} | {op: convert(dense, op) for op in ops}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in networks}
        for name, net in networks.items():
            cs.export(net.eval(), files[name], example_inputs=IMAGE)
        timed = measure_latency(files, threads=[1], rounds=rounds)
    return {op: round(ratio(timed, "dense", op, threads=1), 2) for op in ops}


def print_table(rows: list[dict[str, Any]], latencies: dict[str, dict[str, float]]) -> None:
    """Print the means over seeds as Markdown; test accuracies in %, with lowest and highest."""
    heads = ("teacher", "params", "MACs", "speed in onnxruntime", "seconds")
    print("| network | op | images | seeds | " + " | ".join((*STAGES, *heads)) + " |")
    print("|---" * (len(STAGES) + len(heads) + 4) + "|")
    for key in dict.fromkeys((row["network"], row["op"], row["images"]) for row in grid()):
        some = [row for row in rows if (row["network"], row["op"], row["images"]) == key]
        if not some:
            continue
        scores = [spread([row["scores"][stage] for row in some]) for stage in STAGES]
        fewer = some[0]["teacher_macs"] / some[0]["macs"]
        faster = latencies.get(key[0], {}).get(key[1])
        print(
            f"| {key[0]} | {key[1]} | {key[2]:,} | {len(some)} | {' | '.join(scores)} | {100 * some[0]['teacher']:.2f} "
            f"| {some[0]['params']:,} | {some[0]['macs'] / 1e6:.2f} M ({fewer:.1f}x fewer) "
            f"| {'not timed' if faster is None else f'{faster:.2f}x'} "
            f"| {statistics.mean(row['seconds'] for row in some):.0f} |"
        )


def spread(values: list[float]) -> str:
    """Mean in %, and lowest to highest where there are several."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.2f}–{100 * max(values):.2f})"


def main() -> None:
    """Fill the results file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"), help="where the teachers are kept")
    parser.add_argument("--results", type=Path, default=HERE / "calibration.jsonl")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--polish-seconds", type=float, default=600, help="what the polish may take")
    for name, kind in (("networks", str), ("ops", str), ("images", int), ("seeds", int)):
        parser.add_argument(f"--{name}", type=kind, nargs="+", help="only rows with one of these")
    parser.add_argument("--latency", action="store_true", help="time the networks in onnxruntime; train nothing")
    parser.add_argument("--table", action="store_true", help="print the table of the results; train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if args.latency:
        LATENCIES.write_text(json.dumps({name: latency_ratios(name, 200) for name in TEACHERS}, indent=1) + "\n")
    elif not args.table:
        data = load_data("fashion-mnist", root=args.data_root)
        only = {name.rstrip("s"): getattr(args, name) for name in ("networks", "ops", "seeds") if getattr(args, name)}
        only |= {"images": args.images} if args.images else {}
        for row in grid():
            if any(row[key] not in wanted for key, wanted in only.items()):
                continue
            if any(all(there[key] == value for key, value in row.items()) for there in rows):
                continue
            rows.append(measure(row, teacher_of(row["network"], data, args.runs), data, args.polish_seconds))
            with args.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print_table(rows, json.loads(LATENCIES.read_text()) if LATENCIES.exists() else {})


if __name__ == "__main__":
    main()
