"""Deliberately broken rewrites: a law of whole models catches what is broken in its way, and no other law does."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import random
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convsurgeon.surgery._plan as surgery_plan
import convsurgeon.surgery._survey as surgery_survey
import convsurgeon.testing._model_form as form
import convsurgeon.testing._model_law as law_module
import convsurgeon.testing._model_runs as runs
from convsurgeon import ops
from convsurgeon.errors import NothingToConvertError
from convsurgeon.record import update_record
from convsurgeon.surgery import Cost, GuardReport, Plan, totals
from convsurgeon.testing import ModelCase, check_model, model_laws

Patch = pytest.MonkeyPatch
DepthwiseConv2d = ops.get("depthwise")


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


def listen(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that does nothing."""


# the guard sees it, too; and no pickle takes a closure
GUARDED = ("model_law_copies", "model_law_outputs")


class Subject(nn.Module):
    """One of everything that a rewrite could break."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.alias = self.conv
        self.plain = [self.conv]
        self.norm = nn.BatchNorm2d(8)
        self.act, self.twin, self.other, self.spare = nn.PReLU(8), nn.PReLU(8), nn.PReLU(8), nn.Identity()
        self.twin.weight = self.act.weight
        self.tied, self.also_tied = conv(), conv()
        self.also_tied.weight = self.tied.weight
        self.frozen = conv().requires_grad_(False)
        self.kernel = nn.Parameter(0.1 * torch.randn(8, 8, 3, 3))
        self.label = "subject"
        self.conv.label = "first"
        self.conv.register_forward_hook(listen)
        self.norm.register_forward_hook(listen)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x) + self.alias(x) + self.plain[0](x))
        x = self.frozen(self.other(self.twin(self.act(self.also_tied(self.tied(x))))))
        return nn.functional.conv2d(x, self.kernel)


def subject() -> ModelCase:
    torch.manual_seed(0)
    model, x = Subject(), torch.randn(2, 8, 6, 6)
    return ModelCase(model, example_inputs=x)


BROKEN: dict[str, list[tuple[Callable[[Patch], None], str, set[str]]]] = {}


def breaks(law: str, saying: str, *, also: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Say which law catches what the function below breaks, what it says, and which others cannot but fail, too."""

    def enter(apply: Any) -> Any:
        BROKEN.setdefault(law, []).append((apply, saying, {law, *also}))
        return apply

    return enter


