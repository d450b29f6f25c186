"""The student imitates the dense network on images without labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsurgeon.distillation._blocks import block_names
from convsurgeon.distillation.methods._base import AbstractMethod, Lesson, Setting, register
from convsurgeon.errors import DistillationError, OptionError
from convsurgeon.evaluation import float_leaves
from convsurgeon.outputs import (
    ANSWERS,
    Kind,
    PreciseShares,
    binary_divergence,
    binary_divergence_of_logits,
    fits,
    has_classes,
    log_probabilities,
)


@final
@register
class Imitate(AbstractMethod):
    """``objective(s, t) + blocks · (1 - progress) · mean_b |s_b - t_b|² / |t_b|²``, a fixed teacher in eval mode.

    `progress` runs from 0 to 1: the blocks lead at first, the answers decide in the end. Class scores and class
    distributions are matched by the objective; probabilities that are each of its own event, and multi-label logits,
    by their binary divergence; other outputs by their squared error over the teacher's mean square, as the outputs of
    the blocks are that hold converted convolutions. Half of the batches are mixed by CutMix, which needs no labels
    here: the teacher answers for what it sees.

    Reference:
        Soft targets: Hinton, Vinyals, Dean, 2015, arXiv:1503.02531. Hints: Romero et al., 2014, arXiv:1412.6550.
        CutMix: Yun et al., 2019, arXiv:1905.04899; with a teacher that answers for the mix: Beyer et al., 2021,
        arXiv:2106.05237.
    """

    name: ClassVar[str] = "imitate"
    summary: ClassVar[str] = "the dense network only teaches, without labels"
    reference: ClassVar[str] = "Beyer et al., 2021, arXiv:2106.05237"
    needs_labels: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options:
        """How much the blocks count at first, on what share of the batches pictures are mixed, norms, and precision.

        In the last steps, a share `frozen_norms` of all, batch norm normalises by its running statistics, as it will
        in use: no batch then blurs what the answers are made of. Nothing then holds activations in bounds, so that
        the learning rate has to be small by then, or the gradients clipped, as Muon clips them.

        With `full_precision` the student runs in its own float type, whatever the run's precision is, and only the
        teacher below it: on processors the gradients of depthwise convolutions are slower in bf16.

        As `answers`, `scores` are logits of classes, `probabilities` are numbers from 0 to 1 that are matched as such
        (as distributions where the rows sum to 1), `multilabel` are logits with a sigmoid each, and `values` are
        matched by their squared error; `auto` finds it out.
        """

        blocks: float = 1.0
        cutmix: float = 0.5
        frozen_norms: float = 0.0
        full_precision: bool = False
        answers: str = "auto"

        def __post_init__(self) -> None:
            if self.blocks < 0:
                raise OptionError(f"imitate: option blocks must be 0 or more, got {self.blocks}")
            if self.answers not in ANSWERS:
                raise OptionError(f"imitate: option answers must be one of {', '.join(ANSWERS)}, got {self.answers}")
            for name in ("cutmix", "frozen_norms"):
                if not 0 <= getattr(self, name) <= 1:
                    raise OptionError(f"imitate: option {name} must be a share from 0 to 1, got {getattr(self, name)}")

    def set_up(self, setting: Setting) -> None:
        """Freeze the teacher, and find the blocks."""
        assert self.teacher is not None
        self.teacher.requires_grad_(False)
        # what was said to be probabilities may have been found to be a distribution
        found = self.options.answers in ("auto", "probabilities" if setting.outputs == "distribution" else "auto")
        self.kind: Kind = setting.outputs if found else self.options.answers
        if self.form.training and not self.form.modes_agree:
            self.kind = "values"  # what is known of the outputs of eval mode says nothing of these
        self.form.apply(self.student, learns=True)
        # but for those that the network's own train() keeps in eval mode
        self.norms = [part for part in self.student.modules() if isinstance(part, _BatchNorm) and part.training]
        self.blocks = block_names(self.student, self.teacher, setting.sample[:2]) if self.options.blocks else []

    def forward(self, images: Tensor, labels: Tensor) -> Lesson:
        """Return the student's loss."""
        assert self.teacher is not None
        for norm in self.norms:
            norm.train(self.training and self.progress < 1 - self.options.frozen_norms)
        if images.dim() in (3, 4) and float(torch.rand(())) < self.options.cutmix:
            images = cut_mix(images)
        with torch.no_grad(), self._precise(), _outputs(self.teacher, self.blocks) as wanted:
            # a copy: some networks prepare their input in place
            teacher = float_leaves(self.teacher(images.clone()))
        autocast = torch.autocast(images.device.type, enabled=False) if self.options.full_precision else None
        with self._precise(), _outputs(self.student, self.blocks) as had, autocast or contextlib.nullcontext():
            student = float_leaves(self.student(images))
        if [each.shape for each in student] != [each.shape for each in teacher]:
            raise DistillationError(
                f"the student gives tensors of shapes {[tuple(each.shape) for each in student]}, the teacher "
                f"{[tuple(each.shape) for each in teacher]}; expected the same"
            )
        loss = sum((self._answer_loss(s, t) for s, t in zip(student, teacher, strict=True)), torch.zeros(()))
        if self.blocks:
            # a block that training leaves out now and then has nothing to match, nor one that takes other rows
            ran = [name for name in self.blocks if len(had[name]) == len(wanted[name])]
            pairs = [pair for name in ran for pair in zip(had[name], wanted[name], strict=True)]
            pairs = [(s, t) for s, t in pairs if s.shape == t.shape]
            weight = self.options.blocks * (1 - self.progress) / max(1, len(pairs))
            loss = loss + weight * sum(relative_error(s, t) for s, t in pairs)
        scores = (student[0], teacher[0]) if has_classes(self.kind) else (None, None)
        return Lesson(loss, *scores)

    def _precise(self) -> contextlib.AbstractContextManager[Any]:
        """Keep probabilities from being rounded to 1, which they are from 0.998 in bf16."""
        shares = self.kind in ("probabilities", "distribution")
        return PreciseShares() if shares else contextlib.nullcontext()

    def _answer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        kind = self.kind if fits(self.kind, teacher) else "values"
        loss: Tensor
        if kind == "values":
            return relative_error(student, teacher)
        student, teacher = student.float(), teacher.float()
        if kind == "scores":
            loss = self.objective(student, teacher)
        elif kind == "distribution":
            rows = (log_probabilities(each).movedim(1, -1).flatten(0, -2) for each in (student, teacher))
            loss = self.objective(*rows)
        else:
            apart = binary_divergence if kind == "probabilities" else binary_divergence_of_logits
            loss = apart(student, teacher) / len(student)
        return loss


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference over the teacher's mean square.

    From norms, whose gradients keep the layout of the student's output: those of a mean have the channels first,
    and come along shortcuts to all layers before.
    """
    teacher = teacher.float()
    least = (1e-12 * teacher.numel()) ** 0.5
    error: Tensor = torch.linalg.vector_norm(student.float() - teacher)
    error = error / torch.linalg.vector_norm(teacher).clamp_min(least)
    return error.square()


def cut_mix(images: Tensor) -> Tensor:
    """Put a part of each next image into each image of a batch; the part is the same for all.

    It is a box of pictures `(B, C, H, W)`, and a stretch of signals, which are `(B, C, L)`, or have a side of 1.
    """
    axis = signal_axis(images.shape)
    if axis is None:
        from torchvision.transforms.v2 import CutMix

        mixed: Tensor = CutMix(num_classes=1)(images, torch.zeros(len(images), dtype=torch.int64))[0]
        return mixed
    length = images.shape[axis]
    stretch = int(torch.randint(length + 1, ()))
    start = int(torch.randint(length - stretch + 1, ()))
    mixed = images.clone()
    mixed.narrow(axis, start, stretch).copy_(images.roll(1, 0).narrow(axis, start, stretch))
    return mixed


def signal_axis(shape: Sequence[int]) -> int | None:
    """Return the axis along which a batch of signals runs, or None if it is one of pictures or of something else."""
    if len(shape) == 3:
        return 2
    if len(shape) == 4 and 1 in shape[2:] and max(shape[2:]) > 1:
        return 2 if shape[3] == 1 else 3
    return None


@contextlib.contextmanager
def _outputs(network: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what submodules give, in order of their calls."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, out: found[name].append(out)

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
