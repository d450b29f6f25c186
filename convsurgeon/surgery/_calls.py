"""Functional convolutions: what a run shows of them, and of who else touches a kernel."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from convsurgeon.ops import TENSOR_METADATA, AbstractCheapConv
from convsurgeon.spec import ConvSpec, Pair

CONVOLUTIONS = {
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    torch.conv_transpose1d: "conv_transpose1d",
    torch.conv_transpose2d: "conv_transpose2d",
    torch.conv_transpose3d: "conv_transpose3d",
    torch.convolution: "convolution",
}
for _name in tuple(CONVOLUTIONS.values()):
    _packet = getattr(torch.ops.aten, _name)
    CONVOLUTIONS |= {_packet: _name, **{getattr(_packet, overload): _name for overload in _packet.overloads()}}
NOT_UNDERSTOOD = "torch.ops.aten.conv2d is not understood; call torch.conv2d"
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# what an op answers, too, where it stands for a kernel
METHODS = {name for name in TENSOR_METADATA if callable(getattr(Tensor, name))}
PROPERTIES = TENSOR_METADATA - METHODS
# the folders of torch and of this package: a line there is not the caller's
_LIBRARY = tuple(os.path.dirname(file) + os.sep for file in (str(torch.__file__), os.path.dirname(__file__)))


@dataclass(frozen=True)
class Use:
    """One use of a tensor that a model owns: a functional convolution with it, or something else.

    Args:
        function: what was called.
        owner: the module whose forward called it, or None.
        where: file and line of the call, such as `nets.py:31`.
        tensor: the kernel, where it is one of the watched tensors.
        spec: the geometry of a 2-d convolution, or None.
        problem: why it cannot be rewritten, or None.
        input_size: height and width of the input, or None.
    """

    function: str
    owner: nn.Module | None
    where: str
    tensor: Tensor | None = None
    spec: ConvSpec | None = None
    problem: str | None = None
    input_size: Pair | None = None
    is_convolution: bool = True


@dataclass
class Call:
    """The arguments of one functional convolution by their names, and what came out."""

    arguments: Mapping[str, Any]
    output: Tensor
    function: Any = torch.conv2d


@dataclass
class Watch(TorchFunctionMode):
    """Notes every functional convolution, and every other use of the watched tensors, while it is entered.

    Looking at a tensor's shape, dtype or device is no use.

    Args:
        watched: the tensors, by their ids.
        known: the modules of the model; others are held where no walk finds them.
    """

    watched: Mapping[int, Tensor]
    known: Container[nn.Module]
    convolutions: list[Use] = field(default_factory=list)
    others: list[Use] = field(default_factory=list)
    on_convolution: Callable[[Use], None] = lambda use: None

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kernel = None
        if func in CONVOLUTIONS:
            arguments = bind(args, kwargs)
            kernel = arguments.get("weight")
            if isinstance(kernel, Tensor):  # else an op stands there
                self.convolutions.append(self._describe(func, arguments))
                self.on_convolution(self.convolutions[-1])
        for tensor in _arguments(args, kwargs):
            if id(tensor) in self.watched and tensor is not kernel and not is_metadata(func):
                found = caller(self.known)
                self.others.append(Use(name_of(func), found.owner, found.where, tensor, is_convolution=False))
        return func(*args, **kwargs)

    def _describe(self, func: Any, arguments: Mapping[str, Any]) -> Use:
        found = caller(self.known)
        weight, x = arguments["weight"], arguments["input"]
        tensor = self.watched.get(id(weight))
        if CONVOLUTIONS[func] != "conv2d":
            return Use(CONVOLUTIONS[func], found.owner, found.where, tensor)
        spec, problem = spec_of(weight.shape, arguments)
        size = (int(x.shape[-2]), int(x.shape[-1]))
        if found.in_autograd_function:
            problem = "it runs inside an autograd.Function, whose backward is not known"
        elif found.stray is not None:
            problem = f"a {type(found.stray).__name__} that is no submodule of the model; register it as one"
        elif tensor is None:
            problem = "its kernel is computed when it runs"
        elif func is not torch.conv2d:
            problem = NOT_UNDERSTOOD
        return Use("conv2d", found.owner, found.where, tensor, spec, problem, size)


class Strangers(TorchFunctionMode):
    """Notes whether anything is computed with one of the given tensors while it is entered.

    Args:
        names: the tensors' names, by their ids.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.met: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.met is None:
            for tensor in _arguments(args, kwargs):
                if id(tensor) in self.names and not is_metadata(func):
                    self.met = self.names[id(tensor)]
                    break
        return func(*args, **kwargs)


class Recorder(TorchFunctionMode):
    """Keeps the arguments and the output of every functional convolution, as they were at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS:
            arguments = bind(args, kwargs or {})
            # an activation in place would change both
            self.calls.append(Call({**arguments, "input": arguments["input"].clone()}, out.clone(), func))
        return out


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        yield from value if isinstance(value, (tuple, list)) else (value,)


def bind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a functional convolution by their names."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


def spec_of(shape: Any, arguments: Mapping[str, Any]) -> tuple[ConvSpec | None, str | None]:
    """Return the geometry of a call with a kernel `(O, I, kh, kw)`, or why it has none.

    The bias is not part of it: the call adds what it is given.
    """
    out_channels, per_group, height, width = (int(size) for size in shape)
    try:
        groups = int(arguments.get("groups", 1))
        spec = ConvSpec.from_call(per_group * groups, out_channels, (height, width), {**arguments, "bias": None})
    except (TypeError, ValueError):
        return None, "its geometry is computed when it runs"
    return spec, None


def is_metadata(func: Any) -> bool:
    """Whether a function only looks at what a tensor is, not at its values."""
    if getattr(func, "__name__", "") in METHODS:
        return True
    return any(func == getattr(Tensor, name).__get__ for name in PROPERTIES)


def name_of(func: Any) -> str:
    """Return what a person would call a torch function."""
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__"):  # of a property
        name = str(getattr(func.__self__, "__name__", func.__self__))
    return name.strip("_")


class Caller(NamedTuple):
    """Who runs: the module whose forward it is, the line outside of torch, and what stands between the two."""

    owner: nn.Module | None
    where: str
    in_autograd_function: bool
    stray: nn.Module | None


def caller(known: Container[nn.Module] | None = None) -> Caller:
    """Return who is running, as the frames of this thread tell.

    Args:
        known: the modules that may be the answer; the first other one on the way is the stray. None: all.
    """
    # not from here: the locals of a frame that hold the frame itself would keep every tensor on the way alive
    where = ""
    frame: types.FrameType | None = sys._getframe(1)
    owner: nn.Module | None = None
    in_function, stray = False, None
    while frame is not None and owner is None:
        code: types.CodeType = frame.f_code
        if not where and not code.co_filename.startswith(_LIBRARY):
            where = f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module) and (known is None or first in known):
            owner = first
        elif isinstance(first, nn.Module) and not isinstance(first, AbstractCheapConv):
            stray = stray or first
        in_function = in_function or isinstance(first, FunctionCtx)
        frame = frame.f_back
    return Caller(owner, where, in_function, stray)
