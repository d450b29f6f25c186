"""The score of an epoch while it runs."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from convsurgeon.distillation.methods import Lesson
from convsurgeon.errors import DivergenceError
from convsurgeon.progress import Progress, Report

_REPORT_SECONDS = 0.25


class Watch:
    """Keeps the score of an epoch, and reports it a few times a second."""

    def __init__(self, report: Report, steps: int, *, epoch: int, epochs: int, done: int) -> None:
        self.report, self.steps, self.epoch, self.epochs = report, steps, epoch, epochs
        self.first, self.started, self.spoke = done, time.monotonic(), 0.0
        self.images = 0
        self.sums: dict[str, Tensor] = {}

    def look(self, step: int, lesson: Lesson, labels: Tensor) -> None:
        """Take one step into account."""
        self.images += len(labels)
        self._add("loss", lesson.loss.detach().float() * len(labels))
        for name, scores_BK in (("student", lesson.student_BK), ("teacher", lesson.teacher_BK)):
            if scores_BK is not None and bool(labels[0] >= 0):
                self._add(name, (scores_BK.detach().argmax(1) == labels).sum())
        now = time.monotonic()
        if now - self.spoke < _REPORT_SECONDS:
            return
        self.spoke = now
        self.check_finite(step)
        pace = (now - self.started) / max(1, step - self.first)
        figures = {
            "epoch": self.epoch,
            "epochs": self.epochs,
            "loss": self.mean_loss,
            "images_per_second": self.images / max(1e-9, now - self.started),
            "seconds_left": pace * (self.steps - step),
        }
        known = {"student_accuracy": self.student_accuracy, "teacher_accuracy": self.teacher_accuracy}
        figures |= {name: share for name, share in known.items() if share is not None}
        self.report(Progress("train", step, self.steps, figures))

    @property
    def mean_loss(self) -> float:
        """The loss of an image, averaged over the epoch so far."""
        return float(self.sums["loss"]) / self.images

    @property
    def student_accuracy(self) -> float | None:
        """The student's share of right answers on augmented training images, where there are labels."""
        return float(self.sums["student"]) / self.images if "student" in self.sums else None

    @property
    def teacher_accuracy(self) -> float | None:
        """The teacher's, where it answered."""
        return float(self.sums["teacher"]) / self.images if "teacher" in self.sums else None

    def check_finite(self, step: int) -> None:
        """Raise if the loss is no number any more."""
        if not torch.isfinite(self.sums["loss"]):
            raise DivergenceError(
                f"the loss is {float(self.sums['loss'])} at step {step}: training diverged; "
                "lower --learning-rate, or try --precision no"
            )

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value