def damages(law: str, saying: str, *, also: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """The same for a function that damages a student, or the model, after the rewrite."""

    def enter(damage: Any) -> Any:
        def apply(patch: Patch) -> None:
            damage_by(patch, damage)

        apply.__name__ = damage.__name__
        return breaks(law, saying, also=also)(apply)

    return enter


def damage_by(patch: Patch, damage: Callable[[Any, Any], None]) -> None:
    for module in (law_module, runs):
        real = module.rewrite

        def broken(model: nn.Module, *args: Any, real: Any = real, **kwargs: Any) -> nn.Module:
            student = real(model, *args, **kwargs)
            damage(student, model)
            return student

        patch.setattr(module, "rewrite", broken)


@damages("model_law_caller_untouched", "rewrite changed torch's random state")
def draws_from_torch(student: Subject, model: Subject) -> None:
    torch.rand(1)


@damages("model_law_caller_untouched", "rewrite changed Python's random state")
def draws_from_python(student: Subject, model: Subject) -> None:
    random.random()


@damages("model_law_caller_untouched", "rewrite changed numpy's random state")
def draws_from_numpy(student: Subject, model: Subject) -> None:
    np.random.rand()


@damages("model_law_caller_untouched", "rewrite changed the warnings filter")
def mutes_warnings(student: Subject, model: Subject) -> None:
    warnings.filterwarnings("ignore", message="no such warning")


@damages(
    "model_law_caller_untouched",
    "rewrite changed the values of norm.running_mean",
    also=("model_law_untouched_bits", "model_law_plan"),
)
def moves_the_callers_statistics(student: Subject, model: Subject) -> None:
    model.norm.running_mean.add_(1e-6)


@damages("model_law_caller_untouched", "rewrite changed the mode of norm")
def leaves_the_caller_in_eval_mode(student: Subject, model: Subject) -> None:
    model.norm.eval()


@damages("model_law_caller_untouched", "rewrite changed the gradient of conv.weight")
def leaves_a_gradient(student: Subject, model: Subject) -> None:
    model.conv.weight.grad = torch.zeros(8, 8, 3, 3)


@damages("model_law_caller_untouched", "rewrite changed the hooks of norm", also=("model_law_hooks",))
def leaves_a_hook(student: Subject, model: Subject) -> None:
    model.norm.register_forward_hook(listen)


@damages("model_law_caller_untouched", "rewrite changed the attributes of the root")
def leaves_an_attribute(student: Subject, model: Subject) -> None:
    model.was_here = True


@breaks("model_law_caller_untouched", "a rewrite that raises changed torch's grad mode")
def leaves_the_grad_mode_when_it_raises(patch: Patch) -> None:
    patch.setattr(form, "rewrite", lambda *args, **kwargs: torch.set_grad_enabled(False))


@breaks("model_law_caller_untouched", "rewrite changed the values of the input")
def writes_to_the_input(patch: Patch) -> None:
    real = law_module.rewrite

    def broken(model: nn.Module, to: str, *, example_inputs: Tensor) -> nn.Module:
        student = real(model, to, example_inputs=example_inputs)
        example_inputs.add_(1)
        return student

    patch.setattr(law_module, "rewrite", broken)


class Renamed(nn.BatchNorm2d):
    """The same, but for its class."""


@damages("model_law_names", "norm is a Renamed, the model's a BatchNorm2d")
def changes_a_class(student: Subject, model: Subject) -> None:
    student.norm.__class__ = Renamed


@damages("model_law_names", "the student has extra, the model has not")
def adds_a_module(student: Subject, model: Subject) -> None:
    student.extra = nn.Identity()


@damages("model_law_names", "spare is missing in the student")
def forgets_a_name(student: Subject, model: Subject) -> None:
    del student.spare


@damages("model_law_untouched_bits", "norm.weight has other values than the model's")
def rounds_a_weight(student: Subject, model: Subject) -> None:
    student.norm.weight.data[0] = torch.nextafter(student.norm.weight[0], torch.tensor(2.0))


@damages("model_law_untouched_bits", "the state besides the ops has")
def adds_to_the_state(student: Subject, model: Subject) -> None:
    student.norm.register_buffer("extra", torch.zeros(1), persistent=False)


@damages("model_law_sharing", "are one object in the model and 2 in the student")
def converts_a_shared_module_twice(student: Subject, model: Subject) -> None:
    student.alias = copy.deepcopy(student.conv)


@damages("model_law_sharing", "plain[0] and conv and alias are one object in the model and 2 in the student")
def forgets_the_plain_list(student: Subject, model: Subject) -> None:
    student.plain[0] = copy.deepcopy(student.conv)


@damages("model_law_sharing", "act.weight and twin.weight are one object in the model and 2 in the student")
def unties(student: Subject, model: Subject) -> None:
    student.act.weight = nn.Parameter(student.act.weight.detach().clone())


@damages("model_law_sharing", "act.weight and twin.weight and other.weight are one object in the student only")
def ties(student: Subject, model: Subject) -> None:
    student.other.weight = student.act.weight


@damages("model_law_apart", "norm.weight of the student shares memory with the model")
def shares_memory(student: Subject, model: Subject) -> None:
    student.norm.weight.data = model.norm.weight.data


@damages("model_law_apart", "label of the student leads to a module of the model")
def leads_to_the_model(student: Subject, model: Subject) -> None:
    student.frozen.label = model.frozen.forward


@damages("model_law_apart", "the student computes with twin.weight of the model", also=GUARDED)
def computes_with_the_model(student: Subject, model: Subject) -> None:
    # a closure, which no copy can follow, and no pickle can take
    student.act.forward = lambda x: nn.functional.prelu(x, model.act.weight)


@damages("model_law_modes", "norm has training=False, the model's True")
def leaves_a_module_in_eval_mode(student: Subject, model: Subject) -> None:
    student.norm.eval()


@damages("model_law_modes", "conv: spatial has training=False, unlike what it replaced")
def leaves_a_part_of_an_op_in_eval_mode(student: Subject, model: Subject) -> None:
    student.conv.spatial.eval()


@damages("model_law_frozen", "frozen.pointwise.weight has requires_grad=True, unlike the weight it replaced")
def thaws(student: Subject, model: Subject) -> None:
    student.frozen.pointwise.weight.requires_grad_(True)


@damages("model_law_frozen", "norm.bias has requires_grad=False, unlike the model's")
def freezes(student: Subject, model: Subject) -> None:
    student.norm.bias.requires_grad_(False)


@damages("model_law_tensors", "tied.bias is (torch.float32")
def makes_a_parameter_of_another_class(student: Subject, model: Subject) -> None:
    student.tied.bias = Biased(student.tied.bias.detach())


class Biased(nn.Parameter):
    """The same, but for its class."""


@damages("model_law_tensors", "tied.weight is (torch.float32")
def changes_the_memory_format(student: Subject, model: Subject) -> None:
    weight = student.tied.weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)


