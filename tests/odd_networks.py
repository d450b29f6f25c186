"""Awkward networks, each tiny, with what is expected of each: how they are wired, fed, kept and wrapped.

What is awkward about a single convolution is in `odd_convolutions`; both enter their networks in `ODD`.
"""

from __future__ import annotations

import functools
import random
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convsurgeon as cs

T = TypeVar("T")
X = torch.linspace(-1, 1, 8 * 36).sin().reshape(1, 8, 6, 6)


@dataclass(frozen=True)
class Odd:
    """A network and what is expected.

    Args:
        make: builds it.
        converted: names of what is converted; several names of one are joined by ` = `.
        kept: name of what is kept, to a fragment of the reason.
        error: what `rewrite` raises, and a fragment of that.
        inputs: what the network takes.
    """

    make: Callable[[], nn.Module]
    converted: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    error: tuple[type[Exception], str] | None = None
    inputs: Any = X


ODD: dict[str, Odd] = {}


def odd(*converted: str, **expected: Any) -> Callable[[T], T]:
    """Enter a class without arguments, or a function that builds a network."""

    def enter(make: T) -> T:
        ODD[make.__name__] = Odd(make, converted, **expected)
        return make

    return enter


def conv(inputs: int = 8, outputs: int = 8, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **kwargs})


class One(nn.Module):
    """What most of them are made of: one convolution, called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


# objects under several names


@odd("one = two = in_a_list.0")
class SharedUnderThreeNamesAndInPlainContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = conv()
        self.two = self.one
        self.in_a_list = nn.ModuleList([self.one])
        self.plain = [self.one, {"again": self.one}]

    def forward(self, x: Tensor) -> Tensor:
        return self.plain[1]["again"](self.two(self.in_a_list[0](x)))


@odd("own", kept={"plain[0]": "only a plain list or dict holds it"})
class OnlyInAPlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = conv()
        self.plain = [conv()]

    def forward(self, x: Tensor) -> Tensor:
        return self.plain[0](self.own(x))


@odd("conv")
class UsedTwice(One):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(x)))


@odd("free", kept={"one": "one.weight and two.weight share memory", "two": "is tied, and stays so"})
class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free = conv(), conv(), conv()
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.two(self.one(x)))


@odd("blocks.branch[0]", "blocks.(left)")
class NamesWithBrackets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"branch[0]": conv(), "(left)": conv()})

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks["(left)"](self.blocks["branch[0]"](x))


@odd("weight", "bias.weight")
class ConvolutionsNamedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = conv()
        self.bias = nn.ModuleDict({"weight": conv()})

    def forward(self, x: Tensor) -> Tensor:
        return self.bias["weight"](self.weight(x))


@odd("child.conv")
class ParentAndChildKnowEachOther(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = One()
        self.child.family = {"parent": [self]}

    def forward(self, x: Tensor) -> Tensor:
        return self.child.family["parent"][0].child.conv(x)


@odd("inner.inner.conv", "inner.conv", "conv")
class ModelInsideAModelInsideAModel(One):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.inner = ModelInsideAModelInsideAModel(depth - 1) if depth else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.inner(x)) if isinstance(self.inner, One) else x


@odd("conv")
class BoundMethodKeptInAnAttribute(One):
    def __init__(self) -> None:
        super().__init__()
        self.run = self.conv.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@odd("conv")
class PartialOfAConvolution(One):
    def __init__(self) -> None:
        super().__init__()
        self.run = functools.partial(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


# state: frozen, hooked, typed, placed


@odd("conv", "partly")
class Frozen(One):
    def __init__(self) -> None:
        super().__init__()
        self.partly = conv()
        self.conv.requires_grad_(False)
        self.partly.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.partly(self.conv(x))


class Ears:
    """Hooks as bound methods, so that copying one copies what it belongs to."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def forward(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.heard.append("forward")
        return 2 * output

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0] + 1, *args[1:]), kwargs

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        self.heard.append("backward")


@odd("conv")
def hooks_that_change_what_goes_in_and_out() -> nn.Module:
    model = One()
    model.ears = Ears()
    model.conv.register_forward_hook(model.ears.forward)
    model.conv.register_forward_pre_hook(model.ears.pre, with_kwargs=True)
    model.conv.register_full_backward_hook(model.ears.backward)
    model.register_forward_hook(model.ears.forward)
    return model


@odd("conv", inputs=X.bfloat16())
def in_bfloat16() -> nn.Module:
    return One().bfloat16()


