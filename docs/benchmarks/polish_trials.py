"""Trials of the polish: what brings a fitted student furthest in the same number of images.

    python docs/benchmarks/polish_trials.py '{}' '{"optimizer": "muon", "rate": 0.02}'

runs one trial for each set of settings, beginning from the same fitted students (fitted once, and kept), and
appends one JSON line a trial: accuracy on labelled validation images, which choose among trials, agreement and
divergence from the teacher there, and accuracy on the test images, which choose nothing. The loop is its own,
so that it can do what the product's does not.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from calibration import HERE, OPTIONS, teacher_of
from torch import Tensor, nn
from torch.nn import functional

import convsurgeon as cs
from convsurgeon.calibration._images import gather
from convsurgeon.calibration._norms import estimate_statistics
from convsurgeon.calibration._polish import _in_full_precision
from convsurgeon.data import DataSplits, load_data, make_loader
from convsurgeon.distillation import Augmentation, Training
from convsurgeon.distillation._blocks import block_names
from convsurgeon.distillation._muon import Muon
from convsurgeon.distillation.methods.imitate import cut_mix, relative_error
from convsurgeon.ops import AbstractCheapConv

FITTED_ON = 2048


@dataclass(frozen=True)
class Trial:
    """One way to polish.

    Args:
        images: how many to learn from, without labels; a fifth of them is held out.
        optimizer: `sgd`, `adamw` or `muon`.
        rate: the peak; `vector_rate` that of norms and biases with Muon.
        shift: by how many pixels images are moved at most.
        blocks: weight of the blocks' outputs, and `blocks_end` what it has come to at the end.
        at: whose outputs are matched beside the answers: those of `blocks`, or of every `op`.
        local: the share of the steps, at the beginning, in which each block learns for itself from the
            teacher's inputs.
        temperature: of the answers.
        mirrored: whether the teacher's answer is the mean of those for the image and for its mirror image.
        average: decay of an average of weights that is tested instead of the last weights; 0 for none.
        frozen: the share of the steps, at the end, in which batch norm normalises by its running statistics.
        refit: the share of the steps after which the ops are fitted once more, `shift` with taps chosen anew; 0 for
            never.
        statistics: whether batch-norm statistics are estimated anew on the images at the end.
    """

    op: str = "depthwise"
    network: str = "resnet20"
    seed: int = 0
    images: int = FITTED_ON
    optimizer: str = "sgd"
    rate: float = 0.1
    vector_rate: float | None = None
    weight_decay: float = 5e-4
    batch_size: int = 128
    steps: int = 1000
    cutmix: float = 0.5
    shift: int = 3
    blocks: float = 1.0
    blocks_end: float | None = None
    at: str = "blocks"
    local: float = 0.0
    temperature: float = 4.0
    mirrored: bool = False
    average: float = 0.0
    frozen: float = 0.0
    refit: float = 0.0
    statistics: bool = False

    def make_optimizer(self, student: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of a student's parameters."""
        matrices = [p for p in student.parameters() if p.dim() > 1]
        vectors = [p for p in student.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": self.rate, "weight_decay": self.weight_decay},
            {"params": vectors, "lr": self.vector_rate or self.rate, "weight_decay": 0.0},
        ]
        if self.optimizer == "muon":
            return Muon(groups)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, betas=(0.9, 0.99))
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def fitted(trial: Trial, teacher: nn.Module, data: DataSplits, folder: Path) -> nn.Module:
    """Return the student as the fit left it, from its file where there is one."""
    student = cs.rewrite(teacher, trial.op, options=OPTIONS.get(trial.op))
    file = folder / f"fitted.{trial.network}.{trial.op}.{trial.seed}.pt"
    if not file.exists():
        found = cs.calibrate(teacher, student, data.train, polish=False, limit=FITTED_ON, seed=trial.seed)
        torch.save(found.state_dict(), file)
    student.load_state_dict(torch.load(file, weights_only=True))
    return student


