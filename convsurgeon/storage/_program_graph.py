"""An exported program as an ordinary network: real layers where it calls some, and a forward for the rest."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from convsurgeon.storage._program_grammar import WITHOUT_GRADIENT, UnsupportedError
from convsurgeon.storage._program_layers import Layer, State, module_stack, read_layer, transposed_of
from convsurgeon.storage._program_writer import GraphWriter, is_called


class ExportedNetwork(nn.Module):
    """A network lifted from an exported program; each has a class of its own, with its forward.

    It is copied, trained and rewritten like any other, and saved as `.pt2`, which holds no code.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedNetwork:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self) -> ExportedNetwork:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickle.PicklingError(
            f"{type(self).__name__} came from an exported program, and its code is never pickled; "
            "save it with convsurgeon.save(model, 'net.pt2')"
        )


def lift(program: ExportedProgram, *, only_batch: int | None = None) -> ExportedNetwork:
    """Return the network that a program computes, with the program's own tensors under their names.

    A convolution, linear layer, batch norm or dropout whose tensors belong to one module of the
    exported network becomes that module, and behaves as one in training. All else stays as it is.

    Args:
        only_batch: the one batch size that the program takes, which the network then checks.

    Raises:
        UnsupportedError: for control flow, and for inputs and outputs of unknown classes.
    """
    _inline(program.graph_module)
    state = _read_state(program)
    layers = _settle(program.graph, state)
    modules = {layer.fqn: layer.build(state.tensors) for layer in layers.values()}
    root = _build_tree(program, state, layers, modules)
    # fx writes the forward and gives it the modules and tensors that it reads
    code = fx.GraphModule(root, GraphWriter(program, state, layers).write(only_batch=only_batch))
    body = {"forward": type(code).forward, "__module__": __name__}
    network: ExportedNetwork = type(f"Exported{_root_name(program)}", (ExportedNetwork,), body)()
    for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        network.__dict__[kind] = root.__dict__[kind]
    network.train(any(layer.training for layer in layers.values()))
    for layer in layers.values():
        if layer.training is not None:
            modules[layer.fqn].train(layer.training)
    return network


def _inline(module: fx.GraphModule) -> None:
    """Put regions without gradients in line: what they give is detached, so that gradients stay the same."""
    graph = module.graph
    while calls := [node for node in graph.nodes if is_called(node, WITHOUT_GRADIENT)]:
        call = calls[0]
        enabled, region, *operands = call.args
        inner = getattr(module, region.target).graph
        known = dict(zip([node for node in inner.nodes if node.op == "placeholder"], operands, strict=True))
        results: list[Any] = []
        with graph.inserting_before(call):
            for node in inner.nodes:
                if node.op == "output":
                    results = list(fx.node.map_arg(node.args[0], known.__getitem__))
                elif node.op != "placeholder":
                    known[node] = graph.node_copy(node, known.__getitem__)
            if not enabled:
                results = [_detached(graph, result) for result in results]
        for user in list(call.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(call)
        if not region.users:
            graph.erase_node(region)


def _detached(graph: fx.Graph, result: Any) -> Any:
    if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), Tensor):
        return result
    detached = graph.call_function(torch.ops.aten.detach.default, (result,))
    detached.meta.update(result.meta)
    return detached


def _read_state(program: ExportedProgram) -> State:
    """Collect parameters, buffers and constants; what shares its memory is one object."""
    known: dict[object, Tensor] = {}
    tensors = {}
    parameters = set(program.graph_signature.parameters)
    for name, value in {**program.state_dict, **program.constants}.items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"{name}, which is a {type(value).__name__} and no tensor")
        trained = name in parameters or isinstance(value, nn.Parameter)
        place = value.untyped_storage().data_ptr() if value.numel() else name
        key = (place, value.storage_offset(), value.shape, value.stride(), value.dtype, trained)
        if key not in known:
            plain = value.detach()
            known[key] = nn.Parameter(plain, requires_grad=value.requires_grad) if trained else plain
        tensors[name] = known[key]
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = program.graph_signature.input_specs
    names = {node: str(spec.target) for node, spec in zip(placeholders, specs, strict=True) if spec.kind in kinds}
    return State(tensors, names)


