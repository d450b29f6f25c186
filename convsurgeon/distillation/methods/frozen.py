"""The dense network teaches and does not learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from convsurgeon.distillation.methods._base import AbstractMethod, Lesson, Setting, register


@final
@register
class Frozen(AbstractMethod):
    """``CE(s) + weight · objective(s, t)`` with a fixed teacher in eval mode.

    Reference:
        Hinton, Vinyals, Dean, 2015, arXiv:1503.02531.
    """

    name: ClassVar[str] = "frozen"
    summary: ClassVar[str] = "the dense network only teaches"
    reference: ClassVar[str] = "Hinton, Vinyals, Dean, 2015, arXiv:1503.02531"

    @dataclass(frozen=True)
    class Options:
        """How much the teacher counts beside the labels."""

        weight: float = 1.0

    def set_up(self, setting: Setting) -> None:
        """Freeze the teacher."""
        assert self.teacher is not None
        self.teacher.requires_grad_(False)

    def forward(self, images: Tensor, labels: Tensor) -> Lesson:
        """Return the student's loss."""
        assert self.teacher is not None
        with torch.no_grad():
            teacher = self.form.scores(self.teacher(images))
        student = self.form.scores(self.student(images))
        loss = functional.cross_entropy(student, labels)
        loss = loss + self.options.weight * self.objective(student, teacher)
        return Lesson(loss, student, teacher)
