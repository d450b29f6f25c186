"""`distill`: one run of the loop, from settings to a result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convsurgeon.distillation._augmentation import Augmentation
from convsurgeon.distillation._batches import as_loader, untouched_generators
from convsurgeon.distillation._config import USUAL_RATES, Training
from convsurgeon.distillation._interrupt import catch_interrupt
from convsurgeon.distillation._loop import DistillResult, Run
from convsurgeon.distillation._run_folder import RunFolder
from convsurgeon.errors import DistillationError
from convsurgeon.progress import Report, be_silent
from convsurgeon.record import read_record, update_record
from convsurgeon.surgery import network_inside, refuse_without_layers


def distill(
    teacher: nn.Module | None,
    student: nn.Module,
    train: Any,
    val: Any = None,
    *,
    method: str = "joint",
    objective: str = "kd",
    method_options: Mapping[str, Any] | None = None,
    objective_options: Mapping[str, Any] | None = None,
    epochs: int = 5,
    batch_size: int = 128,
    optimizer: str = "sgd",
    learning_rate: float | None = None,
    momentum: float | None = None,
    weight_decay: float = 5e-4,
    warmup: float = 0.1,
    seed: int = 0,
    device: str | None = None,
    precision: str = "auto",
    limit_batches: int | None = None,
    augmentation: Augmentation | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    tensorboard: bool = False,
    report: Report = be_silent,
) -> DistillResult:
    """Train a student beside its teacher; neither argument is modified.

    SGD or Muon, with Nesterov momentum, a linear warm-up and a cosine to zero, on Hugging Face Accelerate.
    The student of the epoch with the best validation accuracy is returned. The remaining arguments are the
    fields of `Training`.

    Args:
        teacher: the dense network; None for a method that needs none.
        student: what `rewrite` made of it.
        train: a DataLoader, an `ImageSet`, or another dataset of `(image, label)`.
        val: the same, to choose the best student by; without it the last one is kept.
        method: who teaches whom: `joint`, `frozen`, `ensemble`, `imitate`, `supervised`.
        objective: in which loss.
        optimizer: `sgd`, or `muon`, which goes further in few steps.
        learning_rate: the peak; None for the optimiser's usual one, 0.1 and 0.02.
        momentum: None for the optimiser's usual one, 0.9 and 0.95.
        augmentation: what is done to each training batch; None leaves it as the loader gives it.
        run_dir: a folder for settings, metrics and checkpoints; without one nothing is written.
        resume: go on with the run in `run_dir`.
        checkpoint_seconds: how often to write a checkpoint, besides the end of every epoch.
        report: receives a `Progress` about four times a second.

    Raises:
        DistillationError: if the run cannot start, or diverges.
        DataError: if the data do not fit the networks.
        UnknownNameError: for a method or objective that does not exist.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written at the end of the step.
    """
    if teacher is not None:
        teacher = network_inside(teacher, role="the teacher", stage="distill", report=report)
        if isinstance(teacher, torch.jit.ScriptModule):
            refuse_without_layers(teacher, role="the teacher cannot be copied and trained", error=DistillationError)
    student = network_inside(student, role="the student", stage="distill", report=report)
    refuse_without_layers(student, role="the student cannot be trained", error=DistillationError)
    usual_rate, usual_momentum = USUAL_RATES.get(optimizer, (1.0, 0.0))  # an unknown one is refused below
    config = Training(
        method=method,
        objective=objective,
        method_options=method_options or {},
        objective_options=objective_options or {},
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=usual_rate if learning_rate is None else learning_rate,
        momentum=usual_momentum if momentum is None else momentum,
        weight_decay=weight_decay,
        warmup=warmup,
        seed=seed,
        device=device,
        precision=precision,
        limit_batches=limit_batches,
        augmentation=augmentation,
    )
    if resume and run_dir is None:
        raise DistillationError("resume=True needs the run_dir of the run to go on with")
    loader = as_loader(train, config)
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with (
        torch.random.fork_rng(devices=list(cuda)),
        untouched_generators(loader, val),
        catch_interrupt() as interrupted,
    ):
        folder = None
        run = Run(teacher, student, loader, val, config=config, interrupted=interrupted, report=report)
        if run_dir is not None:
            folder = RunFolder(run_dir, config.to_dict(), resume=resume, tensorboard=tensorboard)
        try:
            result = run.go(folder, resume=resume, checkpoint_seconds=checkpoint_seconds)
        finally:
            if folder is not None:
                folder.close()
    # a copy of a GraphModule leaves it behind
    update_record(result.student, **{**read_record(student), **read_record(result.student)})
    return result
