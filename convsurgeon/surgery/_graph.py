"""What `torch.fx` shows: the largest regions of a model that can be traced, and the facts in them."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsurgeon.errors import one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery._calls import CONVOLUTIONS, METHODS, NOT_UNDERSTOOD, PROPERTIES, bind, caller, spec_of
from convsurgeon.surgery._copies import untouched_random_state
from convsurgeon.surgery._functional import Finding, Names

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"}
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_WEIGHTED = (_ConvNd, nn.Linear, AbstractCheapConv)


@dataclass
class GraphFacts:
    """What the graphs tell about the convolutions in them, by fqn.

    Args:
        order: convolutions and linear layers in call order; None if the root could not be traced.
        facts: keyword arguments of `Site` per fqn.
        untraced: modules that could not be traced, with the reason.
        findings: functional convolutions, and other reads of kernels.
    """

    order: list[str] | None = None
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    untraced: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


class SiteTracer(fx.Tracer):
    """A tracer for which convolutions, ops and torch's own layers are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep convolutions of any class, and ops, whole."""
        return isinstance(m, _WEIGHTED) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Note which module a node calls; and who makes a functional convolution: for every node it would be slow."""
        node = super().create_node(kind, target, *args, **kwargs)
        if kind == "call_module":
            node.meta["module"] = self.root.get_submodule(target)
        elif kind == "call_function" and target in CONVOLUTIONS:
            node.meta["source"] = caller()
        return node


def trace(module: nn.Module) -> fx.Graph:
    """Trace a module with its optional arguments at their defaults; whatever fails is raised."""
    parameters = inspect.signature(module.forward).parameters.values()
    optional = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    tracer = SiteTracer()
    try:
        with untouched_random_state():
            return tracer.trace(module, concrete_args=optional or None)
    finally:
        vars(tracer).clear()  # it stands in a cycle, and would keep the module alive


def read_graphs(model: nn.Module, names: Names) -> GraphFacts:
    """Trace the largest regions of a model that can be traced and read the facts off them.

    The model is changed by whatever its own forward does to it: give a copy.
    """
    result = GraphFacts()
    for fqn, module, graph in _regions(model, "", result.untraced):
        called: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if isinstance(_module(node), _WEIGHTED):
                called[node] = f"{fqn}.{node.target}".lstrip(".")
            elif node.op == "call_function" and _by_itself(node):
                called[node] = names.modules[node.meta["source"].owner]  # its forward was called, not itself
            elif node.op == "call_function" and node.target in CONVOLUTIONS:
                finding = _functional(node, module, fqn, names)
                if finding is not None:
                    called[node] = finding.kernel or f"{finding.owner}.{finding.function}()"
                    result.findings.append(finding)
            elif node.op == "get_attr":
                result.findings += _reads(node, fqn, names)
        counts = Counter(called.values())
        firsts = _reading_the_input(graph, called) if fqn == "" else set()
        for node, called_as in called.items():
            if node.op == "call_module" and not isinstance(_module(node), nn.Linear):
                # how often a region itself is called, only the graph of the root tells
                calls_of_it = {"calls": counts[called_as], "stem": node in firsts} if fqn == "" else {}
                result.facts.setdefault(called_as, {**_facts(node, prefix=fqn), **calls_of_it})
            elif node in firsts:
                result.facts.setdefault(called_as, {"stem": True})
        if fqn == "":
            result.order = list(called.values())
        for node in graph.nodes:  # graphs are full of cycles, which would keep the model's copy alive
            node.meta.clear()
    return result


def _reading_the_input(graph: fx.Graph, weighted: Collection[fx.Node]) -> set[fx.Node]:
    """Return the weighted nodes that no other one stands before: parallel stems are several."""
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        if any(before in behind or before in weighted for before in node.all_input_nodes):
            behind.add(node)
    return {node for node in weighted if node not in behind}


def _functional(node: fx.Node, region: nn.Module, fqn: str, names: Names) -> Finding | None:
    """Return what a graph tells about a functional convolution; None if it is an op that was put there."""
    arguments = bind(node.args, node.kwargs)
    weight = arguments.get("weight")
    where = node.meta["source"].where
    found = Finding(CONVOLUTIONS[node.target], _owner(node, fqn), where, "fx")  # type: ignore[index]
    if not isinstance(weight, fx.Node):
        return replace(found, problem="its kernel is computed when it runs")
    source, passes = _before_casts(weight)
    if source.op != "get_attr":
        reason = "the input" if _depends_on_input(weight) else "its parameters when it runs"
        return replace(found, problem=f"its kernel is computed from {reason}")
    weight = source
    tensor = _attribute(region, str(weight.target))
    if isinstance(tensor, AbstractCheapConv):
        return None
    kernel = names.first(tensor)
    if kernel is None:
        return replace(found, problem="its kernel is neither a parameter nor a buffer of the model")
    if tensor.dim() != 4 or found.function != "conv2d":
        return replace(found, kernel=kernel)
    spec, obstacle = spec_of(tensor.shape, arguments)
    if passes:
        obstacle = f"its kernel passes through {passes[0]} before the convolution"
    elif node.target is not torch.conv2d:
        obstacle = NOT_UNDERSTOOD
    return replace(found, kernel=kernel, spec=spec, problem=obstacle, facts=_facts(node, prefix=fqn))


def _reads(node: fx.Node, fqn: str, names: Names) -> list[Finding]:
    """Return the uses of a kernel other than as the kernel of a functional convolution."""
    name = f"{fqn}.{node.target}".lstrip(".")
    if name not in names.by_name:
        return []
    name = names.fqns[names.by_name[name]][0]
    owned = names.convolution_of(name) is not None
    found = []
    for user in node.users:
        is_conv = user.op == "call_function" and user.target in CONVOLUTIONS
        as_kernel = is_conv and bind(user.args, user.kwargs).get("weight") is node
        if user.op == "call_method" and user.target in _CASTS and _all_lead_to_kernels(user):
            continue  # the convolution says so itself
        if (as_kernel and (_by_itself(user) or not owned)) or _looks_only(user):
            continue
        function = str(getattr(user.target, "__name__", user.target))
        where = user.meta["source"].where if "source" in user.meta else ""
        found.append(Finding(function, _owner(user, fqn), where, "fx", name, is_convolution=False))
    return found


def _all_lead_to_kernels(node: fx.Node) -> bool:
    """Whether a cast kernel is used as a kernel, and for nothing else."""
    for user in node.users:
        is_conv = user.op == "call_function" and user.target in CONVOLUTIONS
        as_kernel = is_conv and bind(user.args, user.kwargs).get("weight") is node
        casts = user.op == "call_method" and user.target in _CASTS
        if not as_kernel and not (casts and _all_lead_to_kernels(user)):
            return False
    return bool(node.users)


def _looks_only(node: fx.Node) -> bool:
    """Whether a node only asks for a tensor's shape, dtype or device."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in PROPERTIES
    return node.op == "call_method" and node.target in METHODS


