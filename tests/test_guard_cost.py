"""The shape guard, and what a plan costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from nets import Shared, Small, Witness, conv
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon import ops
from convsurgeon.surgery import (
    Cost,
    check_outputs,
    cost_of,
    count_macs,
    count_params,
    example_like,
    plan,
    rewrite,
    survey,
    totals,
)

X8 = torch.linspace(-1, 1, 8 * 36).reshape(1, 8, 6, 6)
X3 = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


class Answer(nn.Module):
    """Answers whatever it is told to make of a feature map."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.conv = conv(8, 8)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.conv(x))


def pair(mine: Any, theirs: Any) -> tuple[nn.Module, nn.Module]:
    model = Answer(mine)
    student = Answer(theirs)
    student.load_state_dict(model.state_dict())
    return model, student


def test_equal_outputs_pass() -> None:
    for make in (
        lambda x: x,
        lambda x: (x, {"a": x, "b": [x, None, 3, "name"]}),
        lambda x: [],
        lambda x: {"out": x, "aux": (x, x)},
    ):
        check_outputs(*pair(make, make), X8)


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (lambda x: x, lambda x: x[..., :-1], "output has size (1, 8, 6, 5), expected (1, 8, 6, 6)"),
        (lambda x: (x, x), lambda x: (x, x[:, :-1]), "output[1] has size (1, 7, 6, 6)"),
        (
            lambda x: {"out": [x, x]},
            lambda x: {"out": [x, x.double()]},
            "output['out'][1] is torch.float64, expected torch.float32",
        ),
        (lambda x: x, lambda x: x.flatten(1), "output has 2 dimensions, expected 4"),
        (lambda x: {"a": x, "b": 1}, lambda x: {"a": x, "b": "1"}, "output['b'] is str, expected int"),
        (lambda x: {"a": x}, lambda x: {"b": x}, "output has output['b'] where output['a'] is expected"),
        (
            lambda x: (x, {"a": x, "c": [x]}),
            lambda x: (x, {"a": x, "c": [x, x]}),
            "output[1]['c'] is list of 2, expected list of 1",
        ),
        (lambda x: (x,), lambda x: [x], "output is list of 1, expected tuple of 1"),
        (lambda x: (x, 1), lambda x: (x, x), "output[1] is torch.float32, expected int"),
        (lambda x: x, lambda x: 1 / 0, "the student fails on the example input 1x8x6x6, which Answer takes"),
    ],
)
def test_what_differs_is_named(mine: Any, theirs: Any, message: str) -> None:
    with pytest.raises(cs.errors.GuardError) as caught:
        check_outputs(*pair(mine, theirs), X8)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "1x8x6x6" in str(caught.value)


def test_a_model_that_fails_on_its_own_input_is_not_the_students_fault() -> None:
    with pytest.raises(cs.errors.SurveyError, match="Answer itself fails on the example input 1x8x6x6"):
        check_outputs(*pair(lambda x: 1 / 0, lambda x: x), X8)


@pytest.mark.parametrize("name", ops.names())
def test_an_op_of_the_wrong_size_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops.get(name)
    forward = op.forward
    rewrite(Small(), name, example_inputs=X3)
    monkeypatch.setattr(op, "forward", lambda self, x: forward(self, x)[..., 1:])
    model = nn.Sequential(conv(8, 8), conv(8, 8))
    with pytest.raises(cs.errors.GuardError, match=r"has size \(1, 8, 6, 4\), expected \(1, 8, 6, 6\)"):
        rewrite(model, name, example_inputs=X8)
    monkeypatch.setattr(op, "forward", lambda self, x: forward(self, x).double())
    with pytest.raises(cs.errors.GuardError):
        rewrite(nn.Sequential(conv(8, 8)), name, example_inputs=X8)


def test_the_first_module_that_differs_is_named() -> None:
    class Block(nn.Module):
        def __init__(self, crop: int) -> None:
            super().__init__()
            self.conv, self.crop = conv(8, 8), crop

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)[..., self.crop :]

    model = nn.Sequential(conv(8, 8), Block(0), nn.ReLU())
    student = nn.Sequential(conv(8, 8), Block(1), nn.ReLU())
    with pytest.raises(cs.errors.GuardError) as caught:
        check_outputs(model, student, X8)
    assert str(caught.value).endswith("the first module that differs is 1: 1x8x6x5, expected 1x8x6x6")


class Modal(nn.Module):
    """Gives one more output in train mode, and fails there on a batch of one."""

    def __init__(self, train_columns: int = 6) -> None:
        super().__init__()
        self.conv = conv(8, 8)
        self.columns = train_columns

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        if not self.training:
            return x
        if len(x) < 2:
            raise ValueError("a batch of one")
        return x, x[..., : self.columns]


