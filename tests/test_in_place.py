"""Ops where a convolution pads by its input's size, and where one is no module."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import conv
from torch import Tensor, fx, nn
from torch.nn import functional as F

import convsurgeon as cs
from convsurgeon import ops
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec
from convsurgeon.surgery import count_macs, survey, totals


class SameConv2d(nn.Conv2d):
    """Pads as TensorFlow does, written as the ports write it."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            input.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


SAME = {"kernel_size": (3, 5), "stride": (2, 3), "dilation": (2, 1)}


@pytest.mark.parametrize("name", ops.names())
@settings(max_examples=15)
@given(
    height=st.integers(5, 14),
    width=st.integers(5, 14),
    kernel=st.sampled_from([(3, 3), (2, 5), (4, 1)]),
    stride=st.sampled_from([(2, 2), (3, 1), (1, 2)]),
)
def test_padding_by_size_is_the_dense_ones(name: str, height: int, width: int, kernel: Any, stride: Any) -> None:
    dense = SameConv2d(4, 8, kernel, stride=stride, dtype=torch.float64)
    x = torch.randn(1, 4, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(conv(4, 4, dtype=torch.float64), dense)
    student = cs.rewrite(model, name, mapping={"*": name}, example_inputs=model[0](x).detach())
    op = student[1]
    assert isinstance(op, AbstractCheapConv)
    with torch.no_grad():
        dense.weight.copy_(op.as_dense())
        torch.testing.assert_close(op(x), dense(x))
    assert ConvSpec(4, 8, kernel, stride=stride, padding="same").output_size(height, width) == op(x).shape[-2:]


def test_padding_by_size_is_counted_saved_traced_and_exported(tmp_path: Path) -> None:
    model = nn.Sequential(conv(3, 8), SameConv2d(8, 16, **SAME), nn.ReLU(), SameConv2d(16, 8, 3)).eval()
    x = torch.randn(1, 3, 15, 17, generator=torch.Generator().manual_seed(0))
    found = survey(model, example_inputs=x)
    assert found.sites[1].note == "pads as TensorFlow does"
    assert count_macs(model, x).true == found.macs
    for name in ops.names():
        student = cs.rewrite(model, name, example_inputs=x).eval()
        plan = cs.plan_of(student)
        assert plan is not None
        cost, counted = totals(plan, found), count_macs(student, x)
        assert (counted.true, counted.counted) == (cost.macs_after, cost.counted_macs_after)
        again = pickle.loads(pickle.dumps(student))
        for y in (x, torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(0))):
            assert torch.equal(again(y), student(y))
            assert torch.equal(fx.symbolic_trace(student)(y), student(y))
        replayed = cs.rewrite(model, cs.Plan.from_json(plan.to_json()))
        assert torch.equal(replayed(x), student(x))
        delivery = cs.export(student, tmp_path / f"{name}.onnx", example_inputs=x)
        assert delivery.parity.max_rel <= 1e-4


class Functional(nn.Module):
    """Two functional convolutions: one with a bias, one of a parameter in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.kernel = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)) / 9)
        self.bias = nn.Parameter(torch.ones(16))
        self.more = nn.ParameterList([torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(1)) / 12])

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), self.kernel, self.bias, stride=(2, 1), padding=1)
        x = F.dropout(torch.relu(x), 0.5, self.training)
        return torch.conv2d(x, weight=self.more[0], padding="same")


X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ops.names())
def test_an_op_takes_the_place_of_a_functional_kernel(name: str, tmp_path: Path) -> None:
    model = Functional().eval()
    options = {"groups": 4} if name == "group" else None
    student = cs.rewrite(model, name, options=options, example_inputs=X)
    assert [d.fqn for d in cs.plan_of(student).converted] == ["kernel", "more.0"]
    assert type(student) is Functional
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.kernel.copy_(student.kernel.as_dense())
        dense.more[0].copy_(student.more[0].as_dense())
        torch.testing.assert_close(student(X), dense(X))
        assert not torch.equal(student.train()(X), student(X)), "dropout follows the mode"
    student.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    student.eval()
    assert torch.equal(pickle.loads(pickle.dumps(student))(X), student(X))
    traced = fx.symbolic_trace(student)
    assert torch.equal(traced(X), student(X))
    found = survey(model, example_inputs=X[:1])
    cost, counted = totals(cs.plan_of(student), found), count_macs(student, X[:1])
    assert (counted.true, counted.counted) == (cost.macs_after, cost.counted_macs_after)
    assert cs.export(student, tmp_path / "f.onnx", example_inputs=X).parity.max_rel <= 1e-4


def test_a_kernel_keeps_its_frozen_state_and_dtype() -> None:
    model = Functional().double().eval()
    model.kernel.requires_grad_(False)
    student = cs.rewrite(model, "depthwise")
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in student.kernel.parameters())
    assert all(p.requires_grad for p in student.more[0].parameters())


def test_an_op_is_seen_as_its_dense_kernel_by_all_else() -> None:
    op = ops.get("group").from_conv(conv(8, 8), {"groups": 2})
    torch.testing.assert_close(op.weight, op.as_dense())
    torch.testing.assert_close(torch.sum(op), op.as_dense().sum())  # type: ignore[call-overload]
    # another geometry than the op was made for: the dense kernel, and so never a wrong result
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(torch.conv2d(x, op, padding=0), torch.conv2d(x, op.as_dense()))  # type: ignore[call-overload]
    with pytest.raises(AttributeError, match="nothing"):
        _ = op.nothing


def test_a_plan_for_a_kernel_of_another_shape_is_refused() -> None:
    plan = cs.plan(Functional(), "shift")
    other = Functional()
    other.kernel = nn.Parameter(torch.zeros(16, 8, 5, 5))
    with pytest.raises(cs.errors.PlanError, match="kernel is 16x8x5x5 here and 16x8x3x3 in the plan"):
        cs.rewrite(other, plan)
