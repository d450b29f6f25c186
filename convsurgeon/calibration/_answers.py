"""How close a student's answers are to its teacher's, whatever they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.calibration._images import CalibrationImages
from convsurgeon.errors import CalibrationError
from convsurgeon.evaluation import float_leaves
from convsurgeon.outputs import Answers, Kind, Outputs, divergence_of, has_classes, look_at_outputs, why_not


@dataclass(frozen=True)
class Closeness:
    """How close two networks' answers are on the same images.

    Args:
        agreement: the share (0..1) of images with the same highest score, or None where answers are no class scores.
        error: squared difference over the teacher's squared answers, over all numbers.
        divergence: that of the student's class distribution, or of its probabilities together, from the teacher's, in
            nats, a mean over images; None where answers are values.
    """

    agreement: float | None
    error: float
    divergence: float | None = None

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f"agrees on {100 * self.agreement:.1f} % of the images held out, "
        return f"{agreement}squared error {self.error:.3g}"

    @property
    def rank(self) -> float:
        """What is compared to tell which of two students is closer; more is closer.

        On a few hundred images the agreement moves by chance more than two students differ.
        """
        return -(self.error if self.divergence is None else self.divergence)


@torch.no_grad()
def answers_of(network: nn.Module, batches: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return, for each batch, the float tensors in what a network in eval mode answers."""
    return [[leaf.float().cpu() for leaf in float_leaves(network(images))] for images in batches]


def look_at_answers(
    teacher: nn.Module, answers: Sequence[Sequence[Tensor]], images: CalibrationImages, *, said: Answers
) -> Outputs:
    """Return what kind the first of a teacher's answers is.

    Args:
        teacher: in eval mode.
        answers: for each batch of the images held out, the float tensors.
        images: those of the calibration.
        said: what the caller said.
    """
    firsts = [leaves[0] for leaves in answers if leaves]
    if len({first.shape[1:] for first in firsts}) != 1:
        return Outputs("values", "they differ in shape from batch to batch, or there are none")
    return look_at_outputs(
        teacher,
        images.held,
        torch.cat(firsts),
        first=lambda answer: float_leaves(answer)[0],
        said=said,
        labels=images.labels,
        class_names=images.class_names,
    )


def refuse_answers(answers: Sequence[Sequence[Tensor]], *, said: str) -> None:
    """Raise a `CalibrationError` for answers of a teacher that nothing can be compared with.

    Args:
        answers: for each batch, the float tensors.
        said: what the caller said that the first of them are.
    """
    if not all(bool(leaf.isfinite().all()) for leaves in answers for leaf in leaves):
        raise CalibrationError("the teacher answers with NaN or infinite numbers on these images; mend it first")
    for leaves in answers:
        if leaves and (reason := why_not(said, leaves[0])):
            raise CalibrationError(f"{reason}; say answers='values'")


def closeness(student: Sequence[Sequence[Tensor]], teacher: Sequence[Sequence[Tensor]], *, kind: Kind) -> Closeness:
    """Compare two networks' answers to the same batches.

    Args:
        student: for each batch, the float tensors of the answer.
        teacher: the same of the teacher.
        kind: of the first tensor of each.

    Raises:
        CalibrationError: if their shapes differ.
    """
    images = 0
    same = missed = energy = divergence = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (mine, theirs)]
        if shapes[0] != shapes[1] or not shapes[1]:
            raise CalibrationError(
                f"the student answers with {_listed(shapes[0])}, the teacher with {_listed(shapes[1])}; calibration "
                "needs float tensors of the same shapes"
            )
        for leaf, wanted in zip(mine, theirs, strict=True):
            missed += float((leaf - wanted).double().square().sum())
            energy += float(wanted.double().square().sum())
        images += len(mine[0])
        divergence += divergence_of(mine[0], theirs[0], kind)
        if has_classes(kind):
            same += float((mine[0].argmax(1) == theirs[0].argmax(1)).float().mean()) * len(mine[0])
    error = missed / energy if energy else missed
    if kind == "values" or not images:
        return Closeness(None, error)
    agreement = same / images if has_classes(kind) else None
    return Closeness(agreement, error, divergence / images)


def _listed(shapes: Sequence[Any]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes) or "no float tensor"
