"""What `torch.fx` shows: the largest regions of a model that can be traced, and the facts in them."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from convsurgeon.errors import one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery._copies import untouched_random_state

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FUNCTIONAL = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_WEIGHTED = (_ConvNd, nn.Linear, AbstractCheapConv)


@dataclass
class GraphFacts:
    """What the graphs tell about the convolutions in them, by fqn.

    Args:
        order: convolutions and linear layers in call order; None if the root could not be traced.
        facts: keyword arguments of `Site` per fqn.
        untraced: modules that could not be traced, with the reason.
        functional: functional convolutions, by the module that calls them and the function.
    """

    order: list[str] | None = None
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    untraced: list[tuple[str, str]] = field(default_factory=list)
    functional: list[str] = field(default_factory=list)


class SiteTracer(fx.Tracer):
    """A tracer for which convolutions, ops and torch's own layers are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep convolutions of any class, and ops, whole."""
        return isinstance(m, _WEIGHTED) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph:
    """Trace a module with its optional arguments at their defaults; whatever fails is raised."""
    parameters = inspect.signature(module.forward).parameters.values()
    optional = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    with untouched_random_state():
        return SiteTracer().trace(module, concrete_args=optional or None)


def read_graphs(model: nn.Module) -> GraphFacts:
    """Trace the largest regions of a model that can be traced and read the facts off them.

    The model is changed by whatever its own forward does to it: give a copy.
    """
    result = GraphFacts()
    for fqn, module, graph in _regions(model, "", result.untraced):
        calls = [
            node
            for node in graph.nodes
            if node.op == "call_module" and isinstance(module.get_submodule(node.target), _WEIGHTED)
        ]
        names = {node: f"{fqn}.{node.target}".lstrip(".") for node in calls}
        counts = Counter(names.values())
        for node in calls:
            if not isinstance(module.get_submodule(node.target), nn.Linear):
                # how often a region itself is called, only the graph of the root tells
                calls_of_it = {"calls": counts[names[node]]} if fqn == "" else {}
                result.facts.setdefault(names[node], {**_facts(node, module, prefix=fqn), **calls_of_it})
        result.functional += [
            f"{_owner(node, fqn)}: {node.target.__name__}"
            for node in graph.nodes
            if node.op == "call_function" and node.target in _FUNCTIONAL
        ]
        if fqn == "":
            result.order = list(names.values())
    return result


def _owner(node: fx.Node, region: str) -> str:
    """Return the fqn of the module whose forward made a node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inside = str(stack[-1][0]) if stack else ""
    return f"{region}.{inside}".strip(".") or "(root)"


def _regions(module: nn.Module, fqn: str, untraced: list[tuple[str, str]]) -> Iterator[tuple[str, nn.Module, fx.Graph]]:
    has_site = any(isinstance(child, (_ConvNd, AbstractCheapConv)) for child in module.modules())
    if not has_site or isinstance(module, _WEIGHTED):
        return
    if type(module).forward is not nn.Module.forward:
        try:
            yield fqn, module, trace(module)
            return
        except Exception as error:
            untraced.append((fqn or "(root)", one_line(error)))
    for name, child in module.named_children():
        yield from _regions(child, f"{fqn}.{name}".lstrip("."), untraced)


def _facts(node: fx.Node, region: nn.Module, *, prefix: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"norm": None, "activation": None}
    last = node
    follower = _only_user(last)
    if follower is not None and isinstance(_module(follower, region), _NORMS):
        facts["norm"] = f"{prefix}.{follower.target}".lstrip(".")
        last, follower = follower, _only_user(follower)
    if follower is not None:
        facts["activation"] = _activation(follower, region)
    facts["residual"] = any(_adds(user) for user in last.users)
    facts["feeds_head"] = _feeds_head(last, region)
    return facts


def _adds(node: fx.Node) -> bool:
    """Whether a node adds two tensors; a submodule may be called `add` too."""
    called = node.op in ("call_function", "call_method")
    return called and node.target in _ADDITIONS and len(node.all_input_nodes) > 1


def _feeds_head(node: fx.Node, region: nn.Module) -> bool:
    waiting, seen = list(node.users), set()
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        module = _module(user, region)
        if isinstance(module, nn.Linear):
            return True
        if module is None or not any(True for _ in module.parameters()):
            waiting.extend(user.users)
    return False


def _activation(node: fx.Node, region: nn.Module) -> str | None:
    module = _module(node, region)
    if module is not None:
        known = type(module).__module__ == "torch.nn.modules.activation"
        return type(module).__name__ if known else None
    name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
    known_functions = {name.lower() for name in nn.modules.activation.__all__}
    return name if name.lower().replace("_", "") in known_functions else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(node: fx.Node, region: nn.Module) -> nn.Module | None:
    return region.get_submodule(str(node.target)) if node.op == "call_module" else None
