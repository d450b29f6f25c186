"""What every objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from convsurgeon.options import parse_options
from convsurgeon.registry import Registry


class AbstractObjective(ABC):
    """A loss between the logits of a student and of its teacher; smaller is closer."""

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]

    @dataclass(frozen=True)
    class Options:
        """No options. A subclass may put a frozen dataclass with defaults in this place."""

    def __init__(self, options: Any = None) -> None:
        self.options = parse_options(self.Options, options, owner=self.name)

    @abstractmethod
    def __call__(self, student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
        """Return the scalar loss; gradients flow into both arguments unless one is detached."""


_registry: Registry[type[AbstractObjective]] = Registry("objective", "convsurgeon.distillation.objectives")
register, names, get = _registry.register, _registry.names, _registry.get
