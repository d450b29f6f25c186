"""Soft targets: the Kullback-Leibler divergence between softened class distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor
from torch.nn import functional

from convsurgeon.distillation.objectives._base import AbstractObjective, register
from convsurgeon.errors import OptionError


@final
@register
class SoftTargets(AbstractObjective):
    """``T² · KL(softmax(t / T) ‖ softmax(s / T))``, averaged over the batch.

    `reduction=mean` averages over the classes too, as the reference code of arXiv:1909.13063 does, so
    that its weight is `T² / K`.

    Reference:
        Hinton, Vinyals, Dean, 2015, arXiv:1503.02531.
    """

    name: ClassVar[str] = "kd"
    summary: ClassVar[str] = "soft targets at a temperature"
    reference: ClassVar[str] = "Hinton, Vinyals, Dean, 2015, arXiv:1503.02531"

    @dataclass(frozen=True)
    class Options:
        """The temperature, and over what the divergence is averaged."""

        temperature: float = 4.0
        reduction: Literal["batchmean", "mean"] = "batchmean"

        def __post_init__(self) -> None:
            if not self.temperature > 0:
                raise OptionError(f"kd: option temperature must be above 0, got {self.temperature}")

    def __call__(self, student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
        """Return the scalar loss."""
        temperature = self.options.temperature
        log_student = functional.log_softmax(student_BK.float() / temperature, dim=1)
        log_teacher = functional.log_softmax(teacher_BK.float() / temperature, dim=1)
        divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        if self.options.reduction == "mean":  # torch's own `mean` warns, and is going to mean `batchmean`
            divergence = divergence / student_BK.shape[1]
        loss: Tensor = divergence * temperature**2
        return loss
