"""The kind of a network's first output, from the network itself and what came with its images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from convsurgeon.outputs._kinds import Answers, Outputs, kind_of_outputs
from convsurgeon.outputs._last_operation import last_operation
from convsurgeon.outputs._sources import source_of

_TRACED = 2


def look_at_outputs(
    network: nn.Module,
    images: Tensor,
    output: Tensor,
    *,
    first: Callable[[Any], Tensor],
    said: Answers = "auto",
    labels: Tensor | None = None,
    class_names: int = 0,
) -> Outputs:
    """Return what kind a network's first output is; it runs once more, on two images.

    Args:
        network: in eval mode.
        images: a batch that it takes.
        output: its first output for these or more images, `(B, ...)`.
        first: takes the first output out of whatever it answers.
        said: what the user says.
        labels: of the images, as far as they are known.
        class_names: how many classes the images' data set has; 0 if unknown.
    """
    if said != "auto":
        return kind_of_outputs(output, said=said)
    # a copy: some networks prepare their input in place
    operation = last_operation(lambda: first(network(images[:_TRACED].clone())))
    return kind_of_outputs(
        output, last_operation=operation, labels=labels, class_names=class_names, source=source_of(network)
    )
