"""What every cheap convolution is: the contract, and the parts of it that are written once."""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from convsurgeon.errors import UnsupportedConvError
from convsurgeon.ops._kernel_attributes import KernelAttributes
from convsurgeon.ops._kernel_view import view_kernel
from convsurgeon.ops._kernel_write import take_bias
from convsurgeon.ops._ranks import is_share_of_energy
from convsurgeon.ops._same_padding import SamePadding
from convsurgeon.options import parse_options
from convsurgeon.spec import ConvSpec, Pair

_CONV2D_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class AbstractCheapConv(KernelAttributes, ABC):
    """A cheap stand-in for one dense `nn.Conv2d`, linear in its input.

    A subclass is final. It says how it is built, what it costs, why it cannot replace a given
    convolution, and how it starts from the dense kernel; `from_conv` is written here, once.

    Hooks with a default that a subclass may replace: `fit_options`, `one_hot_macs`, `is_closest`, `is_exact`,
    `choose_by_data`, `freeze_for_export`. Everything else that is implemented here stays as it is.
    `convsurgeon.testing` holds the laws.
    """

    name: ClassVar[str]
    """The file's name, and what follows `--to`."""
    summary: ClassVar[str]
    """One line: the structure."""
    reference: ClassVar[str]
    """The paper: authors, year, arXiv id."""
    cost: ClassVar[str] = "not said"
    """MACs of an image and weights; `I` and `O` are channels, `K` kernel positions, `H x W` and `P x Q` the sizes of
    input and output."""
    keeps: ClassVar[str] = "not said"
    """What the start keeps of a trained kernel."""
    slow: ClassVar[str] = "not said"
    """Where it is slower than its MACs say."""
    last: ClassVar[str]
    """The submodule that carries the bias; its output is the op's output, or one of those that are added up to it."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """No options. A subclass may put a frozen dataclass with defaults in this place."""

    def __init__(self, spec: ConvSpec, options: Any) -> None:
        super().__init__()
        self.in_channels = spec.in_channels
        self.out_channels = spec.out_channels
        self.kernel_size = spec.kernel_size
        self.stride = spec.stride
        self.padding = spec.padding
        self.dilation = spec.dilation
        self.groups = spec.groups
        self.padding_mode = spec.padding_mode
        self.transposed = False
        self.output_padding = (0, 0)
        # plain data: a pickled op must not need a class that is no module
        self.options: dict[str, Any] = dataclasses.asdict(options)

    @classmethod
    @abstractmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Return the sentence why this op cannot replace such a convolution, or None."""

    @classmethod
    @abstractmethod
    def macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return multiply-adds for one image of that input size, as `ConvSpec.macs` counts them."""

    @abstractmethod
    def init_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fit the parameters to a dense kernel `(O, I, kh, kw)` and take over its bias `(O,)`."""

    @abstractmethod
    def as_dense(self) -> Tensor:
        """Return the dense kernel `(O, I, kh, kw)` this op equals now, differentiably."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`, the size the dense convolution would give."""

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Return the options that fit this convolution best; by default as given.

        Args:
            weight: the dense kernel `(O, I, kh, kw)`, where it is known: a rank may be a share of its energy.
        """
        return options

    @classmethod
    def one_hot_macs(cls, spec: ConvSpec, height: int, width: int, options: Any = None) -> int:
        """Return the multiply-adds a counter sees in frozen one-hot kernels, which only move data."""
        return 0

    @classmethod
    def is_closest(cls, options: Any) -> bool:
        """Whether `init_from` finds the closest kernel of all (Frobenius norm), not only closer than near ones.

        Either way a kernel that the op can represent is reproduced exactly, unless `is_exact` says otherwise. Where
        this is False, the docstring of `init_from` says what is found instead.
        """
        return True

    @classmethod
    def is_exact(cls, spec: ConvSpec, options: Any) -> bool:
        """Whether `init_from` reproduces every kernel that the op can represent exactly, not only most of it."""
        return True

    def choose_by_data(self, gram: Tensor, cross: Tensor) -> None:
        """Choose what no gradient reaches, such as whole shifts, by data instead of by the kernel, in place.

        `calibrate` calls it before it fits the parameters. A hook; nothing by default.

        Args:
            gram: second moments ``sum x xᵀ`` `(F, F)` of the patches that the op reads, `F = I * kh * kw`, float64.
            cross: ``sum y xᵀ`` `(O, F)` with the outputs wanted of it, less the bias.
        """
        return

    def freeze_for_export(self) -> str | None:
        """Take the form that is delivered, in place; return what that changed as a sentence, or None.

        `delivery.export` calls it on its copy of a student, before it traces.
        """
        return None

    @property
    def bias(self) -> Tensor | None:
        """The bias `(O,)`, as a dense convolution has it."""
        bias: Tensor | None = getattr(self, self.last).bias
        return bias

    @bias.setter
    def bias(self, bias: Tensor | None) -> None:
        take_bias(self, bias)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the image as `input`, too: so is it called in `nn.Conv2d`."""
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        return super().__call__(*args, **kwargs)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Do what `nn.Conv2d.forward(op, x)` asks for; whoever changes the weight first has read it, and is kept."""
        out: Tensor = self(input)
        return out

    @property
    def spec(self) -> ConvSpec:
        """The geometry of the convolution this op stands in for."""
        return ConvSpec.from_conv(typing.cast(nn.Conv2d, self))

    @classmethod
    @final
    def parse_options(cls, options: Any = None) -> Any:
        """Turn None, a mapping of names to values or strings, or an `Options` into an `Options`.

        Raises:
            OptionError: for an unknown name or a value of the wrong type.
        """
        return parse_options(cls.Options, options, owner=cls.name)

    @classmethod
    @final
    def depends_on_weight(cls, options: Any) -> bool:
        """Whether what the options come to depends on the dense kernel: one is a share of its energy."""
        return any(is_share_of_energy(value) for value in dataclasses.asdict(options).values())

    @classmethod
    @final
    def build(
        cls,
        spec: ConvSpec,
        options: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
    ) -> Self:
        """Return a fresh op with torch's own random initialisation.

        Args:
            weight: the dense kernel `(O, I, kh, kw)` that a rank given as a share of energy is taken from.

        Raises:
            UnsupportedConvError: with the sentence of `why_not`.
        """
        known = None if weight is None or weight.is_meta else weight
        options = cls.fit_options(spec, cls.parse_options(options), known)
        if reason := cls.why_not(spec, options):
            raise UnsupportedConvError(f"{cls.name}: {reason} ({spec})")
        with torch.device(device or torch.get_default_device()):
            op = cls(replace(spec, padding=(0, 0)) if spec.pads_by_size else spec, options)
        if spec.pads_by_size:
            op.padding = spec.padding
            op.register_forward_pre_hook(SamePadding(spec))
        return op.to(dtype=dtype or torch.get_default_dtype())

    @classmethod
    @final
    def from_conv(cls, conv: nn.Conv2d, options: Any = None, *, initialize: bool = True) -> Self:
        """Return an op that stands in for `conv`: its device, dtype, memory format, mode and frozen state.

        With `initialize=False` the parameters are left as they come from memory, for weights that follow.

        Raises:
            UnsupportedConvError: with the sentence of `why_not`.
            OptionError: for options this op does not have.
        """
        weight, bias = conv.weight.detach(), conv.bias
        with _Uninitialized():
            op = cls.build(ConvSpec.from_conv(conv), options, device="meta", dtype=weight.dtype, weight=weight)
        op.to_empty(device=weight.device)
        if initialize and not weight.is_meta:
            with torch.no_grad():
                op.init_from(weight, None if bias is None else bias.detach())
        if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
            op.to(memory_format=torch.channels_last)
        for parameter in op.parameters():
            parameter.requires_grad_(conv.weight.requires_grad)
        if op.bias is not None and bias is not None:
            op.bias.requires_grad_(bias.requires_grad)
        return op.train(conv.training)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stand in for a weight: `torch.conv2d(x, op, bias, ...)` runs the op, all else sees its dense kernel.

        This is how functional convolutions are rewritten: the op takes the place of the parameter, and the
        model's own forward, whatever it does, stays as it is.
        """
        call = dict(zip(_CONV2D_ARGUMENTS, args, strict=False)) | (kwargs or {})
        op = call.get("weight")
        if func is torch.conv2d and isinstance(op, AbstractCheapConv) and op._is_called_as_donor(call):
            out: Tensor = op(call["input"])
            bias = call.get("bias")
            return out if bias is None else out + bias.view(-1, 1, 1)
        dense_args, dense_kwargs = pytree.tree_map_only(AbstractCheapConv, view_kernel, (args, kwargs))
        return func(*dense_args, **(dense_kwargs or {}))

    def _is_called_as_donor(self, call: dict[str, Any]) -> bool:
        spec = ConvSpec.from_call(self.in_channels, self.out_channels, self.kernel_size, call)
        return spec == replace(self.spec, bias=spec.bias)

    @final
    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        """Be an attribute in a graph, as the parameter was that this op stands for."""
        name = next(name for name, module in tracer.root.named_modules() if module is self)
        return tracer.create_node("get_attr", name, (), {})

    def extra_repr(self) -> str:
        """Say the geometry and the options, as `print(model)` shows them."""
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{self.spec}{options}"


class _Uninitialized(TorchFunctionMode):
    """Leaves out random initialisation while it is entered: what follows overwrites it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def dense_only(spec: ConvSpec) -> str | None:
    """Return why a convolution is not a dense one with a spatial kernel, or None.

    What all ops need that factor a kernel into a spatial and a pointwise part.
    """
    if spec.groups == 1 and spec.is_pointwise:
        return "needs a spatial kernel, not 1x1"
    return ungrouped_only(spec)


def ungrouped_only(spec: ConvSpec) -> str | None:
    """Return why a convolution is not one without groups, of any kernel, that pads as torch does, or None."""
    if spec.groups != 1:
        return f"needs groups=1, not groups={spec.groups}"
    if spec.padding_mode not in PADDING_MODES:
        return f"needs a padding mode among {', '.join(PADDING_MODES)}, not {spec.padding_mode!r}"
    return None


def as_padding(padding: Pair | str) -> Any:
    """Return padding as `nn.Conv2d`'s annotation wants it."""
    return padding
