"""The forward of a network lifted from a program: its calling convention, its calls, its outputs."""

from __future__ import annotations

import operator
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind
from torch.utils._pytree import TreeSpec

from convsurgeon.storage._program_grammar import UnsupportedError
from convsurgeon.storage._program_layers import Layer, State, operator_name, transposed_of

_SIZES = {"sym_size": "size", "sym_stride": "stride", "sym_numel": "numel", "sym_storage_offset": "storage_offset"}
_CHECKS_TYPES = "_assert_tensor_metadata"
_CONVOLUTION = re.compile(r"conv(_transpose)?[123]d")
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


@dataclass(frozen=True)
class Argument:
    """One argument of a program.

    Args:
        name: as the forward calls it.
        tree: how its leaves are nested.
        leaves: the placeholders and specs of its leaves.
        by_keyword: whether the program was exported with it by keyword.
    """

    name: str
    tree: TreeSpec
    leaves: tuple[tuple[fx.Node, InputSpec], ...]
    by_keyword: bool

    @property
    def is_constant(self) -> bool:
        """Whether it is one value that the program was made for."""
        return self.tree.is_leaf() and isinstance(self.leaves[0][1].arg, ConstantArgument)


def arguments_of_program(program: ExportedProgram) -> list[Argument]:
    """Return the arguments in order.

    Raises:
        UnsupportedError: if the program does not say how it is called.
    """
    signature = program.module_call_graph[0].signature if program.module_call_graph else None
    if signature is None or signature.in_spec.num_children != 2:
        raise UnsupportedError("no calling convention")
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    pairs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    leaves = iter([(node, spec) for node, spec in pairs if spec.kind is InputKind.USER_INPUT])
    positional, keywords = signature.in_spec.children()
    names = list(signature.forward_arg_names or ())[: positional.num_children]
    if len(names) < positional.num_children:
        names = [f"arg{index}" for index in range(positional.num_children)]
    trees = [*zip(names, positional.children(), strict=True), *zip(keywords.context, keywords.children(), strict=True)]
    found = []
    for index, (name, tree) in enumerate(trees):
        if not str(name).isidentifier():
            raise UnsupportedError(f"an argument called {name!r}")
        own = tuple(next(leaves) for _ in range(tree.num_leaves))
        found.append(Argument(str(name), tree, own, index >= positional.num_children))
    return found


def is_called(node: fx.Node, name: str) -> bool:
    """Whether a node calls a higher-order operator of that name."""
    target = node.target
    return isinstance(target, torch._ops.HigherOrderOperator) and name.endswith(f".{target}")


