"""A spec says what `nn.Conv2d` does, checked against `nn.Conv2d`."""

import dataclasses
import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convsurgeon.spec import ConvSpec
from convsurgeon.testing import input_size, specs

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
many = settings(deadline=None, max_examples=100, derandomize=True)


@st.composite
def any_specs(draw):
    """Dense, grouped and depthwise ones."""
    spec, groups = draw(specs()), draw(st.sampled_from([1, 2, 3]))
    if draw(st.booleans()):
        return dataclasses.replace(spec, out_channels=2 * spec.in_channels, groups=spec.in_channels)
    return dataclasses.replace(
        spec, in_channels=groups * spec.in_channels, out_channels=groups * spec.out_channels, groups=groups
    )


def conv_of(spec, **where):
    return nn.Conv2d(**{**dataclasses.asdict(spec), **where})


@many
@given(spec=any_specs())
def test_a_spec_is_read_off_a_convolution(spec):
    assert ConvSpec.from_conv(conv_of(spec, device="meta")) == spec


@many
@given(spec=any_specs(), more=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_output_size_macs_and_params_are_those_of_torch(spec, more):
    conv = conv_of(spec)
    height, width = (size + extra for size, extra in zip(input_size(spec), more, strict=True))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = conv(torch.zeros(1, spec.in_channels, height, width))
    assert out.shape == (1, spec.out_channels, *spec.output_size(height, width))
    assert spec.macs(height, width) == counter.get_total_flops() // 2
    assert spec.params == sum(parameter.numel() for parameter in conv.parameters())


@many
@given(spec=specs())
def test_pads_are_where_torch_pads(spec):
    (top, bottom), (left, right) = spec.pads
    assume(spec.padding_mode != "zeros")  # torch's module pads by itself in the other modes
    image = torch.rand(1, spec.in_channels, *input_size(spec))
    conv = conv_of(spec)
    padded = nn.functional.pad(image, (left, right, top, bottom), mode=spec.padding_mode)
    expected = nn.functional.conv2d(padded, conv.weight, conv.bias, spec.stride, 0, spec.dilation)
    torch.testing.assert_close(conv(image), expected)


@many
@given(spec=any_specs())
def test_a_spec_survives_json(spec):
    assert ConvSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_to_dict_is_every_field_as_plain_data():
    spec = ConvSpec(3, 8, (3, 5), padding="same")
    assert spec.to_dict() == {
        "in_channels": 3,
        "out_channels": 8,
        "kernel_size": [3, 5],
        "stride": [1, 1],
        "padding": "same",
        "dilation": [1, 1],
        "groups": 1,
        "bias": True,
        "padding_mode": "zeros",
    }


def test_a_field_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="colour"):
        ConvSpec.from_dict({**ConvSpec(3, 8, (3, 3)).to_dict(), "colour": 1})


def test_integers_are_read_as_pairs():
    conv = nn.Conv2d(2, 2, 3)
    conv.stride, conv.padding, conv.dilation, conv.kernel_size = 2, 1, 3, 3  # as some model code leaves them
    assert ConvSpec.from_conv(conv) == ConvSpec(2, 2, (3, 3), (2, 2), (1, 1), (3, 3))


def test_a_spec_is_a_value():
    spec = ConvSpec(2, 2, (3, 3))
    assert {spec: 1}[ConvSpec(2, 2, (3, 3))] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.groups = 2


@pytest.mark.parametrize(
    ("spec", "pointwise", "depthwise"),
    [
        (ConvSpec(4, 4, (1, 1)), True, False),
        (ConvSpec(4, 4, (1, 3)), False, False),
        (ConvSpec(4, 4, (3, 3), groups=4), False, True),
        (ConvSpec(4, 8, (3, 3), groups=4), False, True),
        (ConvSpec(4, 4, (3, 3), groups=2), False, False),
        (ConvSpec(1, 4, (3, 3)), False, False),
    ],
)
def test_pointwise_and_depthwise(spec, pointwise, depthwise):
    assert (spec.is_pointwise, spec.is_depthwise) == (pointwise, depthwise)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (ConvSpec(64, 128, (3, 3)), "64→128, 3x3"),
        (ConvSpec(64, 128, (3, 3), (2, 2), (1, 1)), "64→128, 3x3, stride 2, padding 1"),
        (ConvSpec(4, 4, (1, 7), (1, 2), (0, 3), (1, 2)), "4→4, 1x7, stride 1x2, padding 0x3, dilation 1x2"),
        (ConvSpec(8, 8, (3, 3), padding="same", groups=8), "8→8, 3x3, padding same, groups 8"),
        (ConvSpec(8, 8, (3, 3), padding=(1, 1), padding_mode="reflect"), "8→8, 3x3, padding 1, reflect"),
    ],
)
def test_a_spec_in_words(spec, text):
    assert str(spec) == text


def test_taps():
    assert ConvSpec(1, 1, (3, 5)).taps == 15


@pytest.mark.parametrize(
    ("kernel", "dilation", "pads"),
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((2, 4), (1, 1), ((0, 1), (1, 2))),
        ((4, 2), (2, 3), ((3, 3), (1, 2))),
    ],
)
def test_same_pads_the_odd_one_out_at_the_end(kernel, dilation, pads):
    assert ConvSpec(1, 1, kernel, padding="same", dilation=dilation).pads == pads
