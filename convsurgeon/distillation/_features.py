"""Where a classifier's last feature map is, and how it becomes the input of the classifier."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from convsurgeon.errors import DistillationError, one_line
from convsurgeon.surgery import in_mode, trace_graph

_ADVICE = "use --method joint or --method frozen"


@dataclass(frozen=True)
class FeatureSplit:
    """A classifier that also gives its last feature map, and what it does to that map.

    Args:
        network: maps images to `(features (B, C, H, W), logits (B, K))`; shares the classifier's modules.
        pooling: maps such features, of any number of channels, to vectors; has no parameters.
        channels: `C`.
        size: `(H, W)` for the sample it was made with.
    """

    network: fx.GraphModule
    pooling: fx.GraphModule
    channels: int
    size: tuple[int, int]

    def pooled_width(self, copies: int) -> int:
        """Return the length of the vectors that pooling makes of `copies` maps, concatenated."""
        pooled = copy.deepcopy(self.pooling).eval()(torch.zeros(2, self.channels * copies, *self.size))
        if pooled.dim() != 2 or len(pooled) != 2:
            raise DistillationError(
                "ensemble: pooling of joined feature maps gives "
                f"{tuple(pooled.shape)} for 2 images, expected 2 vectors; {_ADVICE}"
            )
        return int(pooled.shape[1])


def split_at_features(model: nn.Module, sample: Tensor) -> FeatureSplit:
    """Find the last feature map of a classifier in its `torch.fx` graph.

    It is what the first linear layer after the last convolution (or the output, where there is none)
    reads through pooling, flattening and other operations without parameters.

    Args:
        model: a classifier; its graph is that of train mode, and shares its modules.
        sample: a batch that it takes.

    Raises:
        DistillationError: if the model cannot be traced or shows no such feature map.
    """
    name = type(model).__name__
    try:
        network = fx.GraphModule(in_mode(model, training=True), trace_graph(model))
        shapes = _shapes(network, sample)
    except Exception as error:
        reason = one_line(error)
        raise DistillationError(f"ensemble needs the graph of {name}: {reason}; {_ADVICE}") from error
    reader = _first_reader(network, shapes)
    if reader is None:
        raise DistillationError(f"ensemble: {name} does not end in one tensor of class scores; {_ADVICE}")
    node, chain = _tensor_inputs(reader, shapes)[0], []
    while not _has_parameters(network, node) and len(inputs := _tensor_inputs(node, shapes)) == 1:
        chain.append(node)
        node = inputs[0]
    while chain and shapes[chain[-1].name] == shapes[node.name]:
        node = chain.pop()
    shape = shapes[node.name]
    if node.op == "placeholder":
        raise DistillationError(f"ensemble: {name} has no feature map before its classifier; {_ADVICE}")
    if len(shape) != 4:
        raise DistillationError(
            f"ensemble: before its classifier {name} has a tensor of shape {shape}, expected a feature map; {_ADVICE}"
        )
    end = chain[0] if chain else node
    pooling = _between(network, node, end)
    output = next(n for n in network.graph.nodes if n.op == "output")
    output.args = ((node, output.args[0]),)
    network.recompile()
    return FeatureSplit(network, pooling, shape[1], (shape[2], shape[3]))


def _shapes(network: fx.GraphModule, sample: Tensor) -> dict[str, tuple[int, ...]]:
    probe = copy.deepcopy(network).eval()
    with torch.no_grad():
        ShapeProp(probe).propagate(sample[:2])
    return {
        node.name: tuple(node.meta["tensor_meta"].shape)
        for node in probe.graph.nodes
        if hasattr(node.meta.get("tensor_meta"), "shape")
    }


def _first_reader(network: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> fx.Node | None:
    """Return the first linear layer after the last parametric layer with a 4-d output, or the output."""
    nodes = list(network.graph.nodes)
    output = nodes[-1]
    if not isinstance(output.args[0], fx.Node) or len(shapes.get(output.args[0].name, ())) != 2:
        return None
    last = max(
        (
            index
            for index, node in enumerate(nodes)
            if _has_parameters(network, node) and len(shapes.get(node.name, ())) == 4
        ),
        default=0,
    )
    reader: fx.Node
    for reader in nodes[last:]:
        if reader.op == "call_module" and isinstance(network.get_submodule(str(reader.target)), nn.Linear):
            return reader
    end: fx.Node = nodes[-1]
    return end


def _tensor_inputs(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.name in shapes]


def _has_parameters(network: fx.GraphModule, node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op != "call_module":
        return False
    return any(True for _ in network.get_submodule(str(node.target)).parameters())


def _between(network: fx.GraphModule, start: fx.Node, end: fx.Node) -> fx.GraphModule:
    """Return the part of a graph from the value of one node to that of another, as a module."""
    graph = fx.Graph()
    copies = {start: graph.placeholder("features")}
    after = False
    for node in network.graph.nodes:
        sources = node.all_input_nodes
        known = after and sources and all(source in copies for source in sources)
        if known and node.op != "output" and not _has_parameters(network, node):
            copies[node] = graph.node_copy(node, lambda source: copies[source])
        after = after or node is start
    graph.output(copies[end])
    module = fx.GraphModule(network, graph)
    graph.eliminate_dead_code()
    module.recompile()
    return module
