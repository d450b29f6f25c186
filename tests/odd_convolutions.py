"""Awkward convolutions, each in a tiny network, with what is expected of each: functional, subclassed, reweighted."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from odd_networks import ODD, One, X, conv, odd
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

__all__ = ["ODD"]


class Kernel(nn.Module):
    """What the functional ones are made of: a kernel without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.randn(8, 8, 3, 3))


# functional


@odd("w")
class FunctionalOnAParameter(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.conv2d(x, self.w, padding=1))


@odd("w")
class TorchConv2dByPosition(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.w, None, [2, 1], "valid" if self.w.shape[2] > 3 else 1)


@odd("w")
class FunctionalWithABias(Kernel):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, weight=self.w, bias=self.b, padding="same", dilation=2)


@odd("w")
class FunctionalInAForwardThatCannotBeTraced(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x if x.sum() > 1e9 else -x, self.w, stride=2)


@odd("w")
class DropoutFlagAfterAFunctional(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.conv2d(x, self.w), 0.5, training=self.training)


@odd("w")
class KernelIsABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w)


@odd("kernels.0", "kernels.1")
class KernelsInAParameterList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList([torch.randn(8, 8, 3, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for kernel in self.kernels:
            x = F.conv2d(x, kernel, padding=1)
        return x


@odd("kernels.edge")
class KernelInAParameterDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterDict({"edge": torch.randn(8, 8, 3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernels["edge"], padding=1)


@odd("w")
class OneKernelCalledTwice(Kernel):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.w, padding=1), self.w, padding=1)


@odd("w")
class PartialOfTheFunction(Kernel):
    def __init__(self) -> None:
        super().__init__()
        self.run = functools.partial(F.conv2d, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.w)


@odd("w = inner.w")
class KernelUnderTwoNames(Kernel):
    def __init__(self) -> None:
        super().__init__()
        self.inner = FunctionalOnAParameter()
        self.inner.w = self.w

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.conv2d(x, self.w, padding=1))


class Kept(Kernel):
    """A kernel that stays, and a convolution that does not, so that there is something to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()


@odd("conv", kept={"(root).conv2d()": "its kernel is computed from the input"})
class KernelComputedFromTheInput(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.w * x.mean())


@odd("conv", kept={"(root).conv2d()": "its kernel is computed when it runs"})
class KernelComputedInAForwardThatCannotBeTraced(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.w * (2 if x.sum() > 0 else 3))


@odd("conv", kept={"(root).conv2d()": "its kernel is computed from its parameters"})
class KernelComputedFromParameters(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.w / self.w.norm())


@odd("conv", kept={"w": "its kernel is also read by"})
class KernelReadElsewhere(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.w) * self.w.mean()


@odd("conv", kept={"w": "its kernel is used by calls of different geometry"})
class OneKernelTwoStrides(Kept):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.conv2d(x, self.w).mean() + F.conv2d(x, self.w, stride=2)


@odd("conv", kept={"(root).conv2d()": "its kernel is neither a parameter nor a buffer of the model"})
class KernelIsAPlainTensor(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.randn(8, 8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.plain)


@odd("conv", kept={"w": "F.conv_transpose2d is not a Conv2d"})
class FunctionalTransposed(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.conv(x), self.w)


@odd("conv", kept={"depth": "depthwise"})
class FunctionalDepthwise(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.depth, groups=8)


# subclasses


class Plain(nn.Conv2d):
    """Nothing of its own but a name and a greeting."""

    greeting = "hello"


class TFSame(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, input: Tensor) -> Tensor:
        sides: list[int] = []
        for axis in (1, 0):
            size, k, s, d = input.shape[axis - 2], self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    """Weight standardization (Qiao and others, 2019, arXiv:1903.10520)."""

    def forward(self, input: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """Scaled weight standardization with a gain (Brock and others, 2021, arXiv:2101.08692)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, input: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
        )
        return self._conv_forward(input, weight.reshape_as(self.weight), self.bias)


class Activated(nn.Conv2d):
    """An activation inside."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(super().forward(input))


class Perturbed(nn.Conv2d):
    """Changes its kernel in training."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * 1.5 if self.training else self.weight, self.bias)


class Clamped(nn.Conv2d):
    """A max-norm constraint, as networks for biosignals have."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(input)


class Doubled(nn.Conv2d):
    """Two convolutions with one kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


class LowRankAdapted(nn.Conv2d):
    """A frozen weight and a trained addition of rank two (Hu and others, 2021, arXiv:2106.09685)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.down = nn.Parameter(torch.randn(2, self.weight[0].numel()))
        self.up = nn.Parameter(torch.randn(self.out_channels, 2))
        self.weight.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight + (self.up @ self.down).view_as(self.weight), self.bias)


class Masked(nn.Conv2d):
    """Only looks up and to the left (van den Oord and others, 2016, arXiv:1606.05328)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones(3, 3).tril())

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.mask, self.bias)


