"""Labels alone: how a teacher is trained in the first place, and the baseline of every distillation."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor
from torch.nn import functional

from convsurgeon.distillation.methods._base import AbstractMethod, Lesson, register


@final
@register
class Supervised(AbstractMethod):
    """``CE(s)``: nobody teaches."""

    name: ClassVar[str] = "supervised"
    summary: ClassVar[str] = "labels alone, no teacher"
    reference: ClassVar[str] = "the baseline"
    needs_teacher: ClassVar[bool] = False

    def forward(self, images: Tensor, labels: Tensor) -> Lesson:
        """Return the cross-entropy of the student."""
        student = self.form.scores(self.student(images))
        return Lesson(functional.cross_entropy(student, labels), student, None)
