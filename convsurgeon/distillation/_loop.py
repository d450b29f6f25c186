"""The training loop: one for all methods, resumable at any step.

Nothing random is carried from step to step: the order of an epoch and the random numbers of a step are
functions of the seed, the epoch and the step. So a run that goes on from a checkpoint does what the
uninterrupted run would have done, on one process with the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from convsurgeon.distillation import methods, objectives
from convsurgeon.distillation._batches import (
    check_labels,
    first_batch,
    generators_of,
    images_of,
    mix,
    pair,
    seed_all,
)
from convsurgeon.distillation._config import Training
from convsurgeon.distillation._run_folder import RunFolder
from convsurgeon.distillation._setup import has_seen_batches, make_accelerator, make_optimizer
from convsurgeon.distillation._watch import Watch
from convsurgeon.errors import DataError, DistillationError, one_line
from convsurgeon.evaluation import evaluate
from convsurgeon.progress import Progress, Report
from convsurgeon.surgery import copy_module, in_mode


@dataclass(frozen=True)
class DistillResult:
    """What a run gives back.

    Args:
        student: the best student on validation data (the last one, where there were none), in eval mode.
        teacher: the caller's teacher as it ended, or None if the method needs none.
        metrics: what was measured: `teacher_before`, `teacher_after`, `student` (validation accuracies,
            0..1, None without validation data), `chosen` (which student, of which epoch), `history`
            (one dict an epoch), `seconds`, `precision`.
    """

    student: nn.Module
    teacher: nn.Module | None
    metrics: Mapping[str, Any]


@dataclass
class _State:
    """What a run has come to. `step` counts finished steps, from the start of the run."""

    step: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Run:
    """One run: networks, optimiser and data on their device, and the loop over them."""

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        loader: DataLoader[Any],
        val: Any,
        *,
        config: Training,
        interrupted: Any,
        report: Report,
    ) -> None:
        self.given_teacher, self.given_student = teacher, student
        self.val, self.config, self.interrupted, self.report = val, config, interrupted, report
        self.accelerator, self.precision = make_accelerator(config)
        self.device = self.accelerator.device
        self.best_state: dict[str, Tensor] | None = None
        method_class = methods.get(config.method)
        if teacher is None and method_class.needs_teacher:
            raise DistillationError(f"method {config.method!r} needs a teacher, got None")
        given = teacher if method_class.needs_teacher else None
        sample = first_batch(loader, student, given, config)
        self.classes = sample.classes
        if question := sample.outputs.question("answers=scores (--method-option answers=scores)"):
            report(Progress("distill", message=question))
        self.teacher_before = None if teacher is None else self._accuracy(teacher)
        setting = methods.Setting(
            objective=objectives.get(config.objective)(config.objective_options),
            sample=sample.images,
            classes=self.classes,
            outputs=sample.outputs.kind,
            teacher_is_trained=self._is_trained(),
            seed=config.seed,
        )
        method = method_class(
            None if given is None else copy_module(given).cpu(),
            _thawed(copy_module(student).cpu(), report),
            setting=setting,
            options=config.method_options,
        )
        method.to(memory_format=torch.channels_last)
        self.method = method
        groups = method.parameter_groups(learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        if not groups:
            raise DistillationError("there is nothing to train: every parameter has requires_grad=False")
        optimizer = make_optimizer(config, groups)
        # gives the method a forward under autocast, and every process its part of each batch
        self.module, self.optimizer, self.loader = self.accelerator.prepare(method, optimizer, loader)
        self.steps_per_epoch = min(len(self.loader), config.limit_batches or len(self.loader))
        self.steps = self.steps_per_epoch * config.epochs
        self.schedule = LambdaLR(optimizer, lambda step: config.rate_at(step, self.steps))
        self.state = _State()

    def go(self, folder: RunFolder | None, *, resume: bool, checkpoint_seconds: float) -> DistillResult:
        """Run all epochs, from the start or from where the folder's checkpoint stands."""
        if resume and folder is not None:
            self._restore(folder)
        state, started = self.state, time.monotonic() - self.state.seconds
        saved = time.monotonic()
        if state.step == 0:
            self._note(folder, {"event": "start", "teacher_accuracy": self.teacher_before})
        for epoch in range(state.step // self.steps_per_epoch, self.config.epochs):
            self.module.train()
            watch = Watch(self.report, self.steps, epoch=epoch + 1, epochs=self.config.epochs, done=state.step)
            for images, labels in self._batches(epoch, skip=state.step - epoch * self.steps_per_epoch):
                lesson = self._step(images, labels)
                state.step += 1
                watch.look(state.step, lesson, labels)
                state.seconds = time.monotonic() - started
                if state.step % self.steps_per_epoch == 0:
                    continue  # the epoch is closed first: a checkpoint here would lose its validation
                if self.interrupted():
                    self._stop(folder)
                if time.monotonic() - saved >= checkpoint_seconds:
                    self._save(folder)
                    saved = time.monotonic()
            watch.check_finite(state.step)
            self._close_epoch(epoch, folder, watch)
            if self.interrupted():
                self._stop(folder)
            self._save(folder)
            saved = time.monotonic()
        return self._result(folder)

    def _batches(self, epoch: int, *, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch in its own order, from the first one that is not behind us."""
        seed_all(self.config.seed, epoch, -1)
        for generator in generators_of(self.loader):
            generator.manual_seed(mix(self.config.seed, epoch, -1))
        for owner in (self.loader, getattr(self.loader, "sampler", None), self.loader.batch_sampler):
            if owner is not None and hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        batches = iter(self.loader)
        for index in range(self.steps_per_epoch):
            seed_all(self.config.seed, epoch, index)
            images, labels = self._unpacked(next(batches))
            if index >= skip:
                yield images.to(memory_format=torch.channels_last) if images.dim() == 4 else images, labels

    def _unpacked(self, batch: Any) -> tuple[Tensor, Tensor]:
        if self.method.needs_labels:
            return pair(batch)
        images = images_of(batch)
        return images, torch.full((len(images),), -1, device=images.device)

    def _step(self, images: Tensor, labels: Tensor) -> methods.Lesson:
        if self.config.augmentation is not None:
            images = self.config.augmentation(images)
        if labels.device.type == "cpu" and self.method.needs_labels:  # elsewhere it would wait for the device
            check_labels(labels, self.classes)
        self.method.progress = self.state.step / self.steps
        lesson: methods.Lesson = self.module(images, labels)
        self.accelerator.backward(lesson.loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return lesson

    def _close_epoch(self, epoch: int, folder: RunFolder | None, watch: Watch) -> None:
        scores = {name: self._accuracy(peer) for name, peer in self.method.students().items()}
        name, score = max(scores.items(), key=lambda item: -1.0 if item[1] is None else item[1])
        best = self.state.best
        # a tie goes to the later epoch, which has a smaller learning rate behind it
        if score is None or best is None or best["accuracy"] is None or score >= best["accuracy"]:
            self.state.best = {"name": name, "epoch": epoch + 1, "accuracy": score}
            state = self.method.students()[name].state_dict()
            self.best_state = {key: value.detach().cpu().clone() for key, value in state.items()}
            if folder is not None and self.accelerator.is_main_process:
                folder.save_best(self.best_state)
        learns = self.method.teacher_learns and self.method.teacher is not None
        teacher = self._accuracy(self.method.teacher) if learns else self.teacher_before
        event = {
            "event": "epoch",
            "epoch": epoch + 1,
            "loss": watch.mean_loss,
            "student_accuracy": score,
            "teacher_accuracy": teacher,
            "train_student_accuracy": watch.student_accuracy,
            "train_teacher_accuracy": watch.teacher_accuracy,
            "seconds": round(self.state.seconds, 1),
        }
        if len(scores) > 1:
            event["students"] = scores
        self.state.history.append(event)
        self._note(folder, event)
        self.report(Progress("epoch", epoch + 1, self.config.epochs, _numbers(event)))

    def _accuracy(self, model: nn.Module | None) -> float | None:
        if self.val is None or model is None:
            return None
        try:
            found = evaluate(
                model,
                self.val,
                device=self.device,
                batch_size=self.config.batch_size,
                limit_batches=self.config.limit_batches,
            )
        except DataError as error:
            raise DataError(f"validation: {error}") from error
        return found.accuracy

    def _is_trained(self) -> bool | None:
        if self.teacher_before is None or not self.classes:
            return None if self.given_teacher is None else has_seen_batches(self.given_teacher)
        chance = 1 / self.classes
        return self.teacher_before > chance + 0.1 * (1 - chance)

    def _save(self, folder: RunFolder | None) -> None:
        if folder is None or not self.accelerator.is_main_process:
            return
        folder.save_last(
            {
                "step": self.state.step,
                "steps": self.steps,
                "best": self.state.best,
                "history": self.state.history,
                "seconds": self.state.seconds,
                "teacher_before": self.teacher_before,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": {"last_epoch": self.schedule.last_epoch},
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            }
        )

    def _restore(self, folder: RunFolder) -> None:
        saved = folder.load_last()
        if saved is None:
            return
        if saved["steps"] != self.steps:
            raise DistillationError(
                f"the run in {folder.path} has {saved['steps']} steps, with these training data "
                f"it would have {self.steps}; resume with the same data"
            )
        try:
            self.method.load_state_dict(saved["method"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise DistillationError(
                f"the checkpoint in {folder.path} does not fit these networks: {one_line(error)}"
            ) from error
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.schedule.last_epoch = saved["schedule"]["last_epoch"]
        self.teacher_before = saved["teacher_before"]
        self.state = _State(saved["step"], saved["best"], saved["history"], saved["seconds"])
        if self.state.best is not None:
            self.best_state = folder.load_best()

    def _stop(self, folder: RunFolder | None) -> None:
        self._save(folder)
        kept = f"go on by --resume {folder.path}" if folder is not None else "nothing was kept: no run folder"
        raise KeyboardInterrupt(f"stopped after step {self.state.step} of {self.steps}; {kept}")

    def _note(self, folder: RunFolder | None, event: Mapping[str, Any]) -> None:
        if folder is not None and self.accelerator.is_main_process:
            folder.note({"step": self.state.step, **event})

    def _result(self, folder: RunFolder | None) -> DistillResult:
        state = self.state
        assert state.best is not None
        assert self.best_state is not None
        student = copy_module(self.given_student)
        student.load_state_dict(self.best_state)
        teacher = None
        if self.given_teacher is not None and self.method.needs_teacher:
            assert self.method.teacher is not None
            teacher = copy_module(self.given_teacher)
            teacher.load_state_dict(self.method.teacher.state_dict())
            teacher.eval()
        if self.val is None:
            self.report(Progress("epoch", message="no validation data: the last student is kept"))
        metrics = {
            "teacher_before": self.teacher_before,
            "teacher_after": state.history[-1]["teacher_accuracy"],
            "student": state.best["accuracy"],
            "chosen": f"{state.best['name']}, epoch {state.best['epoch']}",
            "history": state.history,
            "seconds": state.seconds,
            "precision": self.precision,
        }
        return DistillResult(in_mode(student, training=False), teacher, metrics)


def _thawed(student: nn.Module, report: Report) -> nn.Module:
    """Let all parameters of a student learn that is frozen as a whole, as averages of weights are; in place."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        message = "every parameter of the student has requires_grad=False, as in an average of weights: all are trained"
        report(Progress("distill", message=message))
    return student


def _numbers(event: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in event.items() if isinstance(value, (int, float))}
