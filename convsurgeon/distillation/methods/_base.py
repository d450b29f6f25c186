"""What every method is: one module that holds teacher and students, so that there is one backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, final

from torch import Tensor, nn

from convsurgeon.distillation._output_form import choose_form
from convsurgeon.distillation.objectives import AbstractObjective
from convsurgeon.options import parse_options
from convsurgeon.outputs import Kind
from convsurgeon.registry import Registry

_NO_DECAY = ("no_decay", "no_weight_decay", "_no_weight_decay")


class Lesson(NamedTuple):
    """What one step yields: the loss to minimise, and the logits to keep score with, where there are any."""

    loss: Tensor
    student_BK: Tensor | None  # noqa: N815
    teacher_BK: Tensor | None  # noqa: N815


@dataclass(frozen=True)
class Setting:
    """What a method may want to know before it starts.

    Args:
        objective: the loss between student and teacher.
        sample: one training batch `(B, C, H, W)`, on the CPU.
        classes: how many scores the student gives; 0 where its answers are no class scores.
        teacher_is_trained: whether the teacher does better than chance, or None if nobody could tell.
        seed: for the method's own random numbers.
        outputs: what the student's first output is.
    """

    objective: AbstractObjective
    sample: Tensor
    classes: int
    teacher_is_trained: bool | None
    seed: int
    outputs: Kind = "scores"


class AbstractMethod(nn.Module, ABC):
    """Teacher and students in one module, and the loss that ties them.

    Teacher and student are owned by the method: it may train, freeze and change them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    """Whether it learns from labels; without, batches may be images alone."""
    teacher_learns: ClassVar[bool] = False
    """Whether the caller's teacher is trained too, so that it is worth evaluating again."""
    progress: float = 0.0
    """The share of the run that is done, 0..1; the loop says it before each step."""

    @dataclass(frozen=True)
    class Options:
        """No options. A subclass may put a frozen dataclass with defaults in this place."""

    def __init__(self, teacher: nn.Module | None, student: nn.Module, *, setting: Setting, options: Any) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = student
        self.options = parse_options(self.Options, options, owner=self.name)
        self.objective = setting.objective
        networks = [network for network in (teacher if self.needs_teacher else None, student) if network is not None]
        self.form = choose_form(networks, setting.sample, for_labels=self.needs_labels)
        self.set_up(setting)

    def set_up(self, setting: Setting) -> None:
        """Make what the method needs besides teacher and student. A hook; nothing by default."""

    @final
    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts; teacher and students are in the same form, whatever each one's layers do."""
        super().train(mode)
        if mode:
            for student in self.students().values():
                self.form.apply(student, learns=True)
            if self.teacher is not None:
                self.form.apply(self.teacher, learns=self.teacher_learns)
        return self

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor) -> Lesson:
        """Return the loss of one batch: images `(B, C, H, W)`, labels `(B,)`, -1 where there are none."""

    def students(self) -> dict[str, nn.Module]:
        """Return the networks among which validation chooses, by name. A hook; the one student by default."""
        return {"student": self.student}

    def learning_rates(self) -> list[tuple[nn.Module, float]]:
        """Return what is trained, each with its share of the rate. A hook; the student by default."""
        return [(self.student, 1.0)]

    def parameter_groups(self, *, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's groups: weights decay, norms and biases do not, frozen ones are left out.

        Attributes of a parameter are heeded: it does not decay where one of `no_decay`, `no_weight_decay`,
        `_no_weight_decay` is true, and `lr_scale` is its share of the rate.
        """
        groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
        for module, share in self.learning_rates():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    rate = learning_rate * share * float(getattr(parameter, "lr_scale", 1.0))
                    decay = weight_decay if _decays(parameter) else 0.0
                    groups.setdefault((parameter.dim() > 1, rate, decay), []).append(parameter)
        return [{"params": params, "lr": rate, "weight_decay": decay} for (_, rate, decay), params in groups.items()]


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and not any(getattr(parameter, name, False) for name in _NO_DECAY)


_registry: Registry[type[AbstractMethod]] = Registry("method", "convsurgeon.distillation.methods")
register, names, get = _registry.register, _registry.names, _registry.get
