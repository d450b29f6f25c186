"""How close a student's answers are to its teacher's, whatever they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convsurgeon.errors import CalibrationError
from convsurgeon.evaluation import float_leaves, is_class_scores


@dataclass(frozen=True)
class Closeness:
    """How close two networks' answers are on the same images.

    Args:
        agreement: the share (0..1) of images with the same highest score, or None where answers are no class scores.
        error: squared difference over the teacher's squared answers, over all numbers.
        divergence: that of the teacher's class distribution from the student's, in nats, a mean over images; None
            where answers are no class scores.
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


def look_like_scores(answers: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the first of a network's answers look like class scores, over all batches."""
    firsts = [leaves[0] for leaves in answers if leaves]
    return len({first.shape[1:] for first in firsts}) == 1 and is_class_scores(torch.cat(firsts))


def refuse_answers(answers: Sequence[Sequence[Tensor]], *, as_scores: bool) -> None:
    """Raise a `CalibrationError` for answers of a teacher that nothing can be compared with.

    Args:
        answers: for each batch, the float tensors.
        as_scores: whether the caller said that the first of them are class scores.
    """
    if not all(bool(leaf.isfinite().all()) for leaves in answers for leaf in leaves):
        raise CalibrationError("the teacher answers with NaN or infinite numbers on these images; mend it first")
    for leaves in answers:
        if as_scores and leaves and (leaves[0].dim() != 2 or leaves[0].shape[1] < 2):
            raise CalibrationError(
                f"answers='scores' needs a row of two class scores or more an image, and the teacher's first answer is "
                f"{tuple(leaves[0].shape)} for a batch; say answers='values'"
            )


def closeness(student: Sequence[Sequence[Tensor]], teacher: Sequence[Sequence[Tensor]], *, scores: bool) -> Closeness:
    """Compare two networks' answers to the same batches.

    Args:
        student: for each batch, the float tensors of the answer.
        teacher: the same of the teacher.
        scores: whether the first tensor of each is a row of class scores an image.

    Raises:
        CalibrationError: if their shapes differ.
    """
    same = images = 0
    missed = energy = divergence = 0.0
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
        if scores:
            same += int((mine[0].argmax(1) == theirs[0].argmax(1)).sum())
            images += len(mine[0])
            given, target = (functional.log_softmax(leaves[0].double(), dim=1) for leaves in (mine, theirs))
            divergence += float(functional.kl_div(given, target, reduction="sum", log_target=True))
    error = missed / energy if energy else missed
    if not (scores and images):
        return Closeness(None, error)
    return Closeness(same / images, error, divergence / images)


def _listed(shapes: Sequence[Any]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes) or "no float tensor"