@odd("conv", inputs=X.half())
def in_float16() -> nn.Module:
    return One().half()


@odd("conv", inputs=X.double())
def in_float64() -> nn.Module:
    return One().double()


@odd("conv", "wide", "narrow")
class MixedDtypes(One):
    def __init__(self) -> None:
        super().__init__()
        self.wide = conv().double()
        self.narrow = conv().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(self.conv(x).double()).bfloat16()).float()


@odd("conv", inputs=X.to(memory_format=torch.channels_last))
def in_channels_last() -> nn.Module:
    return One().to(memory_format=torch.channels_last)


@odd("conv", inputs=X.to("meta"))
def on_the_meta_device() -> nn.Module:
    return One().to("meta")


@odd("conv", kept={"late": "it is lazy and has no weights yet; run the model once first"})
class WithALazyOne(One):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.LazyConv2d(8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.conv(x))


@odd("conv", "other")
class ModesOfTheirOwn(One):
    def __init__(self) -> None:
        super().__init__()
        self.other = conv()
        self.norm = nn.BatchNorm2d(8).eval()
        self.other.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.conv(x)))


# what forward does


@odd("other", kept={"conv": "its weight is read by the forward of (root) in mean"})
class ReadsTheWeight(One):
    def __init__(self) -> None:
        super().__init__()
        self.other = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x)) * self.conv.weight.mean()


@odd("other", kept={"conv": "its weight is read by the forward of (root)"})
class ReadsTheWeightByItsNameInTheState(ReadsTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x)) * dict(self.named_parameters())["conv.weight"].mean()


@odd("conv")
class ReadsTheGeometry(One):
    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.weight.shape[0] == self.conv.out_channels
        scale = self.conv.stride[0] * self.conv.kernel_size[1] / self.conv.in_channels
        return self.conv(x) * scale + self.conv.bias.view(1, self.conv.out_channels, 1, 1)


@odd("up", "down")
class ControlFlowOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if x.sum() > 0 else self.down(x)


@odd("conv", "aux")
class AnotherOutputInTraining(One):
    def __init__(self) -> None:
        super().__init__()
        self.aux = conv(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return {"out": x, "aux": self.aux(x)} if self.training else x


@odd("conv")
class DrawsCountsAndWrites(One):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        noise = random.random() + np.random.rand() + torch.rand(1)
        return self.conv(x.mul_(2) + noise)


@odd("conv", "other")
class Checkpointed(One):
    def __init__(self) -> None:
        super().__init__()
        self.other = conv()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.other, self.conv(x), use_reentrant=False)


@odd("layers.0", "layers.2")
class SlicesItsLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(), nn.ReLU(), conv(), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2:](self.layers[:2](x))


class Answer(NamedTuple):
    logits: Tensor
    nothing: None


# what goes in and out


@odd("conv", inputs=(X, torch.ones(()), [X, X]))
class SeveralInputs(One):
    def forward(self, x: Tensor, scale: Tensor, more: list[Tensor]) -> Tensor:
        return self.conv(x) * scale + self.conv(more[1])


@odd("conv", inputs=({"image": X, "mask": X > 0},))
class DictInputAndDictOutput(One):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"features": [self.conv(batch["image"])], "mask": batch["mask"]}


@odd("conv", inputs={"x": X, "shift": torch.ones(())})
class KeywordInputs(One):
    def forward(self, x: Tensor, scale: float = 2.0, *, shift: Tensor | None = None) -> Tensor:
        return self.conv(input=x) * scale + (0 if shift is None else shift)


@odd("conv")
class NamedTupleOutput(One):
    def forward(self, x: Tensor) -> Answer:
        return Answer(self.conv(x), None)


@dataclass
class Reply:
    logits: Tensor
    parts: tuple[Tensor, ...]


@odd("conv")
class DataclassOutput(One):
    def forward(self, x: Tensor) -> Reply:
        x = self.conv(x)
        return Reply(x.mean((2, 3)), (x, x[:, :1]))


@odd("conv")
class SizesThatDependOnTheData(One):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x[x > 0.1]


# what is wrapped round


@odd("module.conv")
def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(One(), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))


@odd("module.conv")
def data_parallel() -> nn.Module:
    return nn.DataParallel(One())


@odd("conv")
def a_graph_module() -> nn.Module:
    return torch.fx.symbolic_trace(One())


@odd("conv")
def a_forward_put_on_the_instance() -> nn.Module:
    model = One()
    model.forward = functools.partial(One.forward, model)
    return model