def _settle(graph: fx.Graph, state: State) -> dict[fx.Node, Layer]:
    """Return the calls that become layers: those that agree on one module and alone use its weights."""
    found = {node: layer for node in graph.nodes if (layer := read_layer(node, state)) is not None}
    while wrong := {layer.fqn for node, layer in found.items() if not _fits(node, layer, found, state)}:
        found = {node: layer for node, layer in found.items() if layer.fqn not in wrong or not layer.roles}
    weighted = {node: layer for node, layer in found.items() if layer.roles}
    occupied = {part for name in state.tensors for part in _prefixes(name)}
    owners = {layer.fqn for layer in weighted.values()}
    placed: dict[str, Layer] = {}
    for node, layer in found.items():
        if not layer.roles and _fits(node, layer, found, state):
            inside = not owners.isdisjoint(_prefixes(layer.fqn))
            wanted = layer.fqn.replace(".", "_") if inside else layer.fqn
            name = next(
                name
                for name in itertools.chain([wanted], (f"{wanted}_{count}" for count in itertools.count(1)))
                if name not in occupied and (name not in placed or placed[name].is_like(layer))
            )
            weighted[node] = placed[name] = replace(layer, fqn=name)
    return weighted


def _fits(node: fx.Node, layer: Layer, found: Mapping[fx.Node, Layer], state: State) -> bool:
    if layer.packed and not all(user.args[1] == 0 or _is_only_returned(user) for user in node.users):
        return False
    if not layer.roles:
        return True
    if not all(layer.is_like(other) for other in found.values() if other.fqn == layer.fqn and other.roles):
        return False
    weights = {
        id(state.tensors[name]) for name in layer.roles.values() if isinstance(state.tensors[name], nn.Parameter)
    }
    places = [place for place, name in state.names.items() if id(state.tensors[name]) in weights]
    users = {user for place in places for user in place.users}
    users |= {reader for user in users if transposed_of(user) is not None for reader in user.users}
    return all(user in found or transposed_of(user) is not None for user in users)


def _is_only_returned(node: fx.Node) -> bool:
    """Whether nothing reads a value but the program's end, as the new running statistics of a batch norm."""
    return all(user.op == "output" for user in node.users)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _build_tree(
    program: ExportedProgram, state: State, layers: Mapping[fx.Node, Layer], modules: Mapping[str, nn.Module]
) -> nn.Module:
    """Return a module that holds every layer and tensor under its name."""
    root = nn.Module()
    inside: set[str] = set()
    for layer in {layer.fqn: layer for layer in layers.values()}.values():
        owners = {name.rpartition(".")[0] for name in state.tensors} if layer.roles else set()
        shared = {owner for owner in owners - modules.keys() if state.has(owner, layer.roles)}
        for owner in (layer.fqn, *sorted(shared)):
            parent, name = _parent(root, owner)
            parent.add_module(name, modules[layer.fqn])
            inside |= {f"{owner}.{role}" for role in layer.roles}
    lasting = program.state_dict.keys()
    for full_name, tensor in state.tensors.items():
        if full_name not in inside:
            parent, name = _parent(root, full_name)
            if isinstance(tensor, nn.Parameter):
                parent.register_parameter(name, tensor)
            else:
                parent.register_buffer(name, tensor, persistent=full_name in lasting)
    return root


def _parent(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds `name`, made where it is not there yet, and the last part of the name."""
    *above, last = name.split(".")
    for part in above:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, last


def _root_name(program: ExportedProgram) -> str:
    """Return the class name of the network that was exported, as its calls remember it."""
    outermost = (stack[0] for node in program.graph.nodes if (stack := module_stack(node)))
    name = next((kind.rpartition(".")[2] for path, kind in outermost if path == "" and "." in kind), "")
    return name.removeprefix("Exported") if name.isidentifier() else "Network"
