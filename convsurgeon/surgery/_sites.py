"""Sites: the convolutions a model owns, each once, with all its names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsurgeon import ops
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec, Pair
from convsurgeon.surgery._copies import sharing_storage
from convsurgeon.surgery._donors import Donor, find_donor, has_op_for_kernel, stated_geometry
from convsurgeon.surgery._paths import named_leaves
from convsurgeon.surgery._weights import type_name

_REGISTRIES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Site:
    """One convolution, with everything known about it.

    Args:
        fqns: all names under which the model holds this one module object.
        type: its class, with the module's path where it is not torch's own.
        spec: its geometry, or None for what is no 2-d convolution.
        op: the name of the op, where the site is converted already.
        options: the op's options, where the site is converted already.
        obstacle: why it cannot be converted whatever the op, or None.
        note: what is special about how it would be converted, or None.
        source: file and line, such as `nets.py:31`, of a functional convolution.
        routes: how it was found, of `module`, `fx`, `observed`.
        calls: how often one forward pass calls it, or None where nothing was run or traced.
        input_sizes: height and width of its input, call by call, where a run was observed.
        norm: the fqn of the norm that follows, or None.
        activation: the activation after that, or None.
        residual: whether its (normalised) output is added to something.
        stem: whether it is the network's first layer and reads at most four channels.
        feeds_head: whether a linear layer follows with no parameters in between.
    """

    fqns: tuple[str, ...]
    type: str
    spec: ConvSpec | None
    op: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    obstacle: str | None = None
    note: str | None = None
    source: str | None = None
    routes: tuple[str, ...] = ("module",)
    calls: int | None = None
    input_sizes: tuple[Pair, ...] = field(default=())
    norm: str | None = None
    activation: str | None = None
    residual: bool = False
    stem: bool = False
    feeds_head: bool = False

    @property
    def fqn(self) -> str:
        """The first of its names; a root that is itself the convolution is called `(root)`."""
        return self.fqns[0] or "(root)"

    @property
    def macs(self) -> int | None:
        """Multiply-adds of the convolution, or of the op it is, over all calls, for one image, or None."""
        if self.spec is None or not self.input_sizes:
            return None
        if self.op is not None:
            op = ops.get(self.op)
            return sum(op.macs(*self.spec.unpadded(*size), self.options) for size in self.input_sizes)
        return sum(self.spec.macs(*size) for size in self.input_sizes)


def walk(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Yield every convolution and op of a model once, with all its names, in module order.

    What is inside an op belongs to the op; what stands for the kernel of a convolution, to neither.
    """
    names: dict[nn.Module, list[str]] = {}
    hidden: tuple[str, ...] = ()
    for fqn, module in model.named_modules(remove_duplicate=False):
        if fqn.startswith(hidden):
            continue
        if isinstance(module, AbstractCheapConv):
            hidden = (*hidden, f"{fqn}." if fqn else "")
        if is_convolution(module) and not has_op_for_kernel(module):
            names.setdefault(module, []).append(fqn)
    for module, fqns in names.items():
        yield module, tuple(fqns)
    for module, fqn in _unregistered(model, set(model.modules())):
        yield module, (fqn,)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of any kind, an op, or one that TorchScript has compiled."""
    if isinstance(module, torch.jit.ScriptModule):
        return bool(re.fullmatch(r"Conv(Transpose)?[123]d", str(module.original_name)))
    return isinstance(module, (AbstractCheapConv, _ConvNd))


def _unregistered(model: nn.Module, known: set[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Yield convolutions that only a plain list, tuple or dict of the model holds."""
    for owner, module in model.named_modules():
        if isinstance(module, AbstractCheapConv):
            continue
        for name, value in vars(module).items():
            if name not in _REGISTRIES and _may_hold(value, nn.Module):
                for path, leaf in named_leaves(value):
                    if not isinstance(leaf, nn.Module) or leaf in known:
                        continue
                    for inner, part in leaf.named_modules():
                        is_new = part not in known
                        known.add(part)
                        if is_new and is_convolution(part):
                            where = f"{owner}.{name}{path}".lstrip(".")
                            yield part, f"{where}.{inner}".rstrip(".")