@odd("")
def the_root_is_the_convolution() -> nn.Module:
    return conv()


# nothing to convert


@odd(error=(cs.errors.NothingToConvertError, "Sequential has no convolution; there is nothing to convert"))
def no_convolution_at_all() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8))


@odd(
    error=(cs.errors.NothingToConvertError, "0 of 3 convolutions of Sequential can become 'depthwise': 1 is 1x1"),
)
def only_cheap_ones() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1), conv(groups=2), conv(groups=8))


@odd(error=(cs.errors.NothingToConvertError, "0 of 1 convolutions of LazyConv2d"))
def a_lazy_root() -> nn.Module:
    return nn.LazyConv2d(8, 3)


@odd(error=(cs.errors.SurveyError, "Uncopyable cannot be copied"))
class Uncopyable(One):
    def __init__(self) -> None:
        super().__init__()
        self.stream = (i for i in range(3))


@odd(error=(cs.errors.SurveyError, "One itself fails on the example input 1x3x6x6"), inputs=X[:, :3])
def an_input_that_does_not_fit() -> nn.Module:
    return One()


# what a deep copy cannot follow, or what TorchScript and torch.compile have hold of


def by_torchscript(compile: Callable[..., nn.Module], *args: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return compile(*args)


class TwoConvolutions(One):
    def __init__(self) -> None:
        super().__init__()
        self.other = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x))


@odd(error=(cs.errors.GuardError, "conv.weight of the model itself"))
class ClosureOverAConvolution(TwoConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.run = lambda x: self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.run(x))


@odd(error=(cs.errors.GuardError, "conv.weight of the model itself"))
class WeakReferenceToAConvolution(One):
    def __init__(self) -> None:
        super().__init__()
        self.reference = weakref.ref(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.reference()(x)


@odd(error=(cs.errors.GuardError, "other.weight of the model itself"))
class HookThatIsAClosure(TwoConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda module, args, output: self.other(output))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@odd(error=(cs.errors.GuardError, "layers.0"))
class AsksForTheClassOfItsLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(), nn.ReLU(), conv()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Conv2d) else torch.relu(x)
        return x


@odd("conv", kept={"part.0": "a Conv2d compiled by TorchScript; convert the model before it is scripted"})
class PartOfItIsScripted(One):
    def __init__(self) -> None:
        super().__init__()
        self.part = by_torchscript(torch.jit.script, nn.Sequential(conv(), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.conv(x))


@odd("conv", kept={"part.0": "a Conv2d compiled by TorchScript; convert the model before it is scripted"})
class PartOfItIsTraced(One):
    def __init__(self) -> None:
        super().__init__()
        self.part = by_torchscript(torch.jit.trace, nn.Sequential(conv(), nn.ReLU()), X)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.conv(x))


@odd(error=(cs.errors.NothingToConvertError, "RecursiveScriptModule is TorchScript, whose layers are compiled"))
def scripted() -> nn.Module:
    return by_torchscript(torch.jit.script, One())


@odd("_orig_mod.conv")
def compiled() -> nn.Module:
    return torch.compile(One(), backend="eager", dynamic=True)


@odd("inner.conv")
class LooksItsAttributesUpInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = One()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@odd("conv", inputs=X[0])
def one_image_without_a_batch() -> nn.Module:
    return One()


@odd("conv", inputs=X.repeat(3, 1, 1, 1))
class KnowsItsBatchSize(One):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 3
        return self.norm(self.conv(x)).reshape(3, -1)


@odd("conv", kept={"other": "its weight is read by the forward of (root) in abs"})
class ReadsAWeightInTrainingOnly(TwoConvolutions):
    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return (x, self.other.weight.abs().sum()) if self.training else x


@odd("conv", "other")
class ForgetsToReturnItselfFromTrain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = conv(), conv()

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(self.conv(x))
        return y


@odd(error=(cs.errors.GuardError, "its forward asks what its layers are"))
class HalvesWhatIsNoConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(), conv(), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if isinstance(layer, (nn.Conv2d, nn.ReLU)) else layer(x) * 0.5
        return x


@odd("layers.0", "layers.1", "w")
class AsksForWhatItMayAsk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(), conv(), nn.ReLU()])
        self.w = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Module) else x
        return nn.functional.conv2d(x, self.w) if isinstance(x, Tensor) else x


# what is valid, and easily taken for broken


@odd("conv")
class HasAGeneratorOfItsOwn(One):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + torch.rand(x.shape, generator=self.generator))


