"""The statistics by which `calibrate` tells class scores from other numbers, on networks trained for different tasks.

    python docs/benchmarks/output_kinds.py

trains small networks on scikit-learn's digits, on pairs and triples of them, and ResNet-20 on Fashion-MNIST, and
prints, for each task, the smallest and the largest of each statistic over seeds and optimisers, and how often the
outputs were taken for class scores. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from convsurgeon.data import load_data
from convsurgeon.outputs import kind_of_outputs
from convsurgeon.outputs._statistics import confidence, lead, shared_part

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "paper"))
from resnet import resnet20

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images / 16, dtype=torch.float32)[:, None]
LABELS = torch.tensor(DIGITS.target)
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4),
    "adam": lambda parameters: torch.optim.AdamW(parameters, 3e-3),
}
HELD = 400


@dataclass(frozen=True)
class Task:
    """What a network learns.

    Args:
        outputs: how many numbers it gives for an image.
        loss: of outputs and targets.
        images: `(N, 1, H, W)`; the last 400 are not learned from.
        targets: `(N, ...)`.
        epochs: how long.
    """

    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    images: Tensor
    targets: Tensor
    epochs: int = 4


def joined(count: int, total: int = 4000) -> tuple[Tensor, Tensor]:
    """Return digits side by side, and their numbers, `(N, count)`."""
    chosen = torch.randint(len(IMAGES), (total, count), generator=torch.Generator().manual_seed(count))
    return torch.cat([IMAGES[column] for column in chosen.T], dim=3), LABELS[chosen]


def triplets(rows: Tensor, labels: Tensor) -> Tensor:
    """Return the triplet loss of the hardest pairs in a batch."""
    apart, same = torch.cdist(rows, rows), labels[:, None] == labels
    return functional.relu((apart * same).max(1).values - (apart + 1e6 * same).min(1).values + 1).mean()


def contrasts(rows: Tensor, labels: Tensor) -> Tensor:
    """Return the supervised contrastive loss at a temperature of 0.1."""
    rows = functional.normalize(rows)
    alike = (rows @ rows.mT / 0.1).fill_diagonal_(-1e9).log_softmax(1)
    same = (labels[:, None] == labels).float().fill_diagonal_(0)
    return -((alike * same).sum(1) / same.sum(1).clamp_min(1)).mean()


def centers(images: Tensor) -> Tensor:
    """Return where the ink is, `(N, 4)`: two pairs of coordinates from -5 to 5."""
    places = torch.linspace(-5, 5, 8)
    inks = (images, images[..., :4, :].repeat(1, 1, 2, 1) + 0.1)
    found = [(ink.sum((1, axis)) * places).sum(1) / ink.sum((1, 2, 3)) for ink in inks for axis in (2, 3)]
    return torch.stack(found, 1)


def tasks() -> dict[str, Task]:
    """Return the tasks, by name."""
    pairs, numbers = joined(2)
    triples, present = joined(3)
    several, two = (functional.one_hot(each, 10).amax(1).float() for each in (present, numbers))
    there = torch.rand(present.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    blanked = triples * there.repeat_interleave(8, 1)[:, None, None].float()
    some = (functional.one_hot(present, 10) * there[..., None]).amax(1).float()
    exclusive = torch.stack([LABELS % 2 == 0, LABELS > 4, LABELS % 3 == 0, LABELS < 3], 1).float()
    entropy, each = functional.cross_entropy, functional.binary_cross_entropy_with_logits
    found = {
        "10 classes": Task(10, entropy, IMAGES, LABELS),
        "10 classes, one epoch": Task(10, entropy, IMAGES, LABELS, 1),
        "10 classes, smoothed labels": Task(10, lambda s, y: entropy(s, y, label_smoothing=0.1), IMAGES, LABELS),
        "10 classes, squared error": Task(10, functional.mse_loss, IMAGES, functional.one_hot(LABELS, 10).float()),
        "10 classes, a sigmoid each": Task(10, each, IMAGES, functional.one_hot(LABELS, 10).float()),
        "2 classes": Task(2, entropy, IMAGES, (LABELS > 4).long()),
        "100 classes (pairs of digits)": Task(100, entropy, pairs, numbers[:, 0] * 10 + numbers[:, 1], 10),
        "3 classes": Task(3, entropy, IMAGES, LABELS % 3),
        "4 classes": Task(4, entropy, IMAGES, LABELS % 4),
        "5 classes": Task(5, entropy, IMAGES, LABELS // 2),
        "10 labels, which of two digits": Task(10, each, pairs, two, 10),
        "10 labels, which of three digits": Task(10, each, triples, several, 10),
        "10 labels, which of up to three digits": Task(10, each, blanked, some, 10),
        "4 labels that exclude each other in part": Task(4, each, IMAGES, exclusive),
        "keypoints": Task(4, functional.mse_loss, IMAGES, centers(IMAGES), 10),
        "reconstruction": Task(64, functional.mse_loss, IMAGES, (IMAGES - IMAGES.mean(0)).flatten(1), 10),
        "nothing (not trained)": Task(10, entropy, IMAGES, LABELS, 0),
    }
    for width in (4, 8, 16, 64, 128):
        found[f"embedding of {width}, triplets"] = Task(width, triplets, IMAGES, LABELS)
        found[f"embedding of {width}, contrastive"] = Task(width, contrasts, IMAGES, LABELS)
    return found


def network(outputs: int) -> nn.Module:
    """Return a network of two convolutions."""
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten(), nn.Linear(96, outputs))


def train(net: nn.Module, task: Task, optimizer: torch.optim.Optimizer) -> Tensor:
    """Train a network, and return its outputs for the images that it has not learned from."""
    for _ in range(task.epochs):
        for chosen in torch.randperm(len(task.images) - HELD).split(64):
            loss = task.loss(net(task.images[chosen]), task.targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    net.eval()
    with torch.no_grad():
        return net(task.images[-HELD:])


def fashion(root: str) -> Iterator[tuple[Tensor, float]]:
    """Yield outputs and accuracy of ResNet-20 after 200, 400 and 600 batches of Fashion-MNIST."""
    data: Any = load_data("fashion-mnist", root=root)
    images, labels = data.train.__getitems__(torch.randperm(len(data.train))[: 3 * 12_800 + HELD].tolist())
    for optimizer in OPTIMIZERS.values():
        torch.manual_seed(0)
        net = resnet20(num_classes=10, in_channels=1)
        learner = optimizer(net.parameters())
        for part in range(3):
            here = [*range(part * 12_800, (part + 1) * 12_800), *range(len(images) - HELD, len(images))]
            task = Task(10, functional.cross_entropy, images[here], labels[here], 1)
            outputs = train(net.train(), task, learner)
            yield outputs, float((outputs.argmax(1) == labels[-HELD:]).float().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digits-only", action="store_true")
    parser.add_argument("--data-root", default="data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| trained for | R | lead | confidence | taken for class scores |\n|---|--:|--:|--:|--:|")
    for name, task in tasks().items():
        outputs = []
        for seed in range(args.seeds):
            for optimizer in OPTIMIZERS.values():
                torch.manual_seed(seed)
                net = network(task.outputs)
                outputs.append(train(net, task, optimizer(net.parameters())))
        print_row(name, outputs)
    if args.digits_only:
        return
    found = list(fashion(args.data_root))
    accuracies = ", ".join(f"{accuracy:.0%}" for _, accuracy in found)
    print_row(f"ResNet-20, 200 to 600 batches of Fashion-MNIST ({accuracies} right)", [outputs for outputs, _ in found])


def print_row(name: str, outputs: list[Tensor]) -> None:
    """Print what was found of several networks of one kind."""
    columns = [[measure(each) for each in outputs] for measure in (shared_part, lead, confidence)]
    figures = " | ".join(f"{min(column):.2f} to {max(column):.2f}" for column in columns)
    scores = sum(kind_of_outputs(each, last_operation="linear").kind == "scores" for each in outputs)
    print(f"| {name} | {figures} | {scores} of {len(outputs)} |", flush=True)


if __name__ == "__main__":
    main()