def test_train_mode_is_compared_with_a_batch_of_two() -> None:
    assert check_outputs(Modal(), Modal(), X8).not_trained is None
    with pytest.raises(cs.errors.GuardError, match=r"output\[1\] has size \(2, 8, 6, 5\).*in train mode"):
        check_outputs(Modal(), Modal(5), X8)


def test_what_keeps_train_mode_from_being_compared_is_said() -> None:
    class NeedsTargets(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets should not be None")
            return super().forward(x)

    events: list[str] = []
    rewrite(NeedsTargets(conv(8, 8)), example_inputs=X8, report=lambda event: events.append(event.message))
    assert events[-1].endswith(
        "train mode was not compared: the model itself does not run that way: ValueError: targets should not be None"
    )


def test_without_an_input_images_are_tried() -> None:
    report = check_outputs(*pair(lambda x: x, lambda x: x))
    assert report.inputs == "a generated 1x8x64x64"
    with pytest.raises(cs.errors.GuardError, match="on the example input a generated 1x8x64x64"):
        check_outputs(*pair(lambda x: x, lambda x: x[..., 1:]))
    report = check_outputs(*pair(lambda x: 1 / 0, lambda x: x))
    assert report.inputs is None
    assert "none was found that the model takes" in str(report)


def test_dataclasses_and_other_objects_are_looked_into() -> None:
    @dataclasses.dataclass
    class Result:
        logits: Tensor
        names: list[str]

    class Plain:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    for make in (lambda x: Result(x, ["a"]), Plain):
        assert check_outputs(*pair(make, make), X8).not_trained is None
    with pytest.raises(cs.errors.GuardError, match=r"output\.logits has size \(1, 8, 6, 5\)"):
        check_outputs(*pair(lambda x: Result(x, []), lambda x: Result(x[..., 1:], [])), X8)
    with pytest.raises(cs.errors.GuardError, match=r"output\.logits is torch\.float64, expected torch\.float32"):
        check_outputs(*pair(Plain, lambda x: Plain(x.double())), X8)


class Detector(nn.Module):
    """As many boxes as score above a threshold."""

    def __init__(self, columns: int = 4) -> None:
        super().__init__()
        self.conv = conv(8, 5)
        self.columns = columns

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = self.conv(x).flatten(2).transpose(1, 2)
        return [
            {"boxes": each[each[:, 4] > 0.1][:, : self.columns], "scores": each[each[:, 4] > 0.1][:, 4]}
            for each in found
        ]


def test_sizes_that_depend_on_the_data_are_forgiven() -> None:
    torch.manual_seed(1)
    model = Detector().eval()
    x = torch.randn(2, 8, 6, 6)
    student = rewrite(model, "shift", example_inputs=x)
    mine, theirs = ([len(each["boxes"]) for each in net(x)] for net in (model, student))
    assert mine != theirs
    report = check_outputs(model, student, x)
    assert set(report.data_dependent) <= {
        f"output[{i}][{key!r}] dimension 0" for i in (0, 1) for key in ("boxes", "scores")
    }
    assert report.data_dependent
    assert "left out, since they depend on the data: output[" in str(report)


def test_only_the_sizes_that_depend_on_the_data_are_forgiven() -> None:
    torch.manual_seed(1)
    model, student = Detector().eval(), rewrite(Detector(columns=3), "shift")
    with pytest.raises(cs.errors.GuardError, match=r"output\[0\]\['boxes'\] has size"):
        check_outputs(model, student, torch.randn(2, 8, 6, 6))


def test_weights_that_break_the_model_do_not_break_the_guard() -> None:
    def choosy(x: Tensor) -> Tensor:
        if bool((x == 0).all()):
            raise ValueError("nothing found")
        return x[x > 0.1]

    torch.manual_seed(0)
    model = Answer(choosy)
    model.conv.bias = None
    x = torch.randn(1, 8, 6, 6)
    student = rewrite(model, "shift", example_inputs=x)
    assert model(x).shape != student(x).shape


def test_the_guard_touches_neither_model() -> None:
    class Noisy(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2)) + torch.rand(1)

    model = Noisy().train()
    student = rewrite(model)
    x = X3.clone()
    witness = Witness(model, student)
    check_outputs(model, student, x)
    witness.check()
    assert torch.equal(x, X3)


def test_example_inputs_as_tensor_tuple_and_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor, extra: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"y": self.conv(x) + extra["z"]}

    for inputs in ((X8, {"z": X8}), {"x": X8, "extra": {"z": X8}}):
        assert isinstance(rewrite(Two(), "shift", example_inputs=inputs).conv, ops.get("shift"))
    rewrite(nn.Sequential(conv(8, 8)), example_inputs=X8)