class GraphWriter:
    """Writes the graph of one program anew, with layers as module calls and tensors as attributes."""

    def __init__(self, program: ExportedProgram, state: State, layers: Mapping[fx.Node, Layer]) -> None:
        self._program, self._state, self._layers = program, state, layers
        self._graph = fx.Graph()
        self._values: dict[fx.Node, Any] = {}
        self._inside = {name for layer in layers.values() for name in layer.roles.values()}

    def write(self, *, only_batch: int | None = None) -> fx.Graph:
        """Return the graph; with `only_batch`, it refuses batches of another size.

        Raises:
            UnsupportedError: for control flow, and for inputs and outputs of unknown classes.
        """
        self._write_inputs(only_batch)
        for node in self._program.graph.nodes:
            if node.op == "call_function":
                self._write_call(node)
            elif node.op == "output":
                self._write_outputs(node)
        return self._graph

    def _write_inputs(self, only_batch: int | None) -> None:
        arguments = arguments_of_program(self._program)
        needed = max((index for index, each in enumerate(arguments) if not each.is_constant), default=-1)
        places = [
            self._graph.placeholder(each.name)
            if index <= needed
            else self._graph.placeholder(each.name, default_value=_constant(each.leaves[0][1]))
            for index, each in enumerate(arguments)
        ]
        for place, argument in zip(places, arguments, strict=True):
            self._take_apart(place, argument.tree, argument.name, iter(argument.leaves))
        for argument in arguments:
            for leaf, _ in argument.leaves:
                value = leaf.meta.get("val")
                if only_batch is not None and isinstance(value, Tensor) and value.dim() > 0:
                    self._graph.call_function(_expect_batch, (self._values[leaf], only_batch))

    def _take_apart(
        self, value: fx.Node, tree: TreeSpec, name: str, leaves: Iterator[tuple[fx.Node, InputSpec]]
    ) -> None:
        if tree.is_leaf():
            node, spec = next(leaves)
            self._values[node] = value
            if isinstance(spec.arg, ConstantArgument):
                self._values[node] = _constant(spec)
                self._graph.call_function(_expect, (value, _constant(spec), name))
            return
        for key, child in zip(_keys(tree), tree.children(), strict=True):
            self._take_apart(self._graph.call_function(operator.getitem, (value, key)), child, name, leaves)

    def _write_call(self, node: fx.Node) -> None:
        layer = self._layers.get(node)
        if layer is not None:
            output = self._graph.call_module(layer.fqn, (self._read(layer.x),))
            self._values[node] = (output,) if layer.packed else output
            return
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, fx.Node) and source in self._layers:
            if node.args[1] == 0:
                self._values[node] = self._values[source][0]
            return
        if self._belongs_to_layer(node) or operator_name(node) == _CHECKS_TYPES:
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise UnsupportedError(f"{node.target} (control flow, autocast or the like)")
        args = fx.node.map_arg(node.args, self._read)
        kwargs = fx.node.map_arg(node.kwargs, self._read)
        kind, target = _written_as(node)
        self._values[node] = self._graph.create_node(kind, target, args, kwargs, name=node.name)

    def _belongs_to_layer(self, node: fx.Node) -> bool:
        """Whether a node only transposes a layer's weight for it, or counts the batches of a batch norm."""
        first = node.args[0] if node.args else None
        name = self._state.names.get(first) if isinstance(first, fx.Node) else None
        if name not in self._inside:
            return False
        if operator_name(node) in ("add", "add_") and str(name).endswith(".num_batches_tracked"):
            return all(user.op == "output" for user in node.users)
        return transposed_of(node) is not None and all(user in self._layers for user in node.users)

    def _read(self, node: fx.Node) -> Any:
        """Return what stands for a node; a tensor of the program is fetched where it is first read."""
        if node not in self._values:
            self._values[node] = self._graph.create_node("get_attr", self._state.names[node])
        return self._values[node]

    def _attribute(self, name: str) -> Any:
        node = next((node for node, each in self._state.names.items() if each == name), None)
        return self._graph.create_node("get_attr", name) if node is None else self._read(node)

    def _write_outputs(self, node: fx.Node) -> None:
        results: list[Any] = []
        inputs = {place.name: place for place in self._program.graph.nodes if place.op == "placeholder"}
        for result, spec in zip(node.args[0], self._program.graph_signature.output_specs, strict=True):  # type: ignore[arg-type]
            if spec.kind is OutputKind.USER_OUTPUT:
                results.append(self._read(result) if isinstance(result, fx.Node) else result)
            elif spec.kind in _MUTATIONS and spec.target in self._inside:
                continue  # the layer sees to it
            elif spec.kind in _MUTATIONS:
                self._graph.call_method("copy_", (self._attribute(str(spec.target)), self._read(result)))
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                self._graph.call_method("copy_", (self._read(inputs[str(spec.target)]), self._read(result)))
            else:
                raise UnsupportedError(f"an output of the kind {spec.kind.name.lower()}")
        signature = self._program.module_call_graph[0].signature
        assert signature is not None
        self._graph.output(self._put_together(signature.out_spec, iter(results)))

    def _put_together(self, tree: TreeSpec, leaves: Iterator[Any]) -> Any:
        if tree.is_leaf():
            return next(leaves)
        values = [self._put_together(child, leaves) for child in tree.children()]
        keys = _keys(tree)
        if tree.type in (tuple, list):
            return tree.type(values)
        pairs = list(zip(keys, values, strict=True))
        return dict(pairs) if tree.type is dict else self._graph.call_function(OrderedDict, (pairs,))


def _keys(tree: TreeSpec) -> list[Any]:
    if tree.type in (tuple, list):
        return list(range(tree.num_children))
    if tree.type in (dict, OrderedDict):
        return list(tree.context)
    raise UnsupportedError(f"a {tree.type.__module__}.{tree.type.__qualname__} among its inputs or outputs")


def _written_as(node: fx.Node) -> tuple[str, Any]:
    """Return how a call is written: where PyTorch has a function of the same name and arguments, as that.

    So additions, activations and convolutions are read off the graph as in any other network, and
    sizes follow the input.
    """
    name = operator_name(node)
    if name in _SIZES:
        return "call_method", _SIZES[name]
    if not isinstance(node.target, torch._ops.OpOverload):
        return "call_function", node.target
    if _CONVOLUTION.fullmatch(name) or torch.Tag.pointwise in node.target.tags:
        function = getattr(torch, name, None) or getattr(torch._C._nn, name, None)
        if function is not None:
            return "call_function", function
        if hasattr(Tensor, name):
            return "call_method", name
    return "call_function", node.target


def _constant(spec: InputSpec) -> Any:
    assert isinstance(spec.arg, ConstantArgument)
    return spec.arg.value


def _expect(value: object, expected: object, name: str) -> None:
    """Refuse an argument other than the one that the program was exported with."""
    if isinstance(value, bool | int | float | str | None) and value != expected:
        raise ValueError(f"this network was exported for {name}={expected!r}, and cannot take {value!r}")


def _expect_batch(value: object, batch: int) -> None:
    """Refuse a batch of another size than the one that stands in the program's graph."""
    if isinstance(value, Tensor) and value.shape[0] != batch:
        raise ValueError(
            f"this network was exported for a batch of exactly {batch}, and cannot take {value.shape[0]}; "
            "export it with dynamic_shapes"
        )
