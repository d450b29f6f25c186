"""Teacher and student learn together, each from the other: the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn
from torch.nn import functional

from convsurgeon.distillation.methods._base import AbstractMethod, Lesson, Setting, register
from convsurgeon.errors import OptionError

_GENTLE = (0.01, 0.05)
_EQUAL = (1.0, 1.0)


@final
@register
class Joint(AbstractMethod):
    """Student: ``CE(s) + weight · objective(s, t)``, teacher: ``CE(t) + mutual · objective(t, s)``.

    Each network takes the other's logits as given. An untrained teacher learns as an equal: at the same
    rate and with `mutual` 1. A trained one is led gently, since at a full rate it would first unlearn:
    at a hundredth of the rate and with `mutual` 0.05. Which of the two it is, is told by whether it beats
    chance before training; `teacher_rate` and `mutual` override both.

    Reference:
        Xie, Lin, Zhang, Luo, 2019, arXiv:1909.13063; mutual learning is that of Zhang et al., 2017,
        arXiv:1706.00384.
    """

    name: ClassVar[str] = "joint"
    summary: ClassVar[str] = "dense network and student learn from each other"
    reference: ClassVar[str] = "Xie, Lin, Zhang, Luo, 2019, arXiv:1909.13063"
    teacher_learns: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """Weights of the terms, and the teacher's share of the rate; None is decided by the teacher."""

        weight: float = 1.0
        mutual: float | None = None
        teacher_rate: float | None = None

        def __post_init__(self) -> None:
            if self.teacher_rate is not None and not self.teacher_rate > 0:
                raise OptionError(
                    f"joint: option teacher_rate must be above 0, got {self.teacher_rate}; "
                    "for a teacher that does not learn use --method frozen"
                )

    def set_up(self, setting: Setting) -> None:
        """Choose the gentle or the equal form."""
        rate, mutual = _GENTLE if setting.teacher_is_trained else _EQUAL
        self.teacher_rate = rate if self.options.teacher_rate is None else self.options.teacher_rate
        self.mutual = mutual if self.options.mutual is None else self.options.mutual

    def learning_rates(self) -> list[tuple[nn.Module, float]]:
        """Return both networks, the teacher with its share."""
        assert self.teacher is not None
        return [(self.student, 1.0), (self.teacher, self.teacher_rate)]

    def forward(self, images: Tensor, labels: Tensor) -> Lesson:
        """Return the sum of both losses."""
        assert self.teacher is not None
        teacher, student = (self.form.scores(network(images)) for network in (self.teacher, self.student))
        learn = functional.cross_entropy(student, labels)
        learn = learn + self.options.weight * self.objective(student, teacher.detach())
        teach = functional.cross_entropy(teacher, labels)
        teach = teach + self.mutual * self.objective(teacher, student.detach())
        return Lesson(learn + teach, student, teacher)
