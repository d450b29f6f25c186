"""The whole pipeline on scikit-learn's digits: 1,797 real images of 8x8 pixels, inside a package, no download."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon import ops
from convsurgeon.data import ImageSet, load_data, make_loader
from convsurgeon.delivery import Comparison, compare
from convsurgeon.distillation import Augmentation, distill
from convsurgeon.errors import DataError
from convsurgeon.evaluation import evaluate
from convsurgeon.files import make_folder, write_text
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.record import update_record
from convsurgeon.storage import save
from convsurgeon.surgery import rewrite

_TEACHER_EPOCHS, _STUDENT_EPOCHS, _BATCH_SIZE = 30, 60, 64


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and wrote.

    Args:
        comparison: teacher and student, side by side.
        teacher_ended: test accuracy of the teacher after joint training.
        closed_form: test accuracy of the student before any training.
        paths: the files.
    """

    comparison: Comparison
    teacher_ended: float
    closed_form: float
    paths: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain JSON data."""
        return {
            "teacher_ended": self.teacher_ended,
            "closed_form": self.closed_form,
            "paths": [str(path) for path in self.paths],
            **self.comparison.to_dict(),
        }


def run_demo(folder: str | Path, *, to: str = "shift", seed: int = 0, report: Report = be_silent) -> DemoResult:
    """Train a teacher, convert it, distil jointly, export, and compare.

    Args:
        folder: where everything is written; what an earlier demo wrote there is replaced.
        to: the op that its convolutions become.
        seed: of the initial weights, the order of the data and the augmentation.
    """
    ops.get(to)  # a name that does not exist is told before the training
    folder = make_folder(folder)
    data = load_data("digits", seed=seed)
    if not isinstance(data.train, ImageSet) or not isinstance(data.test, ImageSet) or data.preprocessing is None:
        raise DataError("the digits should be pictures in memory with a test split")
    image = data.train[0][0][None]
    settings: dict[str, Any] = {
        "batch_size": _BATCH_SIZE,
        "seed": seed,
        "augmentation": Augmentation.usual(data.preprocessing.size, flip=data.flip),
        "report": report,
    }
    _say(report, f"1/5 train a teacher on {len(data.train)} images of handwritten digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallResNet()
    trained = distill(None, net, data.train, data.val, method="supervised", epochs=_TEACHER_EPOCHS, **settings)
    teacher = trained.student
    facts = {
        "preprocessing": data.preprocessing.to_dict(),
        "classes": list(data.classes),
        "input_shape": list(image.shape),
    }
    update_record(teacher, **facts)
    _say(report, f"2/5 convert it to {to}")
    student = rewrite(teacher, to, example_inputs=image)
    closed_form = evaluate(student, data.test).accuracy
    _say(report, "3/5 train student and teacher jointly")
    result = distill(teacher, student, data.train, data.val, method="joint", epochs=_STUDENT_EPOCHS, **settings)
    _say(report, "4/5 save, export to ONNX, compare with PyTorch on random and real images")
    files = [
        save(teacher, folder / "teacher.pt", force=True),
        save(result.student, folder / f"student.{to}.pt", force=True),
    ]
    _say(report, "5/5 time both in onnxruntime, and test")
    comparison = compare(
        teacher,
        result.student,
        folder,
        example=image,
        test=data.test,
        images=make_loader(data.test, batch_size=16, shuffle=False),
        force=True,
        report=report,
    )
    assert result.teacher is not None
    files += [comparison.before.delivery.path, comparison.after.delivery.path]
    done = DemoResult(
        comparison,
        evaluate(result.teacher, data.test).accuracy,
        closed_form,
        (*files, folder / "report.json"),
    )
    write_text(folder / "report.json", json.dumps(done.to_dict(), indent=2) + "\n")
    return done


class SmallResNet(nn.Module):
    """A residual network of nine layers for small gray images, as one might bring it along."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.layer1 = _Block(32, 32, stride=1)
        self.layer2 = _Block(32, 64, stride=2)
        self.layer3 = _Block(64, 64, stride=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, 1, H, W)` to logits `(B, num_classes)`."""
        logits: Tensor = self.head(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _say(report: Report, message: str) -> None:
    report(Progress("demo", message=message))
