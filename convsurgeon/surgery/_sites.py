"""Sites: the convolutions a model owns, each once, with all its names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsurgeon import ops
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec, Pair

SUBCLASS = "is a subclass of Conv2d whose semantics are not known"


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
            return sum(op.macs(self.spec, *size, self.options) for size in self.input_sizes)
        return sum(self.spec.macs(*size) for size in self.input_sizes)


def walk(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Yield every convolution and op of a model once, with all its names, in module order.

    What is inside an op belongs to the op.
    """
    names: dict[nn.Module, list[str]] = {}
    hidden: tuple[str, ...] = ()
    for fqn, module in model.named_modules(remove_duplicate=False):
        if fqn.startswith(hidden):
            continue
        if isinstance(module, AbstractCheapConv):
            hidden = (*hidden, f"{fqn}." if fqn else "")
        if isinstance(module, (AbstractCheapConv, _ConvNd)):
            names.setdefault(module, []).append(fqn)
    for module, fqns in names.items():
        yield module, tuple(fqns)


def describe(module: nn.Module, fqns: tuple[str, ...], tied: dict[int, str]) -> Site:
    """Return the site of one convolution as far as the module itself tells it."""
    if isinstance(module, AbstractCheapConv):
        return Site(fqns, type(module).__name__, module.spec, op=module.name, options=dict(module.options))
    known = isinstance(module, nn.Conv2d) and not is_lazy(module.weight)
    spec = ConvSpec.from_conv(module) if known else None  # type: ignore[arg-type]
    return Site(fqns, _type_name(module), spec, obstacle=_obstacle(module, tied))


def shared_weights(model: nn.Module) -> dict[int, str]:
    """Map the id of every weight tensor that two modules own to the names of its owners."""
    owners: dict[int, list[str]] = {}
    for fqn, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{fqn}.{name}".lstrip("."))
    return {key: " and ".join(fqns) for key, fqns in owners.items() if len(fqns) > 1}


def _obstacle(module: nn.Module, tied: dict[int, str]) -> str | None:
    if not isinstance(module, nn.Conv2d):
        return f"{_type_name(module)} is not a Conv2d"
    if is_lazy(module.weight):
        return "it is lazy and has no weights yet; run the model once first"
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"its {name} is computed when it runs (pruning, weight norm); make it permanent first"
    for name in ("forward", "_conv_forward"):
        if getattr(type(module), name) is not getattr(nn.Conv2d, name):
            return f"{_type_name(module)} {SUBCLASS}"
        if name in vars(module):
            return f"its {name} was replaced, so its semantics are not known"
    if module.weight.is_complex():
        return f"its weight is complex ({module.weight.dtype})"
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is not None and id(parameter) in tied:
            return f"its {name} is tied: {tied[id(parameter)]} are one tensor"
    return None


def _type_name(module: nn.Module) -> str:
    cls = type(module)
    return cls.__name__ if cls.__module__.startswith("torch.nn.") else f"{cls.__module__}.{cls.__qualname__}"