def _by_itself(node: fx.Node) -> bool:
    """Whether a convolution module makes the call, since its forward was called and not itself."""
    return "source" in node.meta and isinstance(node.meta["source"].owner, _WEIGHTED)


def _before_casts(node: fx.Node) -> tuple[fx.Node, list[str]]:
    """Return what a kernel was before it was cast or moved, and the methods that did so."""
    passes: list[str] = []
    while node.op == "call_method" and node.target in _CASTS and isinstance(node.args[0], fx.Node):
        passes.append(str(node.target))
        node = node.args[0]
    return node, passes


def _depends_on_input(node: fx.Node) -> bool:
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if _looks_only(current):
            continue
        if current.op in ("placeholder", "call_module"):
            return True
        seen.add(current)
        waiting += [before for before in current.all_input_nodes if before not in seen]
    return False


def _attribute(region: nn.Module, target: str) -> Any:
    found: Any = region
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _owner(node: fx.Node, region: str) -> str:
    """Return the fqn of the module whose forward made a node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inside = str(stack[-1][0]) if stack else ""
    return f"{region}.{inside}".strip(".") or "(root)"


def _regions(module: nn.Module, fqn: str, untraced: list[tuple[str, str]]) -> Iterator[tuple[str, nn.Module, fx.Graph]]:
    if isinstance(module, _WEIGHTED) or (fqn and not _may_convolve(module)):
        return
    if isinstance(module, torch.jit.ScriptModule):
        untraced.append((fqn or "(root)", "it is compiled by TorchScript"))
        return
    if type(module).forward is not nn.Module.forward:
        try:
            yield fqn, module, trace(module)
            return
        except Exception as error:
            untraced.append((fqn or "(root)", one_line(error)))
    for name, child in module.named_children():
        yield from _regions(child, f"{fqn}.{name}".lstrip("."), untraced)


def _may_convolve(module: nn.Module) -> bool:
    """Whether a module holds a convolution, or a tensor that could be the kernel of one."""
    if any(isinstance(child, (_ConvNd, AbstractCheapConv)) for child in module.modules()):
        return True
    return any(tensor.dim() >= 3 for tensor in (*module.parameters(), *module.buffers()) if not is_lazy(tensor))


def _facts(node: fx.Node, *, prefix: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"norm": None, "activation": None}
    last = node
    follower = _only_user(last)
    if follower is not None and isinstance(_module(follower), _NORMS):
        facts["norm"] = f"{prefix}.{follower.target}".lstrip(".")
        last, follower = follower, _only_user(follower)
    if follower is not None:
        facts["activation"] = _activation(follower)
    facts["residual"] = any(_adds(user) for user in last.users)
    facts["feeds_head"] = _feeds_head(last)
    return facts


def _adds(node: fx.Node) -> bool:
    """Whether a node adds two tensors; a submodule may be called `add` too."""
    called = node.op in ("call_function", "call_method")
    return called and node.target in _ADDITIONS and len(node.all_input_nodes) > 1


def _feeds_head(node: fx.Node) -> bool:
    waiting, seen = list(node.users), set()
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        module = _module(user)
        if isinstance(module, nn.Linear):
            return True
        if module is None or not any(part._parameters for part in module.modules()):
            waiting.extend(user.users)
    return False


def _activation(node: fx.Node) -> str | None:
    module = _module(node)
    if module is not None:
        known = type(module).__module__ == "torch.nn.modules.activation"
        return type(module).__name__ if known else None
    name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
    known_functions = {name.lower() for name in nn.modules.activation.__all__}
    return name if name.lower().replace("_", "") in known_functions else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(node: fx.Node) -> nn.Module | None:
    found: nn.Module | None = node.meta.get("module")
    return found
