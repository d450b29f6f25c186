"""What an op is started from: a plain convolution that computes what the model's own does.

An exact `nn.Conv2d` is its own donor. For a subclass, a replaced forward, a parametrized or pruned
weight, a probe decides: a copy of the module is run alone on images of several sizes, in both modes,
and what it hands to `torch.conv2d` is compared. So a class is known by what it does, not by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from convsurgeon.errors import SurveyError, one_line
from convsurgeon.ops import AbstractCheapConv, SamePadding
from convsurgeon.spec import ConvSpec, as_pair
from convsurgeon.surgery._calls import CONVOLUTIONS, NOT_UNDERSTOOD, Call, Recorder, Watch, spec_of
from convsurgeon.surgery._copies import call, copy_module, in_mode
from convsurgeon.surgery._weights import WEIGHT_WRITERS, describe_kernel, describe_writers, type_name

_GEOMETRY = ("kernel_size", "stride", "dilation", "groups", "in_channels", "out_channels")


@dataclass(frozen=True)
class Donor:
    """A plain convolution that equals a module of the model, or the functional one inside it.

    Args:
        conv: the plain convolution; its weight is the model's own where that is used as it is.
        spec: its geometry.
        note: how it came to be, where it is not the module itself.
        inside: whether only the functional convolution in the module's forward is replaced, since
            the module does more than that.
        dropped: names of what went into the weight, and goes with it.
    """

    conv: nn.Conv2d
    spec: ConvSpec
    note: str | None = None
    inside: bool = False
    dropped: frozenset[str] = frozenset()


def find_donor(module: nn.Module) -> Donor | str:
    """Return the donor of a convolution module, or the sentence why there is none."""
    name = type_name(module)
    if isinstance(module, torch.jit.ScriptModule):
        return f"it is a {module.original_name} compiled by TorchScript; convert the model before it is scripted"
    if not isinstance(module, nn.Conv2d):
        return f"{name} is not a Conv2d"
    if type(module).__hash__ is not nn.Module.__hash__:
        return f"{name} compares by value (__eq__), so that its instances cannot be told apart"
    if has_op_for_kernel(module):
        return "its kernel is a cheap convolution already"
    if any(is_lazy(tensor) for tensor in module.parameters()):
        return "it is lazy and has no weights yet; run the model once first"
    if any(tensor.is_complex() for tensor in module.parameters()):
        return "its weight is complex"
    spec = stated_geometry(module)
    if spec is None:
        stated = ", ".join(f"{field}={getattr(module, field, None)!r}" for field in _GEOMETRY)
        return f"its geometry cannot be read: {' '.join(stated.split())}; give whole numbers or pairs of them"
    if is_plain(module):
        return _ill_formed(module, spec) or Donor(module, spec)
    try:
        return _probe(module, spec)
    except _Refusal as refusal:
        return str(refusal)


def stated_geometry(module: nn.Conv2d) -> ConvSpec | None:
    """Return what a convolution's attributes say of it, in one form, or None if they say nothing that torch takes."""
    try:
        return ConvSpec.from_conv(module)
    except (AttributeError, IndexError, TypeError, ValueError):
        return None


def has_op_for_kernel(module: nn.Module) -> bool:
    """Whether an op stands where a convolution had its kernel."""
    return "weight" in module._modules and isinstance(module._modules["weight"], AbstractCheapConv)


def _ill_formed(module: nn.Conv2d, spec: ConvSpec) -> str | None:
    """Return what is wrong with the weight of a plain convolution, as after pruning by hand, or None."""
    weight = module._parameters["weight"]
    if weight is None:
        return "it has no weight"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, no floating-point tensor"
    expected = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel_size)
    if tuple(weight.shape) != expected:
        have, want = ("x".join(map(str, shape)) for shape in (weight.shape, expected))
        return f"its weight is {have}, and its attributes say {want}; set them as the weight is"
    return None


def is_plain(module: nn.Conv2d) -> bool:
    """Whether a module is a Conv2d whose forward, weight and bias are `nn.Conv2d`'s own."""
    methods = ("forward", "_conv_forward", "__call__")
    own = all(getattr(type(module), name) is getattr(nn.Conv2d, name) for name in methods)
    untouched = "forward" not in vars(module) and "_conv_forward" not in vars(module)
    return own and untouched and all(name in module._parameters for name in ("weight", "bias"))


class _Refusal(Exception):  # noqa: N818  it says no, it is no failure
    """Why a module is no plain convolution."""