@damages(
    "model_law_tensors",
    "conv.scale is torch.float64, the kernel it replaced torch.float32",
    also=("model_law_state_dict",),
)
def adds_a_double(student: Subject, model: Subject) -> None:
    student.conv.register_buffer("scale", torch.ones(1).double())


@damages("model_law_hooks", "conv has the _forward_hooks [], the model's ['listen']")
def drops_a_hook_of_a_convolution(student: Subject, model: Subject) -> None:
    student.conv._forward_hooks.clear()


@damages("model_law_hooks", "norm has the _forward_hooks ['listen', 'listen'], the model's ['listen']")
def doubles_a_hook(student: Subject, model: Subject) -> None:
    student.norm.register_forward_hook(listen)


@damages("model_law_attributes", "label is 'other', the model's 'subject'")
def changes_an_attribute(student: Subject, model: Subject) -> None:
    student.label = "other"


@damages("model_law_attributes", "conv.label is missing in the student")
def forgets_what_was_hung_on_a_convolution(student: Subject, model: Subject) -> None:
    del student.conv.label


@damages("model_law_attributes", "kernel_size[0] is 5, the model's 3")
def lies_about_the_geometry(student: Subject, model: Subject) -> None:
    student.tied.kernel_size = (5, 3)


@breaks("model_law_reasons", "tied: the reason is ''")
def gives_no_reason(patch: Patch) -> None:
    real = surgery_plan._keep
    patch.setattr(surgery_plan, "_keep", lambda site, label, reason: real(site, label, ""))


@breaks("model_law_reasons", "no decision about also_tied")
def loses_a_site(patch: Patch) -> None:
    real = surgery_survey.walk
    patch.setattr(surgery_survey, "walk", lambda model: [w for w in real(model) if "also_tied" not in w[1]])