@odd("conv", "other")
class KeyedByItsModules(TwoConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.gains = {self.conv: 2.0, self.other: 3.0}

    def forward(self, x: Tensor) -> Tensor:
        for layer, gain in self.gains.items():
            x = layer(x) * gain
        return x


@odd("conv")
class ExpandedBuffer(One):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.zeros.sum()


@odd("conv")
def more_on_a_convolution_than_it_uses() -> nn.Module:
    model = One()
    model.conv.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.conv.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    return model


@odd("conv")
class TakesAGradientInForward(One):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.conv(x)
            (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y + gradient


@odd("conv", "other")
def a_forward_of_a_convolution_that_is_a_lambda() -> nn.Module:
    model = TwoConvolutions()
    original = model.conv
    original.forward = lambda x: nn.Conv2d.forward(original, x)
    return model


# what is another in eval mode, or after a run


@odd(
    "other",
    kept={
        "conv": "another module takes its place, or none, when the model runs in train mode",
        "(root).conv2d()": "Conv2d",
    },
)
class ReplacesAConvolutionInTraining(TwoConvolutions):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.conv = nn.Sequential(nn.Conv2d(8, 8, 1), conv())
        return super().forward(x)


@odd("other", kept={"conv": "another module takes its place, or none, when the model is switched"})
class ReplacesAConvolutionInTrain(TwoConvolutions):
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode:
            self.conv = conv()
        return self


class Fusing(nn.Module):
    """Two branches in train mode, one dense convolution in eval mode (Ding and others, 2021, arXiv:2101.03697)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.three, self.one = conv(), conv(), nn.Conv2d(8, 8, 1)
        self.fused: nn.Conv2d | None = None

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if not mode and self.fused is None:
            self.fused = self.fuse()
        elif mode:
            self.fused = None
        return self

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        fused = conv().requires_grad_(False)
        fused.weight.copy_(self.three.weight + nn.functional.pad(self.one.weight, (1, 1, 1, 1)))
        fused.bias.copy_(self.three.bias + self.one.bias)
        return fused

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.three(x) + self.one(x) if self.fused is None else self.fused(x)


_SWITCHED = "when the model is switched between train and eval mode"


@odd("first", kept={"three": f"its weight is read in add {_SWITCHED}", "one": "its weight is read in pad"})
def fused_when_it_goes_to_eval_mode() -> nn.Module:
    return Fusing()


@odd(
    "first",
    kept={
        "three": "read in add",
        "one": "read in pad",
        "fused": f"another module takes its place, or none, {_SWITCHED}",
    },
)
def fused_already() -> nn.Module:
    return Fusing().eval()


@odd("first", kept={"three": f"another module takes its place, or none, {_SWITCHED}", "one": "takes its place"})
class FusedForGood(Fusing):
    def train(self, mode: bool = True) -> nn.Module:
        nn.Module.train(self, mode)
        if not mode and self.fused is None:
            self.fused = self.fuse()
            del self.three, self.one
        return self


@odd(error=(cs.errors.SurveyError, "writes to a tensor that a closure leads to"))
class CountsInAClosure(One):
    def __init__(self) -> None:
        super().__init__()
        calls = torch.zeros(1)
        self.count = lambda x: (calls.add_(1), x)[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.count(x))


@odd("conv")
class ReadsAClosure(One):
    def __init__(self) -> None:
        super().__init__()
        mean = torch.ones(1)
        self.normalize = lambda x: x - mean

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.normalize(x))


@odd(error=(cs.errors.SurveyError, "gains holds the id() of conv"))
class KeyedByIds(One):
    def __init__(self) -> None:
        super().__init__()
        self.gains = {id(self.conv): 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.gains[id(self.conv)]


@odd("conv", "other")
class FreezesInTrain(TwoConvolutions):
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.conv.requires_grad_(False)
        for parameter in self.other.parameters():
            parameter.requires_grad = parameter.is_leaf and False
        return self


@odd("conv", "other")
class FreezesAWeightByItsName(TwoConvolutions):
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.conv.weight.requires_grad = False
        return self


_UNREGISTERED = "only a plain list or dict holds it"


@odd("conv", "other", kept={"after[key 0]": _UNREGISTERED, "after[key 1]": _UNREGISTERED})
class KeyedByAndHoldingConvolutions(TwoConvolutions):
    def __init__(self) -> None:
        super().__init__()
        self.after = {self.conv: conv(), self.other: conv()}

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, self.other):
            x = self.after[layer](layer(x))
        return x
