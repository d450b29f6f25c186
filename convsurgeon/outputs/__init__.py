"""What a network's outputs are (scores of classes, probabilities, values), and how far two networks' are apart."""

from convsurgeon.outputs._divergence import (
    binary_divergence,
    binary_divergence_of_logits,
    divergence_of,
    log_probabilities,
)
from convsurgeon.outputs._kinds import ANSWERS, Answers, Kind, Outputs, fits, has_classes, kind_of_outputs, why_not
from convsurgeon.outputs._last_operation import last_operation
from convsurgeon.outputs._look import look_at_outputs
from convsurgeon.outputs._precision import PreciseShares
from convsurgeon.outputs._sources import Source, source_of

__all__ = [
    "ANSWERS",
    "Answers",
    "Kind",
    "Outputs",
    "PreciseShares",
    "Source",
    "binary_divergence",
    "binary_divergence_of_logits",
    "divergence_of",
    "fits",
    "has_classes",
    "kind_of_outputs",
    "last_operation",
    "log_probabilities",
    "look_at_outputs",
    "source_of",
    "why_not",
]