@breaks("model_law_reasons", "the plan decides about")
def decides_about_what_nobody_found(patch: Patch) -> None:
    real = law_module.survey

    def broken(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return replace(found, sites=tuple(site for site in found.sites if site.obstacle is None))

    patch.setattr(law_module, "survey", broken)


def unguarded(patch: Patch, answer: Callable[[Tensor, bool], Any]) -> None:
    """Let the student answer otherwise, and the guard not see it: the law compares for itself, too."""
    patch.setattr(runs, "check_outputs", lambda *args: GuardReport(None))

    def damage(student: Subject, model: Subject) -> None:
        student.forward = functools.partial(answer_by, student, answer)

    damage_by(patch, damage)


def answer_by(student: Subject, answer: Callable[[Tensor, bool], Any], x: Tensor) -> Any:
    return answer(Subject.forward(student, x), student.training)


def in_a_dict(out: Tensor, training: bool) -> Any:
    return {"out": out}


def in_double(out: Tensor, training: bool) -> Any:
    return out.double()


def without_a_row_in_training(out: Tensor, training: bool) -> Any:
    return out[:, :, 1:] if training else out


# the dense twin answers as the model, and what is rebuilt does, too
OTHERS = ("model_law_dense", "model_law_state_dict")


@breaks("model_law_outputs", "the output has the parts ['', \"['out']\"], expected ['']", also=OTHERS)
def changes_the_structure(patch: Patch) -> None:
    unguarded(patch, in_a_dict)


@breaks("model_law_outputs", "output is torch.float64, expected torch.float32", also=OTHERS)
def changes_the_dtype(patch: Patch) -> None:
    unguarded(patch, in_double)


@breaks("model_law_outputs", "output is 2x8x3x4, expected 2x8x4x4 in train mode", also=OTHERS[:1])
def changes_a_size_in_training(patch: Patch) -> None:
    unguarded(patch, without_a_row_in_training)


@breaks("model_law_outputs", "GuardError: the student's output", also=OTHERS)
def changes_the_dtype_and_is_seen_by_the_guard(patch: Patch) -> None:
    real = runs.check_outputs
    unguarded(patch, in_double)
    patch.setattr(runs, "check_outputs", real)


def forward_of_depthwise(patch: Patch, forward: Callable[[Tensor, Any], Tensor]) -> None:
    real = DepthwiseConv2d.forward
    patch.setattr(DepthwiseConv2d, "forward", lambda op, x: forward(real(op, x), op))


@breaks("model_law_dense", "in eval mode the output is off by up to")
def computes_something_else(patch: Patch) -> None:
    forward_of_depthwise(patch, lambda out, op: out * 1.5)


@breaks("model_law_dense", "in train mode the output is off by up to")
def computes_something_else_in_training(patch: Patch) -> None:
    forward_of_depthwise(patch, lambda out, op: out * 1.5 if op.training else out)


@damages("model_law_dense", "in eval mode the output is off by up to")
def loses_the_bias(student: Subject, model: Subject) -> None:
    student.conv.pointwise.bias.data.zero_()


@breaks("model_law_plan", "plan → JSON → plan is not the identity")
def loses_a_label(patch: Patch) -> None:
    patch.setattr(
        runs, "Plan", types.SimpleNamespace(from_json=lambda text: Plan.from_json(text.replace("not s", "s")))
    )


@breaks("model_law_plan", "the plan's JSON has other bytes the second time")
def writes_other_bytes(patch: Patch) -> None:
    real, calls = Plan.to_json, itertools.count()
    patch.setattr(Plan, "to_json", lambda plan: real(plan) + " " * next(calls))


@breaks("model_law_plan", "the student of the replayed plan has another conv.spatial.weight")
def replays_with_chance(patch: Patch) -> None:
    real = runs.rewrite

    def broken(model: nn.Module, to: Any, **kwargs: Any) -> nn.Module:
        student = real(model, to, **kwargs)
        with torch.no_grad():
            student.conv.spatial.weight.add_(torch.rand(1))
        return student

    patch.setattr(runs, "rewrite", broken)


@damages("model_law_plan", "plan_of(student) is not the plan that made it")
def forgets_the_plan(student: Subject, model: Subject) -> None:
    update_record(student, plan=None)


@breaks("model_law_second_rewrite", "a second rewrite does not raise NothingToConvertError")
def converts_again(patch: Patch) -> None:
    real = runs.rewrite
    patch.setattr(
        runs, "rewrite", lambda model, to, **kwargs: model if to == "depthwise" else real(model, to, **kwargs)
    )


@breaks("model_law_second_rewrite", "a second rewrite changed the mode of norm")
def refuses_and_leaves_a_trace(patch: Patch) -> None:
    real = runs.rewrite

    def broken(model: nn.Module, to: Any, **kwargs: Any) -> nn.Module:
        if to == "depthwise":
            model.norm.train(not model.norm.training)
            # the laws that follow find it as it was
            patch.setattr(runs, "rewrite", lambda *args, **kwargs: model)
            raise NothingToConvertError("nothing")
        return real(model, to, **kwargs)

    patch.setattr(runs, "rewrite", broken)


@damages("model_law_copies", "Can't pickle")
def cannot_be_pickled(student: Subject, model: Subject) -> None:
    student.note = lambda: None


@breaks("model_law_copies", "a deep copy of the student has another conv.spatial.weight")
def is_copied_without_its_weights(patch: Patch) -> None:
    patch.setattr(runs, "copy", types.SimpleNamespace(deepcopy=without_weights))


def without_weights(model: Subject) -> Subject:
    copied = copy.deepcopy(model)
    copied.conv.spatial.weight.data.zero_()
    return copied


@breaks("model_law_copies", "the output of the student from a pickle differs")
def comes_from_a_pickle_with_something_else(patch: Patch) -> None:
    def loads(data: bytes) -> Any:
        model = pickle.loads(data)
        model.norm.eps = 1.0
        return model

    patch.setattr(runs, "pickle", types.SimpleNamespace(dumps=pickle.dumps, loads=loads))


@damages("model_law_state_dict", "the state dict has conv.extra, alias.extra besides")
def has_more_state_than_is_rebuilt(student: Subject, model: Subject) -> None:
    student.conv.register_buffer("extra", torch.zeros(1))


@breaks("model_law_state_dict", "the output after a state-dict round trip differs")
def rebuilds_something_else(patch: Patch) -> None:
    real = runs.rebuild

    def broken(model: nn.Module, plan: Plan) -> nn.Module:
        student = real(model, plan)
        student.norm.eps = 1.0
        return student

    patch.setattr(runs, "rebuild", broken)


@breaks("model_law_gradients", "conv.spatial.weight gets no gradient in a training step")
def cuts_the_graph(patch: Patch) -> None:
    # the functional one is last and keeps the output's graph
    forward_of_depthwise(patch, lambda out, op: out.detach() if op.bias is not None else out)


@breaks("model_law_gradients", "the model can be trained on the example input, the student cannot")
def fails_in_a_training_step(patch: Patch) -> None:
    def forward(out: Tensor, op: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("not now")
        return out

    forward_of_depthwise(patch, forward)


@breaks("model_law_gradients", "conv.pointwise.weight gets a gradient that is not finite in a training step")
def has_no_finite_gradient(patch: Patch) -> None:
    forward_of_depthwise(patch, lambda out, op: out + 0 * torch.sqrt(0 * op.pointwise.weight.sum()))


@breaks("model_law_costs", "MACs, a counter saw")
def declares_too_little(patch: Patch) -> None:
    real = DepthwiseConv2d.macs.__func__
    patch.setattr(DepthwiseConv2d, "macs", classmethod(lambda *args, **kwargs: real(*args, **kwargs) - 1))


@breaks("model_law_costs", "one-hot taps, a counter saw 0")
def declares_taps_that_it_has_not(patch: Patch) -> None:
    patch.setattr(runs, "totals", lambda plan, found: hotter(totals(plan, found)))


def hotter(cost: Cost) -> Cost:
    assert cost.counted_macs_after is not None
    return replace(cost, counted_macs_after=cost.counted_macs_after + 1)


def broken() -> list[Any]:
    return [
        pytest.param(apply, law, saying, failing, id=f"{law}-{apply.__name__}")
        for law, entries in BROKEN.items()
        for apply, saying, failing in entries
    ]


def run_laws(case: ModelCase) -> dict[str, str]:
    """Return what the laws that fail say."""
    found: dict[str, str] = {}
    for name, law in model_laws().items():
        try:
            law(case)
        except AssertionError as error:
            found[name] = str(error)
    return found


# on some processors numbers in another order in memory are added up in another order, too
_BY_ROUNDING = {"changes_the_memory_format": {"model_law_state_dict"}}


@pytest.mark.parametrize(("apply", "law", "saying", "failing"), broken())
def test_the_law_catches_it_and_no_other_does(
    apply: Callable[[Patch], None], law: str, saying: str, failing: set[str], monkeypatch: Patch
) -> None:
    case = subject()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        apply(monkeypatch)
        found = run_laws(case)
    torch.set_grad_enabled(True)
    assert failing <= set(found) <= failing | _BY_ROUNDING.get(apply.__name__, set()), found
    assert saying in found[law]
    for name, message in found.items():
        assert message.startswith(f"Subject as depthwise breaks {name}: ")
        assert len(message.splitlines()) == 1


def test_the_honest_rewrite_breaks_no_law() -> None:
    assert run_laws(subject()) == {}


def test_every_law_catches_something() -> None:
    assert set(BROKEN) == set(model_laws())


def test_check_model_catches_what_a_law_catches(monkeypatch: Patch) -> None:
    case = subject()
    check_model(case.model, example_inputs=case.example_inputs)
    forward_of_depthwise(monkeypatch, lambda out, op: out * 1.5)
    with pytest.raises(AssertionError, match="Subject as depthwise breaks model_law_dense: in eval mode"):
        check_model(case.model, example_inputs=case.example_inputs)


def test_a_crash_of_the_rewrite_is_a_broken_law(monkeypatch: Patch) -> None:
    def crash(*args: Any, **kwargs: Any) -> nn.Module:
        raise TypeError("first line\nsecond line")

    monkeypatch.setattr(law_module, "rewrite", crash)
    case = subject()
    with pytest.raises(AssertionError, match=r"breaks model_law_caller_untouched: TypeError: first line$"):
        check_model(case.model, example_inputs=case.example_inputs)
