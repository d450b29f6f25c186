"""The rewrite: a copy that keeps everything but the convolutions that the plan names."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import Branching, Shared, Small, Witness, assert_bit_identical, conv
from odd_networks import Fusing, ReplacesAConvolutionInTraining
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon import ops
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.progress import Progress
from convsurgeon.surgery import plan, plan_of, rebuild, rewrite

X8 = torch.linspace(-1, 1, 8 * 36).reshape(1, 8, 6, 6)
X3 = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


def storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values() if tensor.numel()}


@pytest.mark.parametrize("name", ops.names())
def test_class_names_and_untouched_weights(name: str) -> None:
    model = Small()
    student = rewrite(model, name, example_inputs=X3)
    assert type(student) is Small
    assert [fqn for fqn, _ in student.named_children()] == [fqn for fqn, _ in model.named_children()]
    converted = {fqn for fqn, module in student.named_modules() if isinstance(module, AbstractCheapConv)}
    assert converted == {"conv1", "conv2", "last"}
    assert {type(student.get_submodule(fqn)) for fqn in converted} == {ops.get(name)}
    kept = student.state_dict()
    compared = 0
    for key, value in model.state_dict().items():
        if key.split(".")[0] not in converted:
            assert torch.equal(value, kept[key]), key
            compared += 1
    assert compared == 2 * 4 + 3 * 5 + 2
    assert not storages(model) & storages(student)


def test_rewrite_alone_means_depthwise() -> None:
    assert isinstance(rewrite(Small()).conv1, ops.get("depthwise"))


def test_each_op_starts_from_its_own_donor() -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8))
    student = rewrite(model)
    for index in (0, 1):
        expected = ops.get("depthwise").from_conv(model[index])
        assert_bit_identical(student[index], expected)
    assert not torch.equal(student[0].spatial.weight, student[1].spatial.weight)


def test_each_replacement_is_reported() -> None:
    events: list[Progress] = []
    rewrite(Small(), "group", report=events.append)
    seen = [(event.done, event.total, event.message) for event in events if event.stage == "replace"]
    assert seen == [(0, 3, "conv1"), (1, 3, "conv2"), (2, 3, "last"), (3, 3, "")]


def test_a_shared_module_is_converted_once_and_everywhere() -> None:
    model = Shared()
    student = rewrite(model, "shift")
    op = student.first
    assert isinstance(op, ops.get("shift"))
    assert student.alias is student.block[2] is student.plain[0] is student.lookup["a"]["b"] is op
    assert student.plain[1] is student.block[0]
    assert isinstance(student.block[0], ops.get("shift"))
    assert isinstance(model.plain[0], nn.Conv2d)
    assert model.lookup["a"]["b"] is model.first
    with torch.no_grad():
        torch.testing.assert_close(student(X8), op(torch.relu(student.block[0](op(X8)))))


def test_convolutions_inside_an_untraceable_parent_are_swapped() -> None:
    student = rewrite(Branching(), example_inputs=X8)
    assert sum(isinstance(module, AbstractCheapConv) for module in student.modules()) == 4


def test_a_root_that_is_the_convolution() -> None:
    root = conv(8, 8)
    student = rewrite(root, "shift", example_inputs=X8)
    assert isinstance(student, ops.get("shift"))
    assert plan_of(student).decisions[0].fqns == ("",)
    assert_bit_identical(student, rewrite(root, plan_of(student)))


class Counter:
    """A hook as a bound method, so that copying it copies what it belongs to."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls.append(f"forward {type(module).__name__}")

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls.append(f"pre {sorted(kwargs)}")

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        self.calls.append(f"backward {grad_input[0].shape[1]} {grad_output[0].shape[1]}")


def test_hooks_are_carried_over() -> None:
    model = nn.Sequential(conv(8, 12), nn.ReLU())
    model.counter = Counter()
    model[0].register_forward_hook(model.counter.forward)
    model[0].register_forward_pre_hook(model.counter.pre, with_kwargs=True)
    model[0].register_full_backward_hook(model.counter.backward)
    student = rewrite(model)
    student(X8.clone().requires_grad_()).sum().backward()
    # the hook's own object is copied with the model: the caller's counts nothing
    assert student.counter.calls == ["pre []", "forward DepthwiseConv2d", "backward 8 12"]
    assert model.counter.calls == []