class Outputs:
    """What submodules take and give in the last run."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        for name in names:
            network.get_submodule(name).register_forward_hook(
                lambda _module, args, out, name=name: self.found.update({name: (args[0], out)})
            )


def polish(trial: Trial, teacher: nn.Module, student: nn.Module, images: Tensor, *, flip: bool) -> None:
    """Train the student, in place."""
    names = block_names(student, teacher, images[:2])
    if trial.at == "op":
        names = [name for name, _ in ops_of(student)]
    wanted, had = Outputs(teacher, names), Outputs(student, names)
    student.requires_grad_(True)
    optimizer = trial.make_optimizer(student)
    training = Training(warmup=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: training.rate_at(step, trial.steps))
    augment = Augmentation(shift=trial.shift, flip=flip)
    mixed_precision = not _in_full_precision(student)
    average = {key: value.clone() for key, value in student.state_dict().items()}
    order = torch.zeros(0, dtype=torch.int64)
    student.train()
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    for step in range(trial.steps):
        if trial.refit and step == round(trial.refit * trial.steps):
            refit(teacher, student, images, trial.seed)
            optimizer = trial.make_optimizer(student)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda later, start=step: training.rate_at(start + later, trial.steps)
            )
            student.train()
        if step >= (1 - trial.frozen) * trial.steps:
            for norm in norms:
                norm.eval()
        if len(order) < trial.batch_size:
            order = torch.randperm(len(images))
        chosen, order = order[: trial.batch_size], order[trial.batch_size :]
        batch = augment(images[chosen])
        if float(torch.rand(())) < trial.cutmix:
            batch = cut_mix(batch)
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mirror_s = teacher(batch.flip(-1)).float() if trial.mirrored else None
            theirs = teacher(batch).float()  # the last one, so that its blocks' outputs are those that stay
            theirs = theirs if mirror_s is None else (theirs + mirror_s) / 2
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
            if step < trial.local * trial.steps:
                pairs = [(student.get_submodule(name)(x.float()), y) for name, (x, y) in wanted.found.items()]
                loss = torch.zeros(())
            else:
                loss = _divergence(student(batch), theirs, trial.temperature)
                pairs = [(had.found[name][1], y) for name, (_, y) in wanted.found.items()]
        end = trial.blocks if trial.blocks_end is None else trial.blocks_end
        weight = trial.blocks + (end - trial.blocks) * step / trial.steps
        loss = loss + weight / len(pairs) * sum(relative_error(s, t) for s, t in pairs)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if trial.average:
            _move(average, student.state_dict(), min(trial.average, (step + 1) / (step + 10)))
    student.eval()
    if trial.average:
        student.load_state_dict(average)
    if trial.statistics:
        estimate_statistics(student, images.split(128))


def refit(teacher: nn.Module, student: nn.Module, images: Tensor, seed: int) -> None:
    """Fit the ops of a student again, in place, from where they stand; its batch norms stay as they are."""
    found = cs.calibrate(teacher, student, images, polish=False, limit=len(images), seed=seed)
    for (_, op), (_, better) in zip(ops_of(student), ops_of(found), strict=True):
        op.load_state_dict(better.state_dict())


def ops_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of a student's ops."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, AbstractCheapConv)]


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    mine, theirs = (functional.log_softmax(scores.float() / temperature, dim=1) for scores in (student, teacher))
    return temperature**2 * functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)


@torch.no_grad()
def _move(average: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    for key, value in state.items():
        average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)


@torch.no_grad()
def look(teacher: nn.Module, student: nn.Module, data: DataSplits) -> dict[str, float]:
    """Compare on validation images, and test."""
    batches = list(make_loader(data.val, batch_size=128, shuffle=False))
    labels = torch.cat([labels for _, labels in batches])
    mine, theirs = (torch.cat([network(images) for images, _ in batches]) for network in (student, teacher))
    test = cs.evaluate(student, data.test).accuracy
    assert test is not None
    return {
        "validation": round(float((mine.argmax(1) == labels).float().mean()), 4),
        "agreement": round(float((mine.argmax(1) == theirs.argmax(1)).float().mean()), 4),
        "divergence": round(float(_divergence(mine, theirs, 1.0)), 5),
        "test": round(test, 4),
    }


def main() -> None:
    """Run the trials that are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="+", type=json.loads, help="settings as JSON, those of Trial")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/fashion-mnist"), help="where teachers and fits are kept"
    )
    parser.add_argument("--results", type=Path, default=HERE / "polish_trials.jsonl")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_data("fashion-mnist", root=args.data_root)
    for settings in args.trials:
        trial = Trial(**settings)
        teacher = teacher_of(trial.network, data, args.runs).to(memory_format=torch.channels_last)
        student = fitted(trial, teacher, data, args.runs).to(memory_format=torch.channels_last)
        images = gather(data.train, limit=trial.images, seed=trial.seed).fitted
        torch.manual_seed(trial.seed)
        started = time.monotonic()
        polish(trial, teacher, student, images, flip=data.flip)
        seconds = round(time.monotonic() - started)
        row = {**asdict(trial), **look(teacher, student, data), "seconds": seconds}
        print(json.dumps(row), flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
