"""How far apart the outputs of two networks are, by what they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from convsurgeon.outputs._kinds import Kind


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Return logarithms of probabilities, finite also of 0: logits whose softmax is the distribution."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``KL(Bernoulli(t) ‖ Bernoulli(s))`` summed over all numbers, in nats; finite at 0 and 1, as its gradient.

    Args:
        student: probabilities, `(B, ...)`, in float32 or wider; gradients flow into it.
        teacher: the same, a fixed target.
    """
    least = torch.finfo(student.dtype).tiny
    teacher = teacher.detach().to(student)
    divergence = torch.zeros_like(student)
    for s, t in ((student, teacher), (1 - student, 1 - teacher)):
        divergence = divergence + torch.xlogy(t, t) - torch.xlogy(t, s.clamp_min(least))
    return divergence.sum()


def binary_divergence_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the `binary_divergence` of the sigmoids of logits, `(B, ...)`, without their rounding."""
    targets = teacher.detach().sigmoid()
    apart, entropy = (
        functional.binary_cross_entropy_with_logits(each, targets, reduction="sum") for each in (student, teacher)
    )
    divergence: Tensor = apart - entropy
    return divergence


def divergence_of(student: Tensor, teacher: Tensor, kind: Kind) -> float:
    """Return the divergence of the student's distributions from the teacher's, summed over images, in nats.

    It is 0 for values, which are no distributions.
    """
    student, teacher = student.double(), teacher.double()
    if kind == "values":
        return 0.0
    if kind == "probabilities":
        return float(binary_divergence(student, teacher))
    if kind == "multilabel":
        return float(binary_divergence_of_logits(student, teacher))
    if kind == "distribution":
        student, teacher = log_probabilities(student), log_probabilities(teacher)
    given, target = (functional.log_softmax(scores, dim=1) for scores in (student, teacher))
    return float(functional.kl_div(given, target, reduction="sum", log_target=True))