def _probe(module: nn.Conv2d, stated: ConvSpec) -> Donor:
    how = describe_writers(module)
    what = f"{type_name(module)} is a subclass of Conv2d that"
    if type(module) is nn.Conv2d or parametrize.is_parametrized(module) or how:
        what = "it"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        what = "its forward was replaced by one that"
    copied = _bare_copy(module)
    before = {name: tensor.detach().clone() for name, tensor in copied.named_parameters()}
    runs = [(x, *_run(in_mode(copied, training=False), x, what)) for x in _images(module, stated)]
    weight = runs[0][1].arguments["weight"]
    bias = runs[0][1].arguments.get("bias")
    if any(not _same(made.arguments["weight"], weight) for _, made, _ in runs):
        raise _Refusal(f"{what} computes its kernel from its input")
    if any(not _same(made.arguments.get("bias"), bias) for _, made, _ in runs):
        raise _Refusal(f"{what} computes its bias from its input")
    _, trained, _ = train_run = (runs[0][0], *_run(in_mode(copied, training=True), runs[0][0], what))
    # power iterations go on in training, and the weight stays what it is for all that
    if "SpectralNorm" not in (how or "") and not _same(trained.arguments["weight"], weight):
        raise _Refusal(f"{what} changes its kernel in training")
    if any(not torch.equal(tensor, before[name]) for name, tensor in copied.named_parameters()):
        raise _Refusal(f"{what} writes to its weight when it runs")
    direct = weight is copied._parameters.get("weight")
    if direct:
        runs += _with_other_parameters(copied, runs[0][0], what)
    padding = _padding(module, [*runs, train_run])
    if padding is None or any(not _same(made.output, out) for _, made, out in (*runs, train_run)):
        if not direct:
            raise _Refusal(f"{what} does more than one convolution with a kernel that it computes")
        return _inside(module, copied, [*runs, train_run], what)
    spec = _spec(runs[0][1], padding)
    for name in _GEOMETRY:
        if getattr(spec, name) != getattr(stated, name):
            raise _Refusal(f"{what} computes with {name}={getattr(spec, name)}, and says {getattr(stated, name)}")
    if not direct and not how:
        how = f"started from {describe_kernel(weight, copied)}"
    notes = [note for note in (how, "pads as TensorFlow does" if spec.pads_by_size else None) if note]
    own_bias = bias is copied._parameters.get("bias")
    own_weight = _as_parameter(module.weight if direct else weight, module, "weight")
    found_bias = module.bias if own_bias else bias
    bias_of_its_own = None if found_bias is None else _as_parameter(found_bias, module, "bias")
    conv = plain_convolution(spec, own_weight, bias_of_its_own, training=module.training)
    dropped = {"forward", "_conv_forward", *(() if direct and own_bias else _ingredients(module))}
    return Donor(conv, spec, "; ".join(notes) or None, dropped=frozenset(dropped))


def _with_other_parameters(copied: nn.Conv2d, x: Tensor, what: str) -> list[tuple[Tensor, Call, Tensor]]:
    """Run once more with all but weight and bias changed: a gain that starts at one is none for now only."""
    others = [p for name, p in copied.named_parameters() if name not in ("weight", "bias") and p.is_floating_point()]
    if not others:
        return []
    with torch.no_grad():
        for parameter in others:
            parameter.add_(0.25)
    return [(x, *_run(in_mode(copied, training=False), x, what))]


def _run(module: nn.Module, x: Tensor, what: str) -> tuple[Call, Tensor]:
    """Run a module alone and return its one convolution and its output."""
    recorder = Recorder()
    try:
        out = call(module, x, recorder)
    except Exception as error:
        raise _Refusal(f"{what} fails when it is run alone: {one_line(error)}") from error
    if len(recorder.calls) != 1:
        raise _Refusal(f"{what} runs {len(recorder.calls)} convolutions, not one")
    made = recorder.calls[0]
    weight = made.arguments["weight"]
    if CONVOLUTIONS[made.function] == "convolution":
        raise _Refusal(f"{what} calls torch.convolution, which is not understood; call torch.conv2d")
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        raise _Refusal(f"{what} is no 2-d convolution")
    if not isinstance(out, Tensor):
        raise _Refusal(f"{what} returns a {type(out).__name__}, and an op returns a tensor")
    return made, out