def test_what_the_user_hung_on_a_convolution_is_carried_over() -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8))
    model[0].label = ["edges"]
    model[0].sibling = model[1]
    model[0].gain = nn.Parameter(torch.tensor(2.0))
    model[0].register_buffer("seen", torch.tensor(3), persistent=False)
    student = rewrite(model, keep="0.sibling")
    assert student[0].label == ["edges"]
    assert student[0].label is not model[0].label
    assert student[0].sibling is student[1]
    assert torch.equal(student[0].gain, model[0].gain)
    assert int(student[0].seen) == 3
    assert "0.gain" in student.state_dict()
    assert "0.seen" not in student.state_dict()
    assert student[0].gain is not model[0].gain


def test_frozen_stays_frozen() -> None:
    model = Small()
    model.conv1.requires_grad_(False)
    model.last.weight.requires_grad_(False)
    model.norm1.requires_grad_(False)
    student = rewrite(model)
    assert not any(p.requires_grad for p in (*student.conv1.parameters(), *student.norm1.parameters()))
    assert all(p.requires_grad for p in student.conv2.parameters())
    assert [name for name, p in student.last.named_parameters() if p.requires_grad] == ["pointwise.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ops.names())
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    model = Small().to(dtype).eval()
    student = rewrite(model, name, example_inputs=X3.to(dtype))
    floats = {t.dtype for t in student.state_dict().values() if t.is_floating_point()}
    assert floats == {dtype}
    assert all(torch.isfinite(t).all() for t in student.state_dict().values())


def test_mixed_dtypes_are_kept_module_by_module() -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8).double())
    student = rewrite(model)
    assert [student[i].pointwise.weight.dtype for i in (0, 1)] == [torch.float32, torch.float64]


@pytest.mark.parametrize("name", ops.names())
def test_channels_last_is_kept(name: str) -> None:
    student = rewrite(nn.Sequential(conv(8, 8), conv(8, 8)).to(memory_format=torch.channels_last), name)
    dense = [p for p in student.parameters() if p.dim() == 4]
    assert dense
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in dense)
    plain = rewrite(nn.Sequential(conv(8, 8)), name)
    assert all(p.is_contiguous() for p in plain.parameters())


def test_the_meta_device_is_kept() -> None:
    with torch.device("meta"):
        model = Small()
    assert {p.device.type for p in rewrite(model).parameters()} == {"meta"}


def test_modes_are_kept_module_by_module() -> None:
    model = Small().train()
    model.conv1.eval()
    model.norm1.eval()
    student = rewrite(model)
    for fqn, module in model.named_modules():
        assert student.get_submodule(fqn).training is module.training, fqn
    assert {module.training for module in student.conv1.modules()} == {False}
    assert {module.training for module in student.conv2.modules()} == {True}


def test_a_second_rewrite_raises_and_leaves_the_student_as_it_was() -> None:
    student = rewrite(Small())
    witness = Witness(student)
    for name in ops.names():
        with pytest.raises(cs.errors.NothingToConvertError, match="3 are converted already"):
            rewrite(student, name)
    witness.check()


def test_rewriting_further_merges_the_plans() -> None:
    model = Small()
    half = rewrite(model, "shift", only="conv*")
    whole = rewrite(half, "group", options={"groups": 4})
    assert isinstance(half.last, nn.Conv2d)
    merged = plan_of(whole)
    assert {decision.fqn: decision.op for decision in merged.converted} == {
        "conv1": "shift",
        "conv2": "shift",
        "last": "group",
    }
    assert_bit_identical(rewrite(model, merged), whole)


