"""Deliberately broken ops: every law catches the ones that are broken in its way."""

import copy
import random

import numpy
import pytest
import torch
from torch import nn

from convsurgeon.errors import UnsupportedConvError
from convsurgeon.factorization import rank_one
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec
from convsurgeon.testing import check_op, laws, sample_cases

CASES = [
    ConvSpec(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1), padding_mode="reflect"),
    ConvSpec(4, 3, (3, 3), padding="same", bias=False),
]


class Honest(AbstractCheapConv):
    """Depthwise, then 1x1: what the broken ones are broken from."""

    name, summary, reference, last = "honest", "depthwise, then 1x1", "this file", "pointwise"

    def __init__(self, spec, options):
        super().__init__(spec, options)
        self.spatial = self.make_spatial(spec)
        self.pointwise = nn.Conv2d(spec.in_channels, spec.out_channels, 1, bias=spec.bias)

    @staticmethod
    def make_spatial(spec, **changes):
        geometry = {
            name: getattr(spec, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        channels = spec.in_channels
        return nn.Conv2d(channels, channels, bias=False, **{"groups": channels, **geometry, **changes})

    @classmethod
    def why_not(cls, spec, options):
        return "needs groups=1" if spec.groups != 1 else None

    @classmethod
    def macs(cls, spec, height, width, options=None):
        p, q = spec.output_size(height, width)
        return spec.in_channels * (spec.taps + spec.out_channels) * p * q

    def init_from(self, weight, bias):
        point_IO, depth_IK = rank_one(weight.flatten(2).transpose(0, 1))
        self.pointwise.weight.copy_(point_IO.T[:, :, None, None])
        self.spatial.weight.copy_(depth_IK.view_as(self.spatial.weight))
        if bias is not None:
            self.pointwise.bias.copy_(bias)

    def as_dense(self):
        return self.pointwise.weight * self.spatial.weight.transpose(0, 1)

    def forward(self, x):
        return self.pointwise(self.spatial(x))


BROKEN = {}


def breaks(law, saying):
    """Say which law catches the class below, and what it says."""

    def enter(cls):
        BROKEN.setdefault(law, []).append((cls, saying))
        return cls

    return enter


@breaks("law_description", "summary is '', not a line")
class NoSummary(Honest):
    summary = ""


@breaks("law_description", "reference has more than one line")
class TwoLines(Honest):
    reference = "one\ntwo"


@breaks("law_output_shape", "the output is 1x6x")
class MissesARow(Honest):
    def forward(self, x):
        return super().forward(x)[:, :, 1:]


@breaks("law_output_shape", "the output is 1x")
class IgnoresStride(Honest):
    make_spatial = staticmethod(lambda spec: Honest.make_spatial(spec, stride=(1, 1)))


@breaks("law_output_shape", "the output is 1x")
class IgnoresDilation(Honest):
    make_spatial = staticmethod(lambda spec: Honest.make_spatial(spec, dilation=(1, 1)))


@breaks("law_output_shape", "the output is 1x")
class IgnoresPadding(Honest):
    make_spatial = staticmethod(lambda spec: Honest.make_spatial(spec, padding=(0, 0)))


@breaks("law_output_shape", "RuntimeError")
class CannotRun(Honest):
    def forward(self, x):
        return self.spatial(self.pointwise(x))


@breaks("law_geometry", "stride is")
class ForgetsStride(Honest):
    def __init__(self, spec, options):
        super().__init__(spec, options)
        self.stride = (7, 7)


@breaks("law_geometry", "kernel_size is [3, ")
class ListForTuple(Honest):
    def __init__(self, spec, options):
        super().__init__(spec, options)
        self.kernel_size = list(spec.kernel_size)


@breaks("law_geometry", "has no attribute 'padding_mode'")
class LosesPaddingMode(Honest):
    def __init__(self, spec, options):
        super().__init__(spec, options)
        del self.padding_mode


@breaks("law_donor_untouched", "from_conv changed the donor: weight changed")
class ScalesTheDonor(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight, bias)
        weight.mul_(0.5)


@breaks("law_donor_untouched", "the op shares memory with the donor: bias changed")
class SharesTheBias(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight, bias)
        if bias is not None:
            self.pointwise.bias = nn.Parameter(bias)


@breaks("law_dtype", "pointwise.weight is torch.float32, the donor torch.float64")
class ForgetsDtype(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight, bias)
        self.pointwise.float()


@breaks("law_dtype", "the output is torch.float32 for a donor and an input of torch.float64")
class AnswersInFloat32(Honest):
    def forward(self, x):
        return super().forward(x).float()


@breaks("law_device", "RuntimeError")
class MaskOnTheCpu(Honest):
    def forward(self, x):
        return super().forward(x) * torch.ones(self.out_channels, 1, 1, dtype=x.dtype)


@breaks("law_device", "the output is on cpu, the donor on meta")
class AnswersOnTheCpu(Honest):
    def forward(self, x):
        out = super().forward(x)
        return torch.empty_like(out, device="cpu") if out.is_meta else out


@breaks("law_mode", "the donor training=False")
class AlwaysTraining(Honest):
    def train(self, mode=True):
        return super().train(True)


@breaks("law_mode", "spatial, pointwise has training=True")
class ForgetsItsParts(Honest):
    def train(self, mode=True):
        self.training = mode
        return self


@breaks("law_frozen", "has requires_grad=True, unlike the donor")
class Thaws(Honest):
    def train(self, mode=True):
        return super().train(mode).requires_grad_(True)


@breaks("law_frozen", "spatial.weight has requires_grad=False, unlike the donor")
class Freezes(Honest):
    def train(self, mode=True):
        self.spatial.requires_grad_(False)
        return super().train(mode)


class Wide(Honest):
    """With a kernel that has room for a memory format: a depthwise one is in every format at once."""

    make_spatial = staticmethod(lambda spec: Honest.make_spatial(spec, groups=1))

    def init_from(self, weight, bias):
        pass


@breaks("law_memory_format", "spatial.weight is not in torch.channels_last, the donor is")
class AlwaysContiguous(Wide):
    def train(self, mode=True):
        return super().train(mode).to(memory_format=torch.contiguous_format)


@breaks("law_memory_format", "spatial.weight is not in torch.contiguous_format, the donor is")
class AlwaysChannelsLast(Wide):
    def train(self, mode=True):
        return super().train(mode).to(memory_format=torch.channels_last)


@breaks("law_gradients", "scale receives no gradient from the output")
class DeadParameter(Honest):
    def __init__(self, spec, options):
        super().__init__(spec, options)
        self.scale = nn.Parameter(torch.ones(3))


@breaks("law_gradients", "scale receives a gradient of zeros from the output")
class ZeroGradient(Honest):
    def __init__(self, spec, options):
        super().__init__(spec, options)
        self.scale = nn.Parameter(torch.ones(1))

    def init_from(self, weight, bias):
        super().init_from(weight, bias)
        self.scale.fill_(1)

    def forward(self, x):
        return super().forward(x) + 0 * self.scale


@breaks("law_gradients", "spatial.weight receives no gradient from the output")
class Detaches(Honest):
    def forward(self, x):
        return self.pointwise(self.spatial(x).detach())


@breaks("law_gradients", "receives a gradient from the output that is not finite")
class InfiniteGradient(Honest):
    def forward(self, x):
        return super().forward(x) + (self.spatial.weight - self.spatial.weight).sum().sqrt()


@breaks("law_as_dense", "the output, against as_dense(), is off by up to")
class WrongTaps(Honest):
    def as_dense(self):
        return super().as_dense().flip(2)


@breaks("law_as_dense", "as_dense() is 4x6x3x2, the donor's 6x4x3x2")
class TransposedDense(Honest):
    def as_dense(self):
        return super().as_dense().transpose(0, 1)


@breaks("law_as_dense", "the output, against as_dense(), is off by up to")
class IgnoresPaddingMode(Honest):
    make_spatial = staticmethod(lambda spec: Honest.make_spatial(spec, padding_mode="zeros"))


@breaks("law_as_dense", "the output, against as_dense(), is off by up to")
class PadsTheWrongSide(Honest):
    def forward(self, x):
        return super().forward(x.flip(-1)).flip(-1)


@breaks("law_as_dense", "the bias is off by up to")
class ForgetsTheBias(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight, None)
        if bias is not None:
            self.pointwise.bias.zero_()


@breaks("law_as_dense", "the output, against as_dense(), is off by up to")
class NotLinear(Honest):
    def forward(self, x):
        return super().forward(x.relu())


@breaks("law_as_dense_gradients", "as_dense() gives a tensor without a gradient")
class ConstantDense(Honest):
    @torch.no_grad()
    def as_dense(self):
        return super().as_dense()


@breaks("law_as_dense_gradients", "spatial.weight receives no gradient from as_dense()")
class HalfConstantDense(Honest):
    def as_dense(self):
        return self.pointwise.weight * self.spatial.weight.detach().transpose(0, 1)


@breaks("law_representable", "the kernel that came back is off by up to")
class InitialisesAtRandom(Honest):
    def init_from(self, weight, bias):
        self.pointwise.reset_parameters()
        self.spatial.reset_parameters()


@breaks("law_representable", "the kernel that came back is off by up to")
class LosesALittle(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight * (1 + 1e-5), bias)


@breaks("law_representable", "the kernel that came back has lost 36% of its energy")
class LosesMuchAndOwnsToALittle(Honest):
    @classmethod
    def is_exact(cls, spec, options):
        return False

    def init_from(self, weight, bias):
        super().init_from(weight * 0.4, bias)


@breaks("law_writes", "the kernel that was doubled in place is off by up to")
class ForgetsWrites(Honest):
    weight = property(lambda self: self.as_dense())


@breaks("law_writes", "the kernel that was doubled in place is off by up to")
class TakesWritesIntoACache(Honest):
    def __getattr__(self, name):
        if name != "weight":
            return super().__getattr__(name)
        self.__dict__.setdefault("cache", super().__getattr__("weight").detach().clone())
        return self.cache


@breaks("law_writes", "a kernel that is scaled by output channel is refused")
class HoldsOneScaleOnly(Honest):
    def as_dense(self):
        dense = super().as_dense()
        return dense * (dense.norm() / dense.flatten(1).norm(dim=1).view(-1, 1, 1, 1))

    def forward(self, x):
        bias = 0 if self.bias is None else self.bias.view(-1, 1, 1)
        norms = Honest.as_dense(self).flatten(1).norm(dim=1).view(-1, 1, 1)
        return (super().forward(x) - bias) * Honest.as_dense(self).norm() / norms + bias


@breaks("law_writes", "the output with another bias is off by up to")
class HasNoUseForABias(Honest):
    def forward(self, x):
        out = super().forward(x)
        return out if self.bias is None else out - self.bias.view(-1, 1, 1)


@breaks("law_macs", "MACs at")
class ForgetsThePointwise(Honest):
    @classmethod
    def macs(cls, spec, height, width, options=None):
        p, q = spec.output_size(height, width)
        return spec.in_channels * spec.taps * p * q


@breaks("law_macs", "MACs at")
class CountsAtInputSize(Honest):
    @classmethod
    def macs(cls, spec, height, width, options=None):
        return spec.in_channels * (spec.taps + spec.out_channels) * height * width


@breaks("law_macs", "MACs at")
class DeclaresTapsThatAreNotOneHot(Honest):
    @classmethod
    def one_hot_macs(cls, spec, height, width, options=None):
        return spec.in_channels * spec.taps


@breaks("law_rng", "from_conv draws from torch's global random state")
class DrawsFromTorch(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight + 0 * torch.rand(()), bias)


@breaks("law_rng", "from_conv draws from Python's global random state")
class DrawsFromPython(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight + 0 * random.random(), bias)


@breaks("law_rng", "from_conv draws from numpy's global random state")
class DrawsFromNumpy(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight + 0 * numpy.random.rand(), bias)


@breaks("law_refusals", "RuntimeError")
class AcceptsGroups(Honest):
    @classmethod
    def why_not(cls, spec, options):
        return None


@breaks("law_refusals", "the output for 4→6, 1x1")
class WrongForPointwise(Honest):
    def forward(self, x):
        return super().forward(x) * (2 if self.kernel_size == (1, 1) else 1)


@breaks("law_refusals", "not one sentence")
class RefusesInTwoLines(Honest):
    @classmethod
    def why_not(cls, spec, options):
        return "no.\nnever." if spec.groups != 1 else None


@breaks("law_deepcopy", "the output after the copy was changed")
class CopiesNothing(Honest):
    def __deepcopy__(self, memo):
        return copy.copy(self)


@breaks("law_deepcopy", "the copy is of class Sequential")
class CopiesToAnother(Honest):
    def __deepcopy__(self, memo):
        return nn.Sequential(copy.deepcopy(self.spatial, memo), copy.deepcopy(self.pointwise, memo))


@breaks("law_pickle", "t pickle local object")
class HoldsALambda(Honest):
    def __init__(self, spec, options):
        super().__init__(spec, options)
        self.activation = lambda x: x


@breaks("law_pickle", "the output after pickling is off by up to")
class ForgetsInAPickle(Honest):
    def __getstate__(self):
        state = copy.deepcopy(self.__dict__)
        state["_modules"]["spatial"].weight.data.zero_()
        return state


@breaks("law_state_dict", "the output after a state-dict round trip is off by up to")
class HidesWeights(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight, bias)
        self.hidden = self.spatial.weight.detach().clone()

    def forward(self, x):
        kept = self.spatial.weight if not hasattr(self, "hidden") else self.hidden * 1.5
        return self.pointwise(self.spatial._conv_forward(x, kept, None))


@breaks("law_state_dict", "UnpicklingError")
class CarriesAnObject(Honest):
    def get_extra_state(self):
        return ConvSpec(1, 1, (1, 1))

    def set_extra_state(self, state):
        assert state


@breaks("law_state_dict", "the state dict has extra, which a fresh op does not")
class GrowsAKey(Honest):
    def init_from(self, weight, bias):
        super().init_from(weight, bias)
        self.register_buffer("extra", torch.zeros(1))


@breaks("law_state_dict", "the state dict lacks spatial.weight")
class LosesAKey(Honest):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        state.pop("spatial.weight")
        return state


@breaks("law_freeze", "freeze_for_export says nothing, but the output is off by up to")
class FreezesInSilence(Honest):
    def freeze_for_export(self):
        self.spatial.weight.data.mul_(2)


@breaks("law_freeze", "freeze_for_export changes more the second time: halved")
class FreezesAgain(Honest):
    def freeze_for_export(self):
        self.spatial.weight.data.mul_(0.5)
        return "halved"


@breaks("law_freeze", "not one sentence")
class FreezesAtLength(Honest):
    def freeze_for_export(self):
        return "no.\nnever."


@breaks("law_freeze", "the output after freeze_for_export, against as_dense(), is off by up to")
class FreezesOnlyTheOutput(Honest):
    frozen = False

    def freeze_for_export(self):
        said, self.frozen = (None if self.frozen else "doubled"), True
        return said

    def forward(self, x):
        return super().forward(x) * (2 if self.frozen else 1)


@breaks("law_fx", "TraceError")
class LooksAtTheData(Honest):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(-x)


@breaks("law_fx", "the traced graph's output has the shape 2x")
class FreezesTheBatch(Honest):
    def forward(self, x):
        out = super().forward(x)
        # a tracer records the first branch, whatever the batch size
        return out if isinstance(x, torch.Tensor) else torch.cat([out, out])[:2]


@breaks("law_export", "data-dependent")
class BranchesOnTheData(Honest):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(x) * 1


@breaks("law_export", "the exported program's output for a batch of 2 is off by up to")
class AnswersOtherwiseWhenExported(Honest):
    def forward(self, x):
        out = super().forward(x)
        return 2 * out if torch.compiler.is_exporting() else out


@breaks("law_export", "Constraints violated (batch)")
class OneBatchSize(Honest):
    def forward(self, x):
        return super().forward(x.reshape(int(x.shape[0]), -1)[: len(range(x.shape[0]))].view_as(x))


@breaks("law_onnx", "ParityError")
class WrongInOnnx(AnswersOtherwiseWhenExported):
    pass


@breaks("law_onnx", "torch.onnx cannot export NoSuchOperator")
class NoSuchOperator(Honest):
    def forward(self, x):
        return super().forward(x) + 0 * torch.special.bessel_j0(x.mean())


def broken():
    return [
        pytest.param(law, cls, saying, id=f"{law}-{cls.__name__}")
        for law, entries in BROKEN.items()
        for cls, saying in entries
    ]


@pytest.mark.parametrize(("law", "op", "saying"), broken())
def test_law_catches(law, op, saying):
    found = []
    for spec in CASES:
        try:
            laws()[law](op, spec, None)
        except AssertionError as error:
            found.append(str(error))
    assert any(saying in message for message in found), found
    for message in found:
        assert message.startswith(f"{op.__name__} breaks {law} for ")
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize("law", sorted(laws()))
def test_the_honest_one_passes(law):
    for spec in CASES:
        laws()[law](Honest, spec, None)


def test_the_wide_one_keeps_its_memory_format():
    laws()["law_memory_format"](Wide, CASES[0], None)


def test_every_law_catches_something():
    assert set(BROKEN) == set(laws())


def test_check_op_catches_what_a_law_catches():
    check_op(Honest, cases=[(spec, None) for spec in CASES], expensive=False)
    with pytest.raises(AssertionError, match="WrongTaps breaks law_as_dense for "):
        check_op(WrongTaps, cases=[(spec, None) for spec in CASES])
    with pytest.raises(AssertionError, match="WrongTaps breaks law_as_dense for "):
        check_op(WrongTaps)


def test_check_op_exports_only_where_asked_to():
    cases = [(CASES[1], None)]
    check_op(AnswersOtherwiseWhenExported, cases=cases, expensive=False)
    with pytest.raises(AssertionError, match="AnswersOtherwiseWhenExported breaks law_export for "):
        check_op(AnswersOtherwiseWhenExported, cases=cases)


def test_an_op_that_refuses_everything_is_said_to():
    class Refuses(Honest):
        @classmethod
        def why_not(cls, spec, options):
            return "never"

    with pytest.raises(AssertionError, match="Refuses accepts 0 of 1200 generated convolutions"):
        sample_cases(Refuses)
    with pytest.raises(UnsupportedConvError, match="Refuses refuses 4→6"):
        laws()["law_macs"](Refuses, CASES[0], None)
