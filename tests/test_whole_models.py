"""Properties of surgery on whole networks that hypothesis draws.

Sequential, residual, concatenating, shared-module and branching ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Witness, assert_bit_identical
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon import Plan, ops
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import count_macs, plan, plan_of, rewrite, survey, totals

CHANNELS = (2, 3, 4, 6, 8)
EXAMPLES = settings(max_examples=20)


@dataclass(frozen=True)
class Layer:
    """A recipe for one layer; `kind` says how it is wired."""

    kind: str
    outputs: int
    conv: dict[str, Any] = field(default_factory=dict)


class Residual(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x)


class Joined(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Twice(nn.Module):
    """One module object under two names and in a list."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one = layer
        self.two = layer
        self.everything = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.everything[0](torch.relu(self.two(x))) + self.one(x)


class Switch(nn.Module):
    """Control flow on values, which no trace survives."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.mean() > 0 else self.right(x)


def build(inputs: int, layers: list[Layer]) -> nn.Sequential:
    """Make the network of some recipes."""
    made: list[nn.Module] = []
    for layer in layers:
        outputs = inputs if layer.kind in ("residual", "twice") else layer.outputs

        def conv(outputs: int = outputs, inputs: int = inputs, layer: Layer = layer) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, **layer.conv)

        if layer.kind == "residual":
            made.append(Residual(conv(), nn.BatchNorm2d(outputs)))
        elif layer.kind == "joined":
            made.append(Joined(conv(), nn.Sequential(conv(), nn.ReLU())))
            outputs *= 2
        elif layer.kind == "twice":
            made.append(Twice(conv()))
        elif layer.kind == "switch":
            made.append(Switch(conv(), conv()))
        else:
            made.extend([conv(), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)])
        inputs = outputs
    return nn.Sequential(*made)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    kind = draw(st.sampled_from(["plain", "residual", "joined", "twice", "switch"]))
    kernel = draw(st.sampled_from([1, 3, 5, (1, 3)]))
    same = {"kernel_size": kernel, "padding": "same", "bias": draw(st.booleans())}
    same["padding_mode"] = draw(st.sampled_from(["zeros", "replicate"]))
    if kind == "plain" and draw(st.booleans()):
        pads = (kernel // 2,) * 2 if isinstance(kernel, int) else (0, 1)
        same |= {"padding": pads, "stride": draw(st.sampled_from([2, (1, 2)]))}
    elif draw(st.booleans()):
        same["dilation"] = 2
    return Layer(kind, draw(st.sampled_from(CHANNELS)), same)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A small network that at least one op can do something with, in a drawn mode and dtype."""
    torch.manual_seed(draw(st.integers(0, 99)))
    first = Layer("plain", draw(st.sampled_from(CHANNELS)), {"kernel_size": 3, "padding": 1})
    second = Layer("plain", 8, {"kernel_size": 3, "padding": 1})
    network = build(3, [first, second, *draw(st.lists(layers(), max_size=3))])
    network.train(draw(st.booleans()))
    return network.to(draw(st.sampled_from([torch.float32, torch.float64])))


def image(network: nn.Module, batch: int = 1) -> Tensor:
    dtype = next(network.parameters()).dtype
    return torch.linspace(-1, 1, batch * 3 * 81, dtype=dtype).reshape(batch, 3, 9, 9)


def output(network: nn.Module, x: Tensor) -> Tensor:
    modes = [(module, module.training) for module in network.modules()]
    with torch.no_grad():
        found = network.eval()(x)
    for module, mode in modes:
        module.training = mode
    return found


@pytest.mark.parametrize("name", ops.names())
@EXAMPLES
@given(network=networks())
def test_outputs_keep_their_shape_and_unselected_sites_their_bits(name: str, network: nn.Module) -> None:
    x = image(network, 2)
    witness = Witness(network)
    student = rewrite(network, name, example_inputs=x)
    witness.check()
    assert output(student, x).shape == output(network, x).shape
    assert output(student, x).dtype == x.dtype
    converted = tuple(f"{fqn}." for d in plan_of(student).converted for fqn in d.fqns)
    theirs = student.state_dict()
    for key, value in network.state_dict().items():
        if not key.startswith(converted):
            assert torch.equal(theirs[key], value), key
    for fqn, module in student.named_modules():
        if isinstance(module, AbstractCheapConv):
            assert f"{fqn}.".startswith(converted)
        if not fqn.startswith(converted):
            assert module.training is network.get_submodule(fqn).training


@EXAMPLES
@given(network=networks(), name=st.sampled_from(ops.names()))
def test_shared_stays_shared(network: nn.Module, name: str) -> None:
    student = rewrite(network, name)
    for model in (network, student):
        for module in model.modules():
            if isinstance(module, Twice):
                assert module.one is module.two is module.everything[0]
    names = [site.fqns for site in survey(network).sites]
    assert [site.fqns for site in survey(student).sites] == names


@EXAMPLES
@given(network=networks(), name=st.sampled_from(ops.names()))
def test_a_plan_survives_json_and_replays_to_the_same_bits(network: nn.Module, name: str) -> None:
    the_plan = plan(network, name)
    again = Plan.from_json(the_plan.to_json())
    assert again == the_plan
    assert again.to_json() == the_plan.to_json()
    assert_bit_identical(rewrite(network, again), rewrite(network, name))
    assert plan(network, name, example_inputs=image(network)) == the_plan


@EXAMPLES
@given(network=networks(), name=st.sampled_from(ops.names()))
def test_a_second_rewrite_raises_and_leaves_the_student_alone(network: nn.Module, name: str) -> None:
    student = rewrite(network, name)
    witness = Witness(student)
    with pytest.raises(cs.errors.NothingToConvertError):
        rewrite(student, name)
    witness.check()


@EXAMPLES
@given(network=networks(), name=st.sampled_from(ops.names()), data=st.data())
def test_the_caller_is_as_before_after_an_exception(network: nn.Module, name: str, data: st.DataObject) -> None:
    wrong = data.draw(
        st.sampled_from([{"keep": "x"}, {"options": {"no": 1}}, {"example_inputs": torch.ones(1, 1, 9, 9)}])
    )
    witness = Witness(network)
    with pytest.raises(cs.errors.ConvSurgeonError) as caught:
        rewrite(network, name, **wrong)
    assert "\n" not in str(caught.value)
    witness.check()


@EXAMPLES
@given(network=networks(), name=st.sampled_from(ops.names()))
def test_costs_of_the_sites_sum_to_what_is_counted(network: nn.Module, name: str) -> None:
    x = image(network)
    found, the_plan = survey(network, example_inputs=x), plan(network, name)
    whole, student = totals(the_plan, found), rewrite(network, the_plan)
    assert count_macs(network, x).true == whole.macs_before == found.macs
    if not any(isinstance(module, Switch) for module in network.modules()):  # it may turn another way
        counted = count_macs(student, x)
        assert (counted.true, counted.counted) == (whole.macs_after, whole.counted_macs_after)


@EXAMPLES
@given(network=networks())
def test_an_untraceable_part_hides_no_convolution(network: nn.Module) -> None:
    found = survey(network)
    mine = {module for module in network.modules() if isinstance(module, nn.Conv2d)}
    assert {network.get_submodule(site.fqns[0]) for site in found.sites} == mine
    switches = [fqn for fqn, module in network.named_modules() if isinstance(module, Switch)]
    assert {fqn for fqn, _ in found.untraced} == ({"(root)", *switches} if switches else set())
