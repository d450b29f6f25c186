"""Calls of ATen operators that are layers: which class, which arguments, whose weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from convsurgeon.storage._program_grammar import is_path

_CONVOLUTION = re.compile(r"conv(_transpose)?[123]d")
_DROPOUTS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "native_dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
_TRANSPOSITIONS = {"permute": ([1, 0],), "t": (), "transpose": (0, 1)}
_NORM_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class State:
    """The tensors of a program by name, and the nodes that stand for them.

    Args:
        tensors: parameters, as `nn.Parameter`, and buffers; one tensor under two names is one object.
        names: the name behind each placeholder.
    """

    tensors: Mapping[str, Tensor]
    names: Mapping[fx.Node, str]

    def aliases(self, node: object) -> list[str]:
        """Return all names of the tensor behind a node, none where it is computed."""
        name = self.names.get(node) if isinstance(node, fx.Node) else None
        if name is None:
            return []
        return [other for other, tensor in self.tensors.items() if tensor is self.tensors[name]]

    def has(self, other: str, roles: Mapping[str, str]) -> bool:
        """Whether an owner has these tensors too, in the same roles, and nothing else."""
        names = {role: f"{other}.{role}" for role in roles}
        return self.under(other) == set(roles) and all(
            self.tensors[names[role]] is self.tensors[name] for role, name in roles.items()
        )

    def under(self, owner: str) -> set[str]:
        """Return the names below one module, without its own."""
        return {name.removeprefix(f"{owner}.") for name in self.tensors if name.startswith(f"{owner}.")}


@dataclass(frozen=True)
class Layer:
    """One call of an operator that is a call of a layer.

    Args:
        fqn: the module that owns the weights; for what has none, where it was called.
        cls: its class.
        arguments: what the class is built with.
        roles: the module's own name of each tensor, and the tensor's full name.
        training: whether it is called as in training; None where that makes no difference.
        x: its input.
        packed: whether the operator gives a tuple, of which the layer's output is the first.
    """

    fqn: str
    cls: type[nn.Module]
    arguments: Mapping[str, Any]
    x: fx.Node
    roles: Mapping[str, str] = field(default_factory=dict)
    training: bool | None = None
    packed: bool = False

    def is_like(self, other: Layer) -> bool:
        """Whether one module can make both calls."""
        return (self.cls, self.arguments, self.roles, self.training) == (
            *(other.cls, other.arguments, other.roles, other.training),
        )

    def build(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the module, with the program's own tensors in it."""
        weighted = {"device": "meta"} if self.roles else {}
        module = self.cls(**self.arguments, **weighted)
        for role in (*module._parameters, *module._buffers):
            place = module._parameters if role in module._parameters else module._buffers
            place[role] = tensors[self.roles[role]] if role in self.roles else None  # type: ignore[assignment]
        return module


def read_layer(node: fx.Node, state: State) -> Layer | None:
    """Return the layer that a node calls, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    given = arguments_of(node)
    name = operator_name(node)
    if name.rstrip("_") in _DROPOUTS:
        return _dropout(node, name, given)
    if _CONVOLUTION.fullmatch(name) or name == "convolution":
        return _convolution(name, given, state)
    if "batch_norm" in name and "running_mean" in given and "momentum" in given:
        return _norm(node, given, state)
    if name in ("linear", "addmm", "mm"):
        return _linear(name, given, state)
    return None


def operator_name(node: fx.Node) -> str:
    """Return `conv2d` for a call of `torch.ops.aten.conv2d.default`, and nothing for what is no operator."""
    target = node.target
    return target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else ""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return what an operator is called with, by the names of its schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    found = {each.name: each.default_value for each in schema}
    found |= dict(zip((each.name for each in schema), node.args, strict=False))
    return found | node.kwargs


def _convolution(name: str, given: dict[str, Any], state: State) -> Layer | None:
    roles = _weight_and_bias(given["weight"], given["bias"], state)
    if roles is None:
        return None
    weight = state.tensors[roles["weight"]]
    rank = weight.dim() - 2
    transposed = "transpose" in name or given.get("transposed", False)
    cls = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d", None)
    if cls is None:
        return None
    lengths = {key: _repeated(given[key], rank) for key in ("stride", "padding", "dilation")}
    if not all(isinstance(length, str | int) for each in lengths.values() for length in each):
        return None  # worked out from the input's size
    if transposed:
        lengths["output_padding"] = _repeated(given["output_padding"], rank)
    groups = given["groups"]
    first, second = weight.shape[0], weight.shape[1] * groups
    arguments = {
        "in_channels": first,
        "out_channels": second,
        **({} if transposed else {"in_channels": second, "out_channels": first}),
        "kernel_size": tuple(weight.shape[2:]),
        "groups": groups,
        "bias": "bias" in roles,
        **lengths,
    }
    return Layer(_owner(roles), cls, arguments, given["input"], roles)


def _repeated(value: Any, rank: int) -> Any:
    """Return a length per dimension, as torch reads `[1]` and `1`; `"same"` stays as it is."""
    if isinstance(value, str):
        return value
    lengths = tuple(value) if isinstance(value, list | tuple) else (value,)
    return lengths * rank if len(lengths) == 1 else lengths


def _linear(name: str, given: dict[str, Any], state: State) -> Layer | None:
    """Read `linear`, and what the core operators make of it: `addmm(bias, x, permute(weight))`."""
    if name == "linear":
        x, weight, bias = given["input"], given["weight"], given["bias"]
    else:
        x, transposed = (given["mat1"], given["mat2"]) if name == "addmm" else (given["self"], given["mat2"])
        weight, bias = transposed_of(transposed), given["self"] if name == "addmm" else None
        if name == "addmm" and not given["alpha"] == given["beta"] == 1:
            return None
    roles = _weight_and_bias(weight, bias, state)
    if roles is None or not isinstance(x, fx.Node):
        return None
    shape = state.tensors[roles["weight"]].shape
    if len(shape) != 2:
        return None
    arguments = {"in_features": shape[1], "out_features": shape[0], "bias": "bias" in roles}
    return Layer(_owner(roles), nn.Linear, arguments, x, roles)


def transposed_of(node: object) -> fx.Node | None:
    """Return the matrix that a node transposes, or None."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    source, *how = node.args or (None,)
    wanted = _TRANSPOSITIONS.get(operator_name(node))
    return source if wanted is not None and tuple(how) == wanted and isinstance(source, fx.Node) else None