def _inside(module: nn.Conv2d, copied: nn.Conv2d, runs: Sequence[tuple[Tensor, Call, Tensor]], what: str) -> Donor:
    """Return the convolution in a module that does more: its weight is used there as it is, and nowhere else."""
    weight = copied.weight
    if any(made.function is not torch.conv2d for _, made, _ in runs):
        raise _Refusal(f"{what} does more than one convolution, and {NOT_UNDERSTOOD}")
    for training in (False, True):
        watch = Watch({id(weight): weight}, set(copied.modules()))
        call(in_mode(copied, training=training), runs[0][0], watch)
        if watch.others:
            raise _Refusal(f"{what} also uses its weight in {watch.others[0].function}")
    specs = {spec_of(made.arguments["weight"].shape, made.arguments)[0] for _, made, _ in runs}
    spec = specs.pop()
    if specs or spec is None:
        raise _Refusal(f"{what} computes its geometry from its input")
    note = f"inside the forward of {type_name(module)}, which stays"
    conv = plain_convolution(spec, module.weight, training=module.training)
    return Donor(conv, spec, note, inside=True)


def _padding(module: nn.Conv2d, runs: Sequence[tuple[Tensor, Call, Tensor]]) -> tuple[Any, str] | None:
    """Return the padding (and its mode) that explains what each run handed to the convolution, or None."""
    first = runs[0][1]
    of_call = first.arguments.get("padding", 0)

    def explains(pad: Callable[[Tensor], Tensor]) -> bool:
        return all(_same(pad(x), made.arguments["input"]) for x, made, _ in runs)

    if explains(lambda x: x):
        return of_call, "zeros"
    if of_call != "valid" and (isinstance(of_call, str) or as_pair(of_call) != (0, 0)):
        return None
    sides = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros" and explains(lambda x: nn.functional.pad(x, sides, mode=module.padding_mode)):
        return module.padding, module.padding_mode
    if explains(SamePadding(_spec(first, ("same", "zeros"))).pad):
        return "same", "zeros"
    return None


def _spec(made: Call, padding: tuple[Any, str]) -> ConvSpec:
    weight = made.arguments["weight"]
    groups = int(made.arguments.get("groups", 1))
    found = ConvSpec.from_call(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        {**made.arguments, "padding": padding[0]},
    )
    return found if padding[1] == "zeros" else ConvSpec(**{**vars(found), "padding_mode": padding[1]})


def plain_convolution(spec: ConvSpec, weight: Tensor, bias: Tensor | None = None, *, training: bool) -> nn.Conv2d:
    """Return a plain convolution of that geometry around the given tensors; what is no parameter becomes a frozen one.

    Padding that depends on the input's size, which torch's own does not offer, stands in the attribute only.
    """
    fields = {**vars(spec), "bias": False, "padding": 0 if spec.pads_by_size else spec.padding}
    conv = nn.Conv2d(**fields, device="meta")
    conv.padding = spec.padding
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(conv, name, tensor)
    return conv.train(training)


def _as_parameter(tensor: Tensor, module: nn.Module, name: str) -> nn.Parameter:
    """Return what was computed from a module's parameters as one, trained if those of that name are."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    mine = [p for fqn, p in module.named_parameters() if ("bias" in fqn) == (name == "bias")]
    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else tensor.device
    return nn.Parameter(tensor.detach().to(device), requires_grad=any(p.requires_grad for p in mine))


def _bare_copy(module: nn.Conv2d) -> nn.Conv2d:
    """Return a copy to run alone: without the user's hooks, on a device that computes."""
    try:
        copied = copy_module(module)
    except SurveyError as error:
        raise _Refusal(str(error)) from error
    assert isinstance(copied, nn.Conv2d)
    for part in copied.modules():
        part._forward_hooks.clear()
        for key, hook in list(part._forward_pre_hooks.items()):
            if not isinstance(hook, WEIGHT_WRITERS):
                del part._forward_pre_hooks[key]
    if any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers())):
        copied.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(generator=generator)
    return copied


def _images(module: nn.Conv2d, stated: ConvSpec) -> Iterator[Tensor]:
    """Yield images of sizes that differ in what a stride leaves over."""
    generator = torch.Generator().manual_seed(0)
    tensors = (*module.parameters(), *module.buffers())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
    reach = [d * (k - 1) + 1 for d, k in zip(stated.dilation, stated.kernel_size, strict=True)]
    pads = max(module._reversed_padding_repeated_twice, default=0) if module.padding_mode != "zeros" else 0
    for extra in (2, 3, 5):
        height, width = (r + pads + s + extra for r, s in zip(reach, stated.stride, strict=True))
        x = torch.randn(2, module.in_channels, height, width + 1, generator=generator)
        yield x.to(dtype=first.dtype, device="cpu" if first.is_meta else first.device)


def _ingredients(module: nn.Conv2d) -> set[str]:
    """Return the names of all that a module keeps besides weight and bias: it went into the weight."""
    kept = {*module._parameters, *module._buffers, *module._modules}
    return (kept | {"weight", "bias"}) if kept else set()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b
