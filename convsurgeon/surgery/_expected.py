"""What a model itself gives on an input: what its student's outputs are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from convsurgeon.errors import one_line
from convsurgeon.surgery._copies import ExampleInputs, call, in_mode
from convsurgeon.surgery._examples import at_least_two
from convsurgeon.surgery._outputs import Leaf, describe_output


@dataclass(frozen=True)
class Expected:
    """The outputs of a model, without their values.

    Args:
        output: in eval mode.
        in_training: in train mode, with a batch of at least two; None if it does not run that way.
        not_trained: why it does not, or None.
    """

    output: list[Leaf]
    in_training: list[Leaf] | None
    not_trained: str | None

    @classmethod
    def of(cls, copied: nn.Module, inputs: ExampleInputs, *, output: list[Leaf]) -> Expected:
        """Run a copy of a model in train mode; it has given `output` in eval mode."""
        try:
            return cls(output, describe_output(call(in_mode(copied, training=True), at_least_two(inputs))), None)
        except Exception as error:  # whatever a foreign forward raises
            return cls(output, None, not_trained(error))


def not_trained(error: BaseException) -> str:
    """Return why a model was not run in train mode, from what it raised."""
    return f"the model itself does not run that way: {one_line(error)}"