def _weight_and_bias(weight: object, bias: object, state: State) -> dict[str, str] | None:
    """Return the names of a module's weight and bias, if there is a module with these and nothing else."""
    for name in state.aliases(weight):
        owner = name.removesuffix(".weight")
        roles = {"weight": name} if bias is None else {"weight": name, "bias": f"{owner}.bias"}
        if owner == name or state.under(owner) != set(roles):
            continue
        is_its_own = bias is None or roles["bias"] in state.aliases(bias)
        if is_its_own and all(isinstance(state.tensors[each], nn.Parameter) for each in roles.values()):
            return roles
    return None


def _norm(node: fx.Node, given: dict[str, Any], state: State) -> Layer | None:
    roles = _norm_roles(given, state)
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(_rank(given["input"]))
    if roles is None or cls is None:
        return None
    owner = next(iter(roles.values())).rpartition(".")[0]
    training = bool(given.get("training", given.get("train", False)))
    momentum = given["momentum"]
    arguments = {
        "num_features": state.tensors[next(iter(roles.values()))].shape[0],
        "eps": given.get("eps", given.get("epsilon")),
        # a cumulative average is written as 0 where it is not used
        "momentum": None if momentum == 0 and not training else momentum,
        "affine": "weight" in roles,
        "track_running_stats": "running_mean" in roles,
    }
    return Layer(
        owner, cls, arguments, given["input"], roles, training if "running_mean" in roles else None, _is_packed(node)
    )


def _norm_roles(given: dict[str, Any], state: State) -> dict[str, str] | None:
    """Return the names of a batch norm's tensors, if there is a module with these and nothing else."""
    found = {role: state.aliases(given[role]) for role in _NORM_STATE if isinstance(given.get(role), fx.Node)}
    if ("weight" in found) != ("bias" in found) or ("running_mean" in found) != ("running_var" in found):
        return None
    anchor = found.get("running_mean", found.get("weight", []))
    for owner in (name.rpartition(".")[0] for name in anchor):
        roles = {role: f"{owner}.{role}" for role in found}
        own = state.under(owner)
        if "num_batches_tracked" in own:
            roles["num_batches_tracked"] = f"{owner}.num_batches_tracked"
        if set(roles) == own and all(roles[role] in names for role, names in found.items()):
            return roles
    return None


def _rank(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else 0


def _dropout(node: fx.Node, name: str, given: dict[str, Any]) -> Layer | None:
    """A dropout owns nothing, so that its place tells its name: its module's, or its caller's."""
    path, kind = _path(node), _kind(node)
    if not kind.startswith("torch.nn.modules.dropout."):
        path = f"{path}.dropout".lstrip(".")
    arguments = {"p": given["p"], "inplace": name.endswith("_")}
    return Layer(
        path if is_path(path) else "dropout",
        _DROPOUTS[name.rstrip("_")],
        arguments,
        given["self" if "self" in given else "input"],
        training=bool(given["train"]),
        packed=_is_packed(node),
    )


def _is_packed(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    return len(node.target._schema.returns) > 1


def _owner(roles: Mapping[str, str]) -> str:
    return roles["weight"].removesuffix(".weight")


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """Return the names and classes of the modules in whose forward a node was recorded, outermost first."""
    return [(str(name), str(kind)) for name, kind in (node.meta.get("nn_module_stack") or {}).values()]


def _path(node: fx.Node) -> str:
    """Return the module in whose forward a node was recorded; a second call of it says `name@1`."""
    stack = module_stack(node)
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def _kind(node: fx.Node) -> str:
    stack = module_stack(node)
    return stack[-1][1] if stack else ""