def _may_hold(value: Any, kind: type) -> bool:
    """Whether an attribute is a container of more than numbers: cheap, since every kernel size is a tuple."""
    if not isinstance(value, (list, tuple, dict)):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return any(isinstance(part, (kind, list, tuple, dict)) for part in parts)


def describe(
    module: nn.Module,
    fqns: tuple[str, ...],
    tied: dict[int, str],
    *,
    registered: bool = True,
    donor: Donor | str | None = None,
) -> Site:
    """Return the site of one convolution as far as the module itself tells it.

    Args:
        registered: whether the model has it as a submodule, and not only in a plain list.
        donor: what `find_donor` returned for it, where that is known.
    """
    if isinstance(module, AbstractCheapConv):
        return Site(fqns, type(module).__name__, module.spec, op=module.name, options=dict(module.options))
    donor = donor or find_donor(module)
    if isinstance(donor, str):
        known = isinstance(module, nn.Conv2d) and not any(is_lazy(p) for p in module.parameters())
        spec = stated_geometry(module) if known else None  # type: ignore[arg-type]
        return Site(fqns, type_name(module), spec, obstacle=donor)
    if donor.inside:
        fqns = tuple(f"{fqn}.weight".lstrip(".") for fqn in fqns)
    obstacle = _tie(module, tied)
    if obstacle is None and not registered:
        obstacle = (
            "only a plain list or dict holds it, so its weights are in no state dict; "
            "hold it in an nn.ModuleList or nn.ModuleDict"
        )
    return Site(fqns, type_name(module), donor.spec, obstacle=obstacle, note=donor.note)


def find_module(model: nn.Module, site: Site) -> nn.Module:
    """Return the module that a site is, or the one that owns the kernel of a functional convolution."""
    for module, fqns in walk(model):
        if fqns[0] in (site.fqns[0], site.fqns[0].removesuffix("weight").rstrip(".")):
            return module
    owner = site.fqns[0].rpartition(".")[0]
    return model.get_submodule(owner) if "(" not in owner else model


def shared_weights(model: nn.Module) -> dict[int, str]:
    """Map the id of every weight tensor that two modules own, or that overlaps with another, to all the names."""
    owners: dict[int, list[str]] = {}
    for fqn, module in model.named_modules():
        # one parametrization may be inside of two convolutions
        for name, parameter in module.named_parameters(recurse=isinstance(module, _ConvNd)):
            names = owners.setdefault(id(parameter), [])
            if (full := f"{fqn}.{name}".lstrip(".")) not in names:
                names.append(full)
    for group in sharing_storage(model):
        for one, other in itertools.combinations(group, 2):
            if one is not other and _overlap(one, other):
                both = [*owners[id(one)], *(name for name in owners[id(other)] if name not in owners[id(one)])]
                owners[id(one)] = owners[id(other)] = both
    by_storage = {p.untyped_storage()._cdata: p for p in model.parameters() if _has_storage(p)}
    for name, view in _plain_tensors(model):
        parameter = by_storage.get(view.untyped_storage()._cdata)
        if parameter is not None and name not in owners[id(parameter)]:
            owners[id(parameter)] = [*owners[id(parameter)], name]
    return {key: " and ".join(fqns) for key, fqns in owners.items() if len(fqns) > 1}


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not is_lazy(tensor) and tensor.numel() > 0


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers and tensors in plain attributes, but for a `weight` that a hook writes beside its own parameter."""
    for fqn, module in model.named_modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if name in _REGISTRIES or (name in ("weight", "bias") and f"{name}_orig" in module._parameters):
                continue
            leaves = named_leaves(value) if _may_hold(value, Tensor) else [("", value)]
            for path, leaf in leaves:
                if isinstance(leaf, Tensor) and _has_storage(leaf):
                    yield f"{fqn}.{name}{path}".lstrip("."), leaf


def _overlap(one: Tensor, other: Tensor) -> bool:
    (first, last), (start, end) = _extent(one), _extent(other)
    return first <= end and start <= last


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the places of the first and the last number in the storage."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start, start + int(reach)


def _tie(module: nn.Module, tied: dict[int, str]) -> str | None:
    for name, parameter in module.named_parameters():
        if id(parameter) in tied:
            return f"its {name} is tied, and stays so: {tied[id(parameter)]} share memory"
    return None