class DropConnected(nn.Conv2d):
    """Dropout on its weight (Wan and others, 2013)."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, F.dropout(self.weight, 0.5, self.training), self.bias)


class RoundTheGlobe(nn.Conv2d):
    """Circular from left to right, zeros at the poles."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(F.pad(input, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)), self.weight, self.bias)


class WithCoordinates(nn.Conv2d):
    """Takes two channels fewer than it has (Liu and others, 2018, arXiv:1807.03247)."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, n).to(input) for n in input.shape[2:]), indexing="ij")
        places = torch.stack([rows, columns]).expand(len(input), -1, -1, -1)
        return super().forward(torch.cat([input, places], dim=1))


class TwoArguments(nn.Conv2d):
    """Needs more than an image."""

    def forward(self, input: Tensor, scale: float) -> Tensor:
        return scale * super().forward(input)


def net(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), conv())


@odd("0", "2")
def subclass_with_nothing_of_its_own() -> nn.Module:
    return net(Plain(8, 8, 3, padding=1))


@odd("0", "2", inputs=X[..., :5])
def subclass_that_pads_as_tensorflow() -> nn.Module:
    return net(TFSame(8, 8, 3, stride=2))


@odd("0", "2")
def subclass_that_standardizes_its_weight() -> nn.Module:
    return net(Standardized(8, 8, 3))


@odd("0", "2")
def subclass_that_scales_its_standardized_weight() -> nn.Module:
    return net(Scaled(8, 8, 3, padding=1))


@odd("0.weight", "2")
def subclass_with_an_activation_inside() -> nn.Module:
    return net(Activated(8, 8, 3, padding=1))


@odd("2", kept={"0": "changes its kernel in training"})
def subclass_that_changes_its_kernel_in_training() -> nn.Module:
    return net(Perturbed(8, 8, 3))


@odd("2", kept={"0": "writes to its weight when it runs"})
def subclass_that_writes_to_its_weight() -> nn.Module:
    return net(Clamped(8, 8, 3))


@odd("2", kept={"0": "runs 2 convolutions, not one"})
def subclass_that_convolves_twice() -> nn.Module:
    return net(Doubled(8, 8, 3, padding=1))


@odd("0", "2")
def subclass_with_a_low_rank_addition() -> nn.Module:
    return net(LowRankAdapted(8, 8, 3))


@odd("0", "2")
def subclass_with_a_mask() -> nn.Module:
    return net(Masked(8, 8, 3))


@odd("2", kept={"0": "changes its kernel in training"})
def subclass_with_dropout_on_its_weight() -> nn.Module:
    return net(DropConnected(8, 8, 3))


@odd("0.weight", "2")
def subclass_with_padding_of_its_own() -> nn.Module:
    return net(RoundTheGlobe(8, 8, 3))


@odd("2", kept={"0": "fails when it is run alone"})
def subclass_that_takes_fewer_channels_than_it_says() -> nn.Module:
    return net(WithCoordinates(10, 8, 3))


@odd("conv", kept={"first": "fails when it is run alone"})
class SubclassThatNeedsMoreThanAnImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = TwoArguments(8, 8, 3), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x, 2.0))


# weights that something writes


@odd("0", "2")
def spectral_norm_as_parametrization() -> nn.Module:
    return net(parametrizations.spectral_norm(conv()))


@odd("0", "2")
def spectral_norm_as_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return net(torch.nn.utils.spectral_norm(conv()))


@odd("0", "2")
def weight_norm_as_parametrization() -> nn.Module:
    return net(parametrizations.weight_norm(conv()))


@odd("0", "2")
def weight_norm_as_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return net(torch.nn.utils.weight_norm(conv()))


@odd("0", "2")
def pruned() -> nn.Module:
    model = net(conv())
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    prune.random_unstructured(model[0], "bias", amount=2)
    return model


class Halved(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@odd("0", "2")
def a_parametrization_of_ones_own() -> nn.Module:
    model = net(conv())
    parametrize.register_parametrization(model[0], "weight", Halved())
    return model


# padding, and what is no Conv2d


@odd("0", "1", "2")
def padding_modes_with_even_kernels() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 4, padding=(2, 1), padding_mode="reflect"),
        nn.Conv2d(8, 8, (2, 4), padding=1, padding_mode="circular", stride=(1, 2)),
        nn.Conv2d(8, 8, 2, padding=1, padding_mode="replicate"),
    )


@odd(
    "two",
    kept={
        "one": "Conv1d is not a Conv2d",
        "three": "Conv3d is not a Conv2d",
        "up": "ConvTranspose2d is not a Conv2d",
    },
)
class OneAndThreeDimensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(8, 8, 3, padding=1)
        self.three = nn.Conv3d(1, 1, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.two = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x.flatten(2)).view_as(x)
        return self.up(self.two(self.three(x[:, None])[:, 0]))


# kernels on the way from their name to the convolution


@odd("conv", kept={"w": "its kernel passes through to before the convolution"})
class KernelCastToTheInputsDtype(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.w.to(x.dtype))


@odd("conv", kept={"w": "its kernel passes through contiguous before the convolution"})
class KernelMadeContiguous(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.w.contiguous())


@odd("conv", "w")
class KernelInsideVmap(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda image: F.conv2d(image[None], self.w)[0])(self.conv(x))


class Straight(torch.autograd.Function):
    """A convolution whose backward is one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return (
            nn.grad.conv2d_input(x.shape, weight, gradient),
            nn.grad.conv2d_weight(x, weight.shape, gradient),
        )


