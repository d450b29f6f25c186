"""Batch norm folded into the convolution before it, on the ONNX graph.

The exporter's optimizer folds most of them; this folds what it leaves, above all where one
convolution's weights serve several batch norms. With ``s = scale / sqrt(var + epsilon)``:

    BatchNorm(Conv(x; W, b)) = Conv(x; s * W, s * (b - mean) + shift)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper


def fold_batch_norms(model: onnx.ModelProto) -> int:
    """Fold every batch norm that alone reads a convolution's output; return how many were folded.

    Weights that are used elsewhere too are left as they are, the convolution gets its own.
    """
    folded = 0
    while (pair := _next_foldable(model.graph)) is not None:
        _fold(model.graph, *pair)
        folded += 1
    if folded:
        _drop_unused(model.graph)
    return folded


def count_unfolded(model: onnx.ModelProto) -> int:
    """Return how many batch norms directly follow a convolution."""
    return sum(1 for _ in _pairs(model.graph))


def _next_foldable(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    constants = {tensor.name for tensor in graph.initializer}
    readers = _readers(graph)
    for conv, norm in _pairs(graph):
        parameters = [name for name in (*conv.input[1:], *norm.input[1:]) if name]
        if readers[conv.output[0]] == 1 and not _is_training(norm) and constants.issuperset(parameters):
            return conv, norm
    return None


def _pairs(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    convs = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    for node in graph.node:
        if node.op_type == "BatchNormalization" and node.input[0] in convs:
            yield convs[node.input[0]], node


def _readers(graph: onnx.GraphProto) -> Counter[str]:
    inside = Counter(name for node in graph.node for name in node.input)
    # a subgraph reads the names of its parent: count every mention as one reader
    nested = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return sum((_readers(subgraph) for subgraph in nested), inside + Counter(out.name for out in graph.output))


def _is_training(norm: onnx.NodeProto) -> bool:
    return len(norm.output) > 1 or any(a.name == "training_mode" and a.i for a in norm.attribute)


def _fold(graph: onnx.GraphProto, conv: onnx.NodeProto, norm: onnx.NodeProto) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def value(name: str) -> np.ndarray:
        return numpy_helper.to_array(constants[name]).astype(np.float64)

    epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
    scale, shift, mean, variance = map(value, norm.input[1:5])
    factor = scale / np.sqrt(variance + epsilon)
    weight = value(conv.input[1])
    bias = value(conv.input[2]) if len(conv.input) > 2 and conv.input[2] else np.zeros_like(mean)
    fused = {
        f"{norm.output[0]}.folded_weight": weight * factor.reshape(-1, *[1] * (weight.ndim - 1)),
        f"{norm.output[0]}.folded_bias": (bias - mean) * factor + shift,
    }
    dtype = numpy_helper.to_array(constants[conv.input[1]]).dtype
    for name, array in fused.items():
        graph.initializer.append(numpy_helper.from_array(array.astype(dtype), name))
    inside = conv.output[0]
    conv.input[:] = [conv.input[0], *fused]
    conv.output[0] = norm.output[0]
    graph.node.remove(norm)
    _remove_named(graph.value_info, {inside})


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = _readers(graph)
    _remove_named(graph.initializer, {tensor.name for tensor in graph.initializer if not used[tensor.name]})


def _remove_named(fields: object, names: set[str]) -> None:
    doomed = [index for index, field in enumerate(fields) if field.name in names]  # type: ignore[arg-type, var-annotated]
    for index in reversed(doomed):
        del fields[index]  # type: ignore[attr-defined]