def test_merging_does_not_lose_what_the_later_plan_does_not_mention() -> None:
    model = Small()
    half = rewrite(model, "shift", only="conv*")
    later = plan(half, "group")
    later = replace(later, decisions=tuple(d for d in later.decisions if d.fqn == "last"))
    whole = rewrite(half, later)
    assert {d.fqn for d in plan_of(whole).converted} == {"conv1", "conv2", "last"}
    assert_bit_identical(rewrite(model, plan_of(whole)), whole)


@pytest.mark.parametrize("name", ops.names())
def test_a_replayed_plan_equals_the_direct_rewrite(name: str) -> None:
    model = Small()
    the_plan = cs.Plan.from_json(plan(model, name, mapping={"stem": "group"}).to_json())
    direct = rewrite(model, name, mapping={"stem": "group"})
    replayed = rewrite(model, the_plan, example_inputs=X3)
    assert_bit_identical(direct, replayed)
    assert plan_of(direct) == plan_of(replayed) == the_plan
    assert plan_of(copy.deepcopy(direct)) == the_plan
    assert plan_of(model) is None


def test_a_plan_may_leave_sites_out() -> None:
    the_plan = plan(Small())
    student = rewrite(Small(), replace(the_plan, decisions=the_plan.decisions[1:2]))
    assert isinstance(student.conv1, AbstractCheapConv)
    assert isinstance(student.conv2, nn.Conv2d)


def test_a_plan_comes_without_selectors() -> None:
    the_plan = plan(Small())
    for selectors in ({"keep": "x"}, {"only": "x"}, {"mapping": {"x": "shift"}}, {"options": {"a": 1}}):
        with pytest.raises(cs.errors.PlanError, match="a plan is carried out as it is"):
            rewrite(Small(), the_plan, **selectors)


def test_a_plan_for_another_model() -> None:
    with pytest.raises(cs.errors.PlanError, match="the plan was made for Small and decides about 'stem'"):
        rewrite(Shared(), plan(Small()))
    other = Small()
    other.conv2 = conv(16, 16, 5)
    with pytest.raises(cs.errors.PlanError, match="conv2 is 16→16, 5x5, padding 2 here and 16→16, 3x3"):
        rewrite(other, plan(Small()))
    apart = Shared()
    apart.alias = conv(8, 8)
    with pytest.raises(cs.errors.PlanError, match=r"decides about 'first = alias = block\.2'"):
        rewrite(apart, plan(Shared()))


def test_a_plan_that_was_edited_to_do_what_must_not_be_done() -> None:
    tied = nn.Sequential(conv(8, 8), conv(8, 8), conv(8, 8))
    tied[1].weight = tied[0].weight
    the_plan = plan(tied)
    wished = replace(the_plan.decisions[2], fqns=("0",))
    with pytest.raises(cs.errors.PlanError, match="0 cannot become depthwise: its weight is tied"):
        rewrite(tied, replace(the_plan, decisions=(wished,)))
    student = rewrite(Small())
    with pytest.raises(cs.errors.PlanError, match="conv1 is a DepthwiseConv2d; only a Conv2d can become"):
        rewrite(student, plan_of(student))
    pointwise = replace(plan(Small()).decisions[3], op="shift")
    with pytest.raises(cs.errors.UnsupportedConvError, match="shortcut: shift: needs a spatial kernel"):
        rewrite(Small(), replace(plan(Small()), decisions=(pointwise,)))