@odd("conv", kept={"w": "autograd"})
class KernelInAnAutogradFunction(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(self.conv(x), self.w)


@odd("conv", kept={"(root).convolution()": "torch.convolution is not understood; call torch.conv2d"})
class TorchConvolution(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return torch.convolution(self.conv(x), self.w * 2, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


@odd("conv", "free", kept={"shared = linear.weight": "its kernel is tied to that of a Linear"})
class KernelTiedToALinear(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.free = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.shared = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.linear.weight = self.shared

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.conv(x), self.free, padding=1)
        return F.conv2d(x, self.shared)


@odd("conv", "other")
class WeightIsAPlainTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = conv(), conv()
        weight = self.conv.weight
        del self.conv.weight
        self.conv.weight = weight.detach() * 1

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x))


@odd("conv")
def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return One()


class Named(nn.Parameter):
    """A parameter of a class of one's own."""


@odd("conv")
def a_parameter_of_ones_own_class() -> nn.Module:
    model = One()
    model.conv.weight = Named(model.conv.weight.detach())
    return model


@odd("conv", kept={"(root).conv2d()": "its kernel is computed from its parameters"})
class KernelsStackedInOneParameter(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.w[1])


@odd("conv", "w")
class ComputesUnderAutocast(Kept):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.conv2d(self.conv(x), self.w).float()


class WithMask(nn.Conv2d):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y * mask


@odd("conv", kept={"masked": "it is called with more than an image: mask=", "other": "it is called with more than an"})
class CalledWithAMask(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.masked, self.other = WithMask(8, 8, 3, padding=1), WithMask(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.masked(self.conv(x), mask=x[:, :1] > 0), x[:, :1] > 0)


class Slimmable(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.in_channels:
            return super().forward(x)
        return F.conv2d(x, self.weight[:, : x.shape[1]], self.bias, self.stride, self.padding)


@odd("conv", kept={"slim": "it is called with 4 channels, and its weight is made for 8"})
class CalledWithFewerChannels(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.slim = Slimmable(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.slim(self.conv(x)[:, :4])


@odd("conv", kept={"seen": "its weight is tied, and stays so: seen.weight and view share memory"})
class ViewOfAWeightInAPlainAttribute(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.seen = conv()
        self.view = self.seen.weight.detach()[:, :4]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.seen(self.conv(x)) * self.view.mean()
        return y


class FirstHalf(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.conv2d(x, self.weight[:4], self.bias[:4], self.stride, self.padding)


@odd("conv", kept={"part": "computes with out_channels=4, and says 8"})
class ComputesOnlyHalfOfWhatItSays(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.part = FirstHalf(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(self.conv(x))
        return y


def clip(module: nn.Module, args: Any) -> None:
    module.weight.data.clamp_(-0.01, 0.01)


@odd("conv", kept={"clipped": "its kernel is written to when the model runs"})
class AHookWritesTheWeight(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.clipped = conv()
        self.clipped.register_forward_pre_hook(clip)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.clipped(self.conv(x))
        return y


class Clipped(nn.Module):
    """Writes to its weight in train mode, where no one sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv()
        self.parts = [self.inner.parameters]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch._C.DisableTorchFunction():
                for parameter in self.parts[0]():
                    parameter.data.clamp_(-0.01, 0.01)
        y: Tensor = self.inner(x)
        return y


@odd(
    "conv",
    kept={
        "clipped.inner": "its kernel is written to when the model runs in train mode",
        "w": "its kernel is also read by data in the forward of (root)",
    },
)
class WritesToKernelsInTraining(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.clipped = Clipped()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.w.data.mul_(0.5)
        y: Tensor = F.conv2d(self.clipped(self.conv(x)), self.w, padding=1)
        return y


@odd("conv", "w", kept={"noisy": "it is called with more than an image: mask="})
class CalledOtherwiseInTraining(Kept):
    """With a mask, and with a functional convolution more."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy = WithMask(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if not self.training:
            y: Tensor = self.noisy(x)
            return y
        return F.conv2d(self.noisy(x, mask=x > 0), self.w, padding=1)


@odd("conv", kept={"listed": "its weight is tied, and stays so: listed.weight and penalized[0] share memory"})
class WeightInAPlainList(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.listed = conv()
        self.penalized = [self.listed.weight]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.listed(self.conv(x))
        return y


class ByValue(nn.Conv2d):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByValue) and self.kernel_size == other.kernel_size

    def __hash__(self) -> int:
        return hash(self.kernel_size)


@odd("conv", kept={"one = two": "compares by value (__eq__), so that its instances cannot be told apart"})
class ConvolutionsThatAreEqual(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = ByValue(8, 8, 3, padding=1), ByValue(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(self.conv(x)))
        return y


class Gain(nn.Module):
    """A parametrization with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


def with_one_parametrization(shared: nn.Module) -> nn.Module:
    model = nn.Sequential(conv(), conv(), conv())
    for module in (model[0], model[1]):
        parametrize.register_parametrization(module, "weight", shared)
    return model


_GAINS = "0.parametrizations.weight.0.gain and 1.parametrizations.weight.0.gain share memory"


@odd("2", kept={"0": f"is tied, and stays so: {_GAINS}", "1": f"is tied, and stays so: {_GAINS}"})
def one_parametrization_with_a_parameter_for_two() -> nn.Module:
    return with_one_parametrization(Gain())


@odd("0", "1", "2")
def one_parametrization_without_parameters_for_two() -> nn.Module:
    return with_one_parametrization(Halved())


@odd("conv", kept={"w": "torch.ops.aten.conv2d is not understood; call torch.conv2d"})
class AtenOperator(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.conv2d(self.conv(x), self.w, None, [1, 1], [1, 1])


@odd("conv", kept={"w": "torch.ops.aten.conv2d is not understood; call torch.conv2d"})
class AtenOverloadInAForwardThatCannotBeTraced(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.conv2d.default(self.conv(x) if x.sum() < 1e9 else x, self.w)


@odd("conv", kept={"w": "torch.convolution is not understood; call torch.conv2d"})
class AtenConvolution(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.convolution(self.conv(x), self.w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


class ByAten(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class ActivatedByAten(ByAten):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class ByConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.convolution(x, self.weight, self.bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


@odd(
    "0",
    kept={
        "1": "does more than one convolution, and torch.ops.aten.conv2d is not understood; call torch.conv2d",
        "2": "calls torch.convolution, which is not understood; call torch.conv2d",
    },
)
def subclasses_that_call_aten() -> nn.Module:
    return nn.Sequential(*(kind(8, 8, 3, padding=1) for kind in (ByAten, ActivatedByAten, ByConvolution)))
