"""Geometry that is written in other forms than pairs: it is compared by what it says, whatever class says it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import conv
from torch import Tensor, nn
from torch.nn import functional as F

import convsurgeon as cs
from convsurgeon.spec import ConvSpec, as_pair


class Plain(nn.Conv2d):
    """A subclass that says again what `nn.Conv2d` does."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class PadsFirst(nn.Conv2d):
    """A subclass that pads by itself, as ports from TensorFlow do, and says no padding to torch in a list."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.weight, self.bias, self.stride, [0], self.dilation, self.groups)


class Halves(nn.Conv2d):
    """A subclass that computes with another stride than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, [2, 2], self.padding)


FORMS: dict[str, dict[str, Any]] = {
    "list of stride": {"stride": [1, 1]},
    "other list of stride": {"stride": [2, 1]},
    "list of one": {"stride": [2]},
    "list of padding": {"padding": [1, 1]},
    "list of dilation": {"dilation": [2, 2], "padding": [2, 2]},
    "all lists": {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]},
    "all numbers": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1},
    "torch.Size": {"stride": torch.Size([2, 2]), "padding": torch.Size([1, 1])},
    "integers of numpy": {"stride": (np.int64(2), np.int64(2)), "padding": [np.int32(1)] * 2, "groups": np.int64(1)},
    "channels of numpy": {"in_channels": np.int64(8), "out_channels": np.int64(8)},
    "same": {"padding": "same", "stride": [1, 1]},
}


def with_form(cls: type[nn.Conv2d], form: dict[str, Any]) -> nn.Sequential:
    """Return a small network whose middle convolution has its geometry in that form."""
    middle = cls(8, 8, 3, padding=1)
    for name, value in form.items():
        setattr(middle, name, value)
    return nn.Sequential(conv(3, 8), middle, conv(8, 8)).eval()


@pytest.mark.parametrize("cls", [nn.Conv2d, Plain])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_geometry_in_any_form_is_converted(cls: type[nn.Conv2d], form: dict[str, Any]) -> None:
    net = with_form(cls, form)
    image = torch.randn(2, 3, 12, 12)
    # of full rank, so that the student computes the same
    plan = cs.plan(net, "none", mapping={"1": "lowrank"}, options={"rank": 1.0}, example_inputs=image[:1])
    student = cs.rewrite(net, plan, example_inputs=image[:1])
    torch.testing.assert_close(student(image), net(image), rtol=1e-4, atol=1e-5)
    assert [decision.fqn for decision in plan.converted] == ["1"]
    expected = ConvSpec(
        8,
        8,
        (3, 3),
        stride=as_pair(form.get("stride", 1)),
        padding="same" if form.get("padding") == "same" else as_pair(form.get("padding", 1)),
        dilation=as_pair(form.get("dilation", 1)),
    )
    assert plan.converted[0].spec == expected


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_plan_of_it_is_plain_data(form: dict[str, Any]) -> None:
    plan = cs.plan(with_form(Plain, form), example_inputs=torch.zeros(1, 3, 12, 12))
    assert type(plan).from_json(plan.to_json()) == plan


def test_padding_by_hand_is_understood_whatever_form_says_none() -> None:
    net = nn.Sequential(conv(3, 8), PadsFirst(8, 8, 3, padding=[1, 1], padding_mode="reflect"), conv(8, 8)).eval()
    plan = cs.plan(net, "depthwise", example_inputs=torch.zeros(1, 3, 12, 12))
    (spec,) = (decision.spec for decision in plan.decisions if decision.fqn == "1")
    assert spec is not None
    assert (spec.padding, spec.padding_mode) == ((1, 1), "reflect")
    assert plan.decisions[1].op == "depthwise"


@pytest.mark.parametrize("stride", [1, (1, 1), [1, 1], torch.Size([1, 1]), np.int64(1), [1]])
def test_a_stride_that_is_really_another_is_refused_in_one_form(stride: Any) -> None:
    net = nn.Sequential(conv(3, 8), Halves(8, 8, 3, padding=1), conv(8, 8))
    net[1].stride = stride
    plan = cs.plan(net, example_inputs=torch.zeros(1, 3, 12, 12))
    assert plan.decisions[1].op is None
    assert "computes with stride=(2, 2), and says (1, 1)" in plan.decisions[1].reason


@pytest.mark.parametrize("cls", [nn.Conv2d, Plain])
@pytest.mark.parametrize("stride", [None, (1, 1, 1), "same", (), ({},)])
def test_geometry_that_is_none_is_kept_with_a_reason(cls: type[nn.Conv2d], stride: Any) -> None:
    net = nn.Sequential(conv(3, 8), cls(8, 8, 3, padding=1), conv(8, 8))
    net[1].stride = stride
    plan = cs.plan(net)
    assert plan.decisions[1].op is None
    assert plan.decisions[1].spec is None
    assert f"its geometry cannot be read: kernel_size=(3, 3), stride={stride!r}" in plan.decisions[1].reason
    assert "give whole numbers or pairs of them" in plan.decisions[1].reason


def test_a_pair_of_anything_else_is_refused() -> None:
    for value in (None, (), (1, 1, 1), "ab", [[1], [1]]):
        with pytest.raises((TypeError, ValueError)):
            as_pair(value)