# --- costs


@pytest.mark.parametrize("name", ops.names())
def test_costs_of_the_sites_sum_to_the_totals(name: str) -> None:
    model = Small()
    found, the_plan = survey(model, example_inputs=X3), plan(model, name)
    each = [cost_of(site, decision, found) for site, decision in zip(found.sites, the_plan.decisions, strict=True)]
    whole = totals(the_plan, found)
    assert whole == Cost.sum(each)
    assert whole.macs_before == sum(cost.macs_before for cost in each) == found.macs
    assert whole.params_before == sum(
        p.numel() for m in model.modules() if isinstance(m, nn.Conv2d) for p in m.parameters()
    )
    assert whole.macs_after < whole.macs_before
    assert whole.params_after < whole.params_before


@pytest.mark.parametrize("name", ops.names())
def test_totals_are_what_a_counter_sees(name: str) -> None:
    model = nn.Sequential(conv(3, 8), conv(8, 8, stride=2), nn.ReLU(), conv(8, 16, bias=False), conv(16, 16, groups=4))
    found, the_plan = survey(model, example_inputs=X3), plan(model, name)
    student = rewrite(model, the_plan)
    whole = totals(the_plan, found)
    before, after = count_macs(model, X3), count_macs(student, X3)
    assert (before.true, before.counted) == (whole.macs_before, whole.macs_before)
    assert (after.true, after.counted) == (whole.macs_after, whole.counted_macs_after)
    assert (count_params(model), count_params(student)) == (whole.params_before, whole.params_after)
    # and what the survey of the student itself says
    again = survey(student, example_inputs=X3)
    assert again.macs == whole.macs_after
    settled = totals(cs.Plan("x", ()), again)
    assert (settled.macs_before, settled.macs_after, settled.counted_macs_after) == (
        whole.macs_after,
        whole.macs_after,
        whole.counted_macs_after,
    )
    assert settled.params_before == settled.params_after == whole.params_after


def test_a_counter_sees_frozen_taps_that_multiply_nothing() -> None:
    model = nn.Sequential(conv(8, 8))
    shifted = count_macs(rewrite(model, "shift"), X8)
    assert shifted.true == 8 * 8 * 36
    assert shifted.counted - shifted.true == 8 * 9 * 36
    depthwise = count_macs(rewrite(model, "depthwise"), X8)
    assert depthwise.true == depthwise.counted == 8 * 8 * 36 + 8 * 9 * 36


def test_macs_scale_with_the_batch_of_the_example_and_unbatched_inputs_count_once() -> None:
    student = rewrite(nn.Sequential(conv(8, 8)), "shift")
    one = count_macs(student, X8)
    three = count_macs(student, X8.repeat(3, 1, 1, 1))
    assert (three.true, three.counted) == (3 * one.true, 3 * one.counted)
    assert count_macs(student, X8[0]) == one


def test_a_shared_convolution_costs_its_weights_once_and_its_macs_twice() -> None:
    found = survey(Shared(), example_inputs=X8)
    whole = totals(plan(Shared()), found)
    assert whole.params_before == 2 * (8 * 8 * 9 + 8) == count_params(Shared())
    assert whole.macs_before == 3 * 8 * 8 * 9 * 36 == count_macs(Shared(), X8).true


def test_without_a_run_there_are_parameters_and_no_macs() -> None:
    whole = totals(plan(Small()), survey(Small()))
    assert (whole.macs_before, whole.macs_after, whole.counted_macs_after) == (None, None, None)
    assert whole.params_after < whole.params_before


def test_one_unknown_makes_the_sum_unknown() -> None:
    assert Cost.sum([Cost(1, 2, 3, 4, 5), Cost(1, 2)]) == Cost(2, 4, None, None, None)
    assert Cost.sum([Cost(1, 2, 3, 4, 5), Cost(1, 2, 3, 4, 5)]) == Cost(2, 4, 6, 8, 10)


def test_count_params_counts_shared_ones_once_and_no_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(2, 3))
    model[2].weight = model[0].weight
    assert count_params(model) == 6 + 3 + 6 + 3


def test_count_macs_does_not_touch_the_model() -> None:
    student = rewrite(Small(), "shift").train()
    witness = Witness(student)
    count_macs(student, X3)
    witness.check()


def test_example_like() -> None:
    model = nn.Sequential(conv(3, 8)).double()
    witness = Witness(model)
    x = example_like(model, [2, 3, 4, 4])
    assert (x.shape, x.dtype) == ((2, 3, 4, 4), torch.float64)
    assert torch.equal(x, example_like(model, [2, 3, 4, 4]))
    assert 0 < float(x.std()) < 2
    witness.check()
