"""What a network computes from its weights alone, computed once: weight standardization, above all.

The exporter's optimizer folds constants, but leaves large ones. Many runtimes for phones take a convolution
only if its weight is a constant.
"""

from __future__ import annotations

from onnxscript import ir, optimizer


def fold_constants(model: ir.Model) -> bool:
    """Replace every node that reads constants only by its value; return whether there was one.

    No value becomes larger than the largest weight.
    """
    constants = model.graph.initializers.values()
    largest = max((value.const_value.size for value in constants if value.const_value is not None), default=0)
    if not any(node.inputs and all(map(_is_constant, node.inputs)) for node in model.graph):
        return False
    optimizer.optimize(model, input_size_limit=largest, output_size_limit=largest)
    return True


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.const_value is not None