def test_a_student_has_the_structure_that_rebuild_gives() -> None:
    model = Small()
    student = rewrite(model, "shift", mapping={"last": "group"})
    rebuilt = rebuild(model, plan_of(student))
    shapes, again = ({k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (student, rebuilt))
    assert shapes == again
    assert repr(student) == repr(rebuilt)
    rebuilt.load_state_dict(student.state_dict())
    assert_bit_identical(rebuilt, student)
    student.eval()
    rebuilt.eval()
    with torch.no_grad():
        assert torch.equal(rebuilt(X3), student(X3))


class Uncopyable(Small):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = (value for value in (1, 2))


class Reader(Small):
    """Reads the weight of a convolution that will be swapped."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.last.weight.mean()


def test_the_caller_is_not_touched_also_on_failure() -> None:
    cases: list[tuple[nn.Module, dict[str, Any], type[Exception] | None]] = [
        (Small().train(), {"example_inputs": X3}, None),
        (Small().train(), {"to": "bsconv", "keep": "nothing"}, cs.errors.SelectorError),
        (Small().train(), {"example_inputs": X8}, cs.errors.SurveyError),
        (Uncopyable().train(), {}, cs.errors.SurveyError),
        (Uncopyable().train(), {"to": plan(Small())}, cs.errors.SurveyError),
        (Reader().train(), {"example_inputs": X3}, None),
        (Shared().train(), {"to": plan(Small())}, cs.errors.PlanError),
    ]
    for model, arguments, error in cases:
        model.norm1 = nn.BatchNorm2d(16).eval()
        inputs = arguments.get("example_inputs")
        before = None if inputs is None else inputs.clone()
        witness = Witness(model)
        if error is None:
            rewrite(model, **arguments)
        else:
            with pytest.raises(error) as caught:
                rewrite(model, **arguments)
            assert "\n" not in str(caught.value)
        witness.check()
        assert before is None or torch.equal(before, inputs)


def test_a_hook_that_cannot_be_copied_is_an_error_of_ours() -> None:
    class Holder:
        def __init__(self) -> None:
            self.stream = (value for value in (1, 2))

        def hook(self, *args: Any) -> None:
            return None

    model = Small()
    the_plan = plan(model)
    model.conv1.register_forward_hook(Holder().hook)
    with pytest.raises(cs.errors.SurveyError, match="a hook cannot be copied"):
        rewrite(model, the_plan)


def test_an_op_that_stands_in_reads_like_the_convolution() -> None:
    model = nn.Sequential(conv(8, 16, stride=2, bias=False), conv(16, 16))
    student = rewrite(model)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(student[0], name) == getattr(model[0], name)
    assert student[0].bias is None
    assert torch.equal(student[1].bias, model[1].bias)


def test_lists_given_as_selectors_reach_the_plan() -> None:
    student = rewrite(Small(), "shift", keep=["last"], only=["conv*", "last"], mapping={"conv2": "group"})
    ops_of = {fqn: type(student.get_submodule(fqn)).__name__ for fqn in ("conv1", "conv2", "last")}
    assert ops_of == {"conv1": "ShiftConv2d", "conv2": "GroupConv2d", "last": "Conv2d"}
    assert isinstance(rewrite(Small(), filter_fn=lambda module, fqn: fqn == "last").conv1, nn.Conv2d)


def test_a_student_trains_and_its_teacher_does_not_notice() -> None:
    model = Small()
    student = rewrite(model)
    witness = Witness(model)
    student(X3.repeat(4, 1, 1, 1)).square().sum().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.grad is not None
            parameter.add_(parameter.grad)
    witness.check()


def test_a_plan_that_converts_nothing_is_refused() -> None:
    empty = cs.Plan.from_dict({**plan(Small()).to_dict(), "decisions": []})
    with pytest.raises(cs.errors.NothingToConvertError, match="the plan for Small converts nothing"):
        rewrite(Small(), empty)


@pytest.mark.parametrize(
    ("make", "fqn", "reason"),
    [
        (Fusing, "three", "its weight is read in add when the model is switched between train and eval mode"),
        (ReplacesAConvolutionInTraining, "conv", "another module takes its place, or none, when the model runs"),
    ],
)
def test_a_plan_that_converts_what_must_be_kept_is_refused(make: Any, fqn: str, reason: str) -> None:
    model = make()
    the_plan = plan(nn.Sequential(conv(8, 8)))
    decisions = [replace(the_plan.decisions[0], fqns=(fqn,))]
    with pytest.raises(cs.errors.GuardError) as caught:
        rewrite(model, replace(the_plan, decisions=tuple(decisions)), example_inputs=X8)
    assert str(caught.value).startswith(f"{fqn} of {make.__name__} cannot be replaced: {reason}")
    assert str(caught.value).endswith(f"keep it: --keep {fqn!r}")
