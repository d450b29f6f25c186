"""Calibration: what is measured, what is fitted, what comes out, what is refused."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from nets import Shared, Tiny, Witness, conv, stripes, tiny
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import convsurgeon as cs
from convsurgeon import ops
from convsurgeon.calibration import CalibrationResult, Polish, _calibrate, _fit, _moments, _polish, calibrate_and_report
from convsurgeon.calibration._answers import Closeness, closeness
from convsurgeon.calibration._capture import Places, patches_of, targets_of
from convsurgeon.calibration._fit import fit_op
from convsurgeon.calibration._images import CalibrationImages, gather
from convsurgeon.calibration._moments import Gram, Rows
from convsurgeon.calibration._norms import estimate_statistics
from convsurgeon.calibration._result import PolishRun, SiteFit, Stage
from convsurgeon.calibration._sites import CalibrationSite, sites_in_order
from convsurgeon.distillation._muon import Muon
from convsurgeon.errors import CalibrationError, DataError, DivergenceError, OptionError
from convsurgeon.ops import DepthwiseConv2d
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.spec import ConvSpec
from convsurgeon.testing import input_size, make_donor, specs

IMAGES, LABELS = stripes(80)
QUICK = {"polish": Polish(steps=12, learning_rate=0.02)}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """A network that knows the stripes."""
    data = TensorDataset(*stripes(64))
    settings = {"batch_size": 16, "learning_rate": 0.02, "warmup": 0.0, "precision": "no", "device": "cpu"}
    return cs.distill(None, tiny(), data, method="supervised", epochs=6, **settings).student


# --- what is measured


def sites_of(teacher: nn.Module, student: nn.Module, x: Tensor) -> list[CalibrationSite]:
    return sites_in_order(teacher, student, x)[0]


@settings(max_examples=60)
@given(spec=specs())
def test_patches_times_the_kernel_are_the_outputs(spec: ConvSpec) -> None:
    """Of a student whose op is exact, so that inputs and outputs belong together."""
    if DepthwiseConv2d.why_not(spec, DepthwiseConv2d.Options()):
        return
    donor = make_donor(spec)
    op = DepthwiseConv2d.from_conv(donor)
    with torch.no_grad():
        donor.weight.copy_(op.as_dense())
    x = torch.randn(3, spec.in_channels, *input_size(spec), dtype=torch.float64)
    teacher, student = nn.Sequential(donor).eval(), nn.Sequential(op).eval()
    for count in (4, 10_000):
        site, places = sites_of(teacher, student, x)[0], Places(count, seed=3)
        ((wanted,),) = targets_of(teacher, [site], [x], {"0": places})["0"]
        ((patches,),) = patches_of(student, site, [x], places, calls=1)
        bias = 0 if donor.bias is None else donor.bias
        torch.testing.assert_close(patches @ donor.weight.flatten(1).mT + bias, wanted)
        assert len(patches) == 3 * min(count, donor(x)[0, 0].numel())


def test_padding_by_size_is_measured_where_the_op_runs() -> None:
    teacher = nn.Sequential(Conv2dSame(4, 6, 3, stride=2)).eval()
    student = cs.rewrite(teacher, mapping={"*": "depthwise"})
    assert student[0].spec.pads_by_size
    x = torch.randn(2, 4, 8, 8)
    site, places = sites_of(teacher, student, x)[0], Places(100, seed=0)
    ((wanted,),) = targets_of(teacher, [site], [x], {"0": places})["0"]
    ((patches,),) = patches_of(student, site, [x], places, calls=1)
    torch.testing.assert_close(patches @ teacher[0].weight.flatten(1).mT + teacher[0].bias, wanted)


def test_places_are_the_same_again_and_differ_between_batches() -> None:
    places = Places(5, seed=1)
    first = places.choose((6, 7), 3, index=0, call=0)
    assert torch.equal(first, places.choose((6, 7), 3, index=0, call=0))
    assert not torch.equal(first, places.choose((6, 7), 3, index=1, call=0))
    assert all(len(set(row)) == 5 for row in first.tolist())
    assert places.choose((2, 2), 2, index=0, call=0).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("kind", [Gram, Rows])
def test_moments_are_the_squared_error_and_its_gradient(kind: Any) -> None:
    torch.manual_seed(0)
    x, y, weight = torch.randn(50, 7), torch.randn(50, 3), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    moments = Gram(7, 3, torch.device("cpu")) if kind is Gram else Rows()
    other = Gram(7, 3, torch.device("cpu")) if kind is Gram else Rows()
    moments.add(x[:30], y[:30])
    other.add(x[30:], y[30:])
    both = moments.merged(other)  # type: ignore[arg-type]
    expected = (x.double() @ weight.mT - y.double()).square().sum()
    expected.backward()
    value, gradient = both.value_and_gradient(weight.detach())
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-5)
    assert both.squared_error(weight.detach()) == pytest.approx(expected.item(), rel=1e-6)
    assert both.feature_energy == pytest.approx(float(x.square().sum(0).mean()), rel=1e-6)
    assert both.rows == 50
    assert both.energy == pytest.approx(float(y.square().sum()), rel=1e-6)


def test_single_precision_sums_are_as_good_as_double_ones() -> None:
    """Over many batches of features far from zero, where a float32 sum would drift."""
    torch.manual_seed(0)
    single, double = (Gram(6, 2, torch.device("cpu")) for _ in range(2))
    for _ in range(300):
        x = torch.rand(200, 6) + 10
        y = torch.rand(200, 2)
        single.add(x, y)
        double.add(x.double(), y.double())
    torch.testing.assert_close(single.gram_FF, double.gram_FF, rtol=2e-6, atol=0)


# --- what is fitted


@pytest.mark.parametrize("name", ops.names())
def test_channels_last_comes_to_the_same_fit(teacher: nn.Module, name: str) -> None:
    last = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    plain, same = (
        calibrate_and_report(network, cs.rewrite(network, name), IMAGES, polish=False) for network in (teacher, last)
    )
    assert [site.after for site in same.sites] == pytest.approx([site.after for site in plain.sites], rel=1e-3)
    strides = [tensor.stride() for tensor in cs.rewrite(last, name).state_dict().values()]
    assert [tensor.stride() for tensor in same.student.state_dict().values()] == strides


@pytest.mark.parametrize("name", ops.names())
def test_a_fit_is_never_worse_and_finds_back_what_the_op_can_do(name: str) -> None:
    torch.manual_seed(0)
    donor = nn.Conv2d(6, 6, 3, bias=False)
    truth, op = (ops.get(name).from_conv(donor) for _ in range(2))
    x = torch.randn(4000, 54)
    x[:, 1:] += x[:, :-1]  # neighbours are alike
    y = x @ truth.as_dense().detach().flatten(1).mT
    with torch.no_grad():
        for parameter in op.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    fitted, held = (Gram(54, 6, torch.device("cpu")) for _ in range(2))
    fitted.add(x[:3200], y[:3200])
    held.add(x[3200:], y[3200:])
    fit = fit_op(op, truth.as_dense().detach().flatten(1), fitted, held)
    assert 0 <= fit.after < 1e-4 < fit.before


def test_a_fit_that_would_be_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    donor = nn.Conv2d(4, 4, 3, bias=False)
    op = DepthwiseConv2d.from_conv(donor)
    before = copy.deepcopy(op.state_dict())
    x = torch.randn(500, 36)
    y = x @ donor.weight.detach().flatten(1).mT
    fitted, held = (Gram(36, 4, torch.device("cpu")) for _ in range(2))
    fitted.add(x[:400], y[:400])
    held.add(x[400:], y[400:])

    def spoil(worker: nn.Module, *_others: Any) -> None:
        with torch.no_grad():
            worker.pointwise.weight.mul_(-3)

    monkeypatch.setattr(_fit, "_minimise", spoil)
    fit = fit_op(op, donor.weight.detach().flatten(1), fitted, held)
    assert fit.after == fit.before
    assert all(torch.equal(value, before[key]) for key, value in op.state_dict().items())


def test_a_polish_that_agrees_less_is_undone(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    student = cs.rewrite(teacher)
    fitted = cs.calibrate(teacher, student, IMAGES, polish=False)

    def spoil(_teacher: nn.Module, student: nn.Module, *_others: Any, **_more: Any) -> PolishRun:
        spoilt = copy.deepcopy(student)
        with torch.no_grad():
            spoilt.fc.weight.mul_(-1)
        return PolishRun(spoilt, 1, 0.02, 64)

    monkeypatch.setattr(_calibrate, "run_polish", spoil)
    result = calibrate_and_report(teacher, student, IMAGES)
    assert result.stages[-1].note == "undone: it was further off"
    assert all(torch.equal(value, fitted.state_dict()[key]) for key, value in result.student.state_dict().items())


def test_large_sites_are_fitted_on_rows(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gram = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, polish=False)
    monkeypatch.setattr(_moments, "_GRAM_FEATURES", 10)
    with_rows = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, polish=False)
    assert with_rows.sites[0].after == pytest.approx(with_gram.sites[0].after, rel=0.02)


def test_statistics_are_averages_over_the_images() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), nn.BatchNorm2d(2)).eval()
    batches = [torch.randn(count, 2, 5, 5) * 3 + count for count in (6, 6, 2)]
    estimate_statistics(net, batches)
    torch.testing.assert_close(net[0].running_mean, torch.cat(batches).mean(dim=(0, 2, 3)))
    torch.testing.assert_close(net[2].running_mean, torch.zeros(2), atol=1e-5, rtol=0)  # no dropout in between
    assert net[0].momentum == 0.1
    assert not any(module.training for module in net.modules())


def test_no_batch_has_one_image_only() -> None:
    large = CalibrationImages(torch.zeros(9, 1, 1024, 1024), torch.zeros(2, 1, 1024, 1024))
    assert [len(batch) for batch in large.batches()] == [2, 2, 2, 3]
    assert [len(batch) for batch in large.batches(held=True)] == [2]
    small = CalibrationImages(torch.arange(257.0)[:, None], torch.zeros(2, 1))
    assert [len(batch) for batch in small.batches()] == [128, 129]
    assert torch.equal(torch.cat(list(small.batches())), small.fitted)


# --- what comes out


def agreement(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((a(images).argmax(1) == b(images).argmax(1)).float().mean())


@pytest.mark.parametrize("name", ops.names())
def test_every_op_comes_closer_to_its_teacher(name: str, teacher: nn.Module) -> None:
    student = cs.rewrite(teacher, name)
    result = calibrate_and_report(teacher, student, IMAGES, **QUICK)
    unseen, _ = stripes(200, seed=9)
    first, last = result.stages[0], result.stages[-1]
    assert [stage.name for stage in result.stages] == ["closed form", "batch-norm statistics", "fit", "polish"]
    assert last.error < first.error
    assert agreement(result.student, teacher, unseen) > max(0.9, agreement(student, teacher, unseen) - 0.01)
    assert [site.fqn for site in result.sites] == ["conv2"]
    assert all(site.after <= site.before for site in result.sites)
    assert cs.plan_of(result.student) == cs.plan_of(student)


@pytest.mark.parametrize("polish", [False, Polish(steps=3)])
def test_the_arguments_and_the_random_state_are_not_touched(polish: Any) -> None:
    teacher = tiny()
    teacher.norm.eval()
    student = cs.rewrite(teacher)
    witness = Witness(teacher, student)
    result = cs.calibrate(teacher, student, IMAGES, polish=polish)
    witness.check()
    assert not any(module.training for module in result.modules())
    assert isinstance(result, Tiny)


@pytest.mark.parametrize("polish", [False, Polish(steps=3)])
def test_the_same_seed_gives_the_same_student(teacher: nn.Module, polish: Any) -> None:
    runs = [
        cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, polish=polish, seed=seed, limit=50) for seed in (4, 4, 5)
    ]
    weights = [run.conv2.spatial.weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "images",
    [
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=7),
        [IMAGES[:40], IMAGES[40:]],
        iter([(IMAGES, LABELS)]),
        TensorDataset(IMAGES, LABELS),
    ],
    ids=["loader", "list", "iterator", "dataset"],
)
def test_images_come_in_many_forms(teacher: nn.Module, images: Any) -> None:
    result = calibrate_and_report(teacher, cs.rewrite(teacher), images, polish=False, limit=50)
    assert result.images == (40, 10)
    assert result.stages[-1].error < result.stages[0].error


class Several(nn.Module):
    """A shared convolution, one that is only a parameter, one that is never called, two branches, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 8)
        self.shared = conv(8, 8, bias=True)
        self.left, self.right = conv(8, 8), nn.utils.parametrizations.weight_norm(conv(8, 8))
        self.kernel = nn.Parameter(0.2 * torch.randn(8, 8, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))
        self.never = conv(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        x = torch.tanh(self.left(x) + self.right(x))
        return {"map": nn.functional.conv2d(x, self.kernel, self.bias, padding=1), "mean": x.mean((2, 3))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shared_functional_and_branching_convolutions_are_fitted(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher = Several().to(dtype)
    student = cs.rewrite(teacher)
    result = calibrate_and_report(teacher, student, IMAGES, polish=False)
    assert [site.fqn for site in result.sites] == ["shared", "left", "right", "kernel", "never"]
    assert "is not called" in result.sites[-1].note
    assert result.stages[-1].agreement is None
    assert result.stages[-1].error < 0.7 * result.stages[0].error
    assert {parameter.dtype for parameter in result.student.parameters()} == {dtype}


def test_the_polish_serves_outputs_that_are_no_scores() -> None:
    torch.manual_seed(0)
    teacher = Several()
    result = calibrate_and_report(
        teacher, cs.rewrite(teacher), IMAGES, polish=Polish(steps=60, learning_rate=0.02, cutmix=0.0)
    )
    assert result.stages[-1].name == "polish"
    assert result.stages[-1].error < result.stages[-2].error


def test_frozen_ops_are_calibrated_and_stay_frozen(teacher: nn.Module) -> None:
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    result = cs.calibrate(frozen, cs.rewrite(frozen), IMAGES, **QUICK)
    assert not any(parameter.requires_grad for parameter in result.parameters())


def test_a_shared_module_gives_one_site() -> None:
    teacher = Shared()
    images = torch.randn(30, 8, 6, 6)
    result = calibrate_and_report(teacher, cs.rewrite(teacher), images, polish=False)
    assert [site.fqn for site in result.sites] == ["first", "block.0"]
    assert result.stages[-1].error < result.stages[0].error


def test_a_short_trial_chooses_the_learning_rate() -> None:
    runs: list[tuple[int, float]] = []
    said: list[Progress] = []

    def run(steps: int, rate: float, report: Any) -> tuple[nn.Module, float]:
        runs.append((steps, rate))
        return nn.Linear(1, 1).requires_grad_(rate < 0.01), 1.0

    def prefers(small: bool) -> Any:
        return lambda net: float(net.weight.requires_grad is small)

    choose = _polish._choose_rate
    assert choose(run, prefers(True), Polish(), 400, said.append) == (0.005, 40)
    assert choose(run, prefers(False), Polish(), 400, said.append) == (0.02, 40)
    assert runs == [(20, 0.02), (20, 0.005)] * 2
    assert [event.message for event in said] == [
        f"learning rate {rate}: closer than another one after 20 steps" for rate in ("0.005", "0.02")
    ]
    assert choose(run, prefers(True), Polish(learning_rate=0.1), 400, said.append) == (0.1, 0)
    assert choose(run, prefers(True), Polish(), 100, said.append) == (0.02, 0)
    assert len(runs) == 4


@pytest.mark.parametrize("diverging", [(0.02,), (0.02, 0.005)])
def test_a_polish_that_diverges_is_done_again_or_undone(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch, diverging: tuple[float, ...]
) -> None:
    distill, student, said = _polish.distill, cs.rewrite(teacher), []

    def diverge(*args: Any, **kwargs: Any) -> Any:
        if kwargs["learning_rate"] in diverging and kwargs["report"] is not be_silent:
            raise DivergenceError("the loss is nan at step 7")
        return distill(*args, **kwargs)

    monkeypatch.setattr(_polish, "distill", diverge)
    result = calibrate_and_report(teacher, student, IMAGES, polish=Polish(steps=12), report=said.append)
    assert [event.message for event in said if event.message.startswith("diverged")] == [
        f"diverged at learning rate {rate:g}" for rate in diverging
    ]
    fitted = cs.calibrate(teacher, student, IMAGES, polish=False)
    same = all(torch.equal(a, b) for a, b in zip(fitted.parameters(), result.student.parameters(), strict=True))
    assert (result.stages[-1].note, same) == (("undone: it diverged", True) if len(diverging) == 2 else ("", False))
    assert {p.requires_grad for p in result.student.parameters()} == {p.requires_grad for p in student.parameters()}


def test_a_rate_that_diverges_in_its_trial_is_not_chosen() -> None:
    def run(_steps: int, rate: float, _report: Report) -> tuple[nn.Module, float]:
        if rate == 0.02:
            raise DivergenceError("the loss is nan at step 7")
        return nn.Identity(), 1.0

    assert _polish._choose_rate(run, lambda _student: -1.0, Polish(), 400, be_silent)[0] == 0.005


def test_the_polish_steps_by_muon_and_the_report_has_what_decided(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    distill = _polish.distill

    def note(*args: Any, **kwargs: Any) -> Any:
        told.append(kwargs)
        return distill(*args, **kwargs)

    monkeypatch.setattr(_polish, "distill", note)
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, **QUICK)
    assert {(each["optimizer"], each["method"]) for each in told} == {("muon", "imitate")}
    assert {name: told[-1]["method_options"][name] for name in ("blocks", "frozen_norms")} == {
        "blocks": 10.0,
        "frozen_norms": 0.5,
    }
    stages = result.to_dict()["stages"]
    assert all(stage["divergence"] > 0 for stage in stages)
    assert stages[-1]["divergence"] <= stages[-2]["divergence"]


def test_class_scores_are_ranked_by_their_divergence_and_others_by_their_error() -> None:
    scores = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    same_classes = closeness([[scores + 5.0]], [[scores]], kind="scores")
    assert same_classes.agreement == 1.0
    assert same_classes.error > 1.0
    assert same_classes.rank == pytest.approx(0.0, abs=1e-12)
    far = closeness([[2 * scores]], [[scores]], kind="scores")
    target = scores.softmax(1)
    expected = (target * (target.log() - (2 * scores).softmax(1).log())).sum(1).mean()
    assert -far.rank == pytest.approx(float(expected), rel=1e-5)
    maps = torch.rand(2, 1, 4, 4)
    assert closeness([[2 * maps]], [[maps]], kind="values").rank == pytest.approx(-1.0)


@pytest.mark.parametrize("steps", [3, 17])
def test_the_polish_takes_as_many_steps_as_it_was_told(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    taken: list[int] = []
    distill, step = _polish.distill, Muon.step

    def begin(*args: Any, **kwargs: Any) -> Any:
        taken.append(0)
        return distill(*args, **kwargs)

    def count(self: Muon, closure: Any = None) -> Any:
        taken[-1] += 1
        return step(self, closure)

    monkeypatch.setattr(_polish, "distill", begin)
    monkeypatch.setattr(Muon, "step", count)
    cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, polish=Polish(steps=steps, batch_size=20))
    assert taken[-1] == steps


def test_progress_says_what_the_polish_will_take(teacher: nn.Module) -> None:
    events: list[Progress] = []
    calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, report=events.append, polish=Polish(steps=11))
    said = [event.message for event in events if event.message.startswith("polish: 11 steps of 64 images, about ")]
    assert len(said) == 1
    assert [event.figures["after"] <= event.figures["before"] for event in events if event.stage == "fit"] == [True]


def test_targets_that_do_not_fit_into_memory_are_taken_in_turns(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(conv(1, 8), conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8))
    at_once = calibrate_and_report(net, cs.rewrite(net), IMAGES, polish=False)
    monkeypatch.setattr(_calibrate, "_TARGET_BYTES", 1)
    in_turns = calibrate_and_report(net, cs.rewrite(net), IMAGES, polish=False)
    assert at_once.sites == in_turns.sites


class Boxes(Tiny):
    """Answers with four numbers an image that are pixels, none of them below 0."""

    def forward(self, x: Tensor) -> Tensor:
        return 20 * super().forward(x).sigmoid() + 3


@pytest.mark.parametrize(
    ("network", "answers", "are_scores"),
    [
        (Boxes, "auto", False),
        (Tiny, "values", False),
        (Boxes, "scores", True),
    ],
)
def test_what_kind_of_answers_are_matched(
    network: type[nn.Module], answers: Any, are_scores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    distill = _polish.distill

    def note(*args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["method_options"])
        return distill(*args, **kwargs)

    monkeypatch.setattr(_polish, "distill", note)
    torch.manual_seed(0)
    teacher = network()
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, answers=answers, **QUICK)
    assert all((stage.agreement is not None) is are_scores for stage in result.stages)
    assert {each["answers"] for each in told} == {"scores" if are_scores else "values"}
    with pytest.raises(
        OptionError, match="answers must be one of auto, scores, values, probabilities, multilabel, got 'boxes'"
    ):
        cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, answers="boxes")  # type: ignore[arg-type]


class Auxiliary(Tiny):
    """Answers with a second head while it trains."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return (scores, scores[:, :2]) if self.training else scores


def test_what_is_answered_in_training_only_is_left_alone() -> None:
    torch.manual_seed(0)
    teacher = Auxiliary().eval()
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, **QUICK)
    assert result.stages[-1].error < result.stages[0].error


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_gradients_are_switched_off(teacher: nn.Module, around: Any) -> None:
    wanted = cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, **QUICK)
    with around():
        images = IMAGES + 0
        found = cs.calibrate(teacher, cs.rewrite(teacher), images, **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), found.parameters(), strict=True))
    assert not any(parameter.is_inference() for parameter in found.parameters())


class Odd(nn.Module):
    """Convolves the first image only, an image without its batch, and pairs of images side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.bare, self.folded = conv(1, 8), conv(8, 8), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x[:1])
        x = x + self.bare(x[0])
        twice = self.folded(torch.cat([x, -x]))
        return (twice[: len(x)] + twice[len(x) :]).mean(dim=(2, 3))


def test_convolutions_that_see_other_batches() -> None:
    torch.manual_seed(0)
    teacher = Odd().eval()
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, polish=False)
    sites = {site.fqn: site for site in result.sites}
    assert list(sites) == ["first", "folded", "bare"]
    assert all(sites[fqn].after < sites[fqn].before for fqn in ("first", "folded"))
    assert sites["bare"] == SiteFit("bare", None, None, None, "takes one image without a batch; as it was")


def test_large_sites_keep_a_bounded_sample_and_say_so(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moments, "_GRAM_FEATURES", 10)
    monkeypatch.setattr(_moments, "_ROWS", 200)
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, polish=False)
    assert result.sites[0].note == "fitted on a sample of 192 positions"
    assert result.sites[0].after < result.sites[0].before


@pytest.mark.parametrize("moments", [Gram, Rows])
def test_a_large_fit_gets_fewer_iterations(moments: type, monkeypatch: pytest.MonkeyPatch) -> None:
    op, donor = DepthwiseConv2d.build(ConvSpec(4, 4, (3, 3)), {}), torch.randn(4, 36)
    parts = [moments(36, 4, torch.device("cpu")) if moments is Gram else moments() for _ in range(2)]
    for part in parts:
        x = torch.randn(50, 36)
        part.add(x, x @ donor.mT)
    asked: list[int] = []
    lbfgs = torch.optim.LBFGS

    def note(*args: Any, max_iter: int, **kwargs: Any) -> Any:
        asked.append(max_iter)
        return lbfgs(*args, max_iter=max_iter, **kwargs)

    monkeypatch.setattr(torch.optim, "LBFGS", note)
    fit_op(copy.deepcopy(op), donor, *parts)
    assert asked == [25, 25, 25, 150]
    asked.clear()
    # the trials see the fitted rows alone, the last run those held out, too
    monkeypatch.setattr(_fit, "_WORK", 225 * (4 * 36 * 36 if moments is Gram else 2 * 4 * 36 * 100) / 3)
    fit_op(copy.deepcopy(op), donor, *parts)
    assert asked == ([10, 10, 10, 50] if moments is Gram else [16, 16, 16, 50])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"limit": 10.5}, "limit, the number of calibration images, must be a whole number from 10, got 10.5"),
        ({"limit": "50"}, "limit, the number of calibration images, must be a whole number from 10, got '50'"),
        ({"limit": 9}, "limit, the number of calibration images, must be a whole number from 10, got 9"),
    ],
)
def test_limits_that_are_refused(teacher: nn.Module, what: Any, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, **what)


@pytest.mark.parametrize(
    "setting",
    [{"batch_size": 0}, {"steps": -1}, {"steps": 1.5}, {"seconds": float("nan")}, {"learning_rate": 0.0}],
)
def test_a_polish_of_nothing_is_refused(setting: Any) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(OptionError, match=f"Polish: {name} must be a (whole )?number above 0, got {value}"):
        Polish(**setting)
    with pytest.raises(OptionError, match=f"Polish: {name} must be a (whole )?number above 0, got '7'"):
        Polish(**{name: "7"})
    with pytest.raises(OptionError, match="option cutmix must be a share from 0 to 1, got 2"):
        Polish(cutmix=2)


def test_a_fit_that_is_further_off_is_undone(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    student = cs.rewrite(teacher)
    with torch.no_grad():
        for parameter in student.conv2.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))

    def spoil(run: Any, site: CalibrationSite, *_others: Any) -> None:
        with torch.no_grad():
            site.op.pointwise.weight.neg_()
        run.fits.append(SiteFit(site.fqn, 0.1, 0.05, 1e-3))

    monkeypatch.setattr(_calibrate._Run, "_fit_site", spoil)
    monkeypatch.setattr(_calibrate, "estimate_statistics", lambda network, _images: network.norm.running_mean.add_(9))
    result = calibrate_and_report(teacher, student, IMAGES, polish=False)
    assert result.stages[-1].note == "undone: it was further off"
    assert result.stages[-1].error == result.stages[0].error
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in result.student.state_dict().items())


def test_statistics_alone_are_kept_where_the_fit_is_further_off(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = cs.rewrite(teacher)
    student.norm.running_mean.add_(1.0)
    monkeypatch.setattr(_calibrate._Run, "_fit_site", lambda _run, site, *_others: site.op.pointwise.weight.data.neg_())
    result = calibrate_and_report(teacher, student, IMAGES, polish=False)
    assert result.stages[-1].note == "undone: new batch-norm statistics alone are closer"
    assert result.stages[-1].error == result.stages[1].error < result.stages[0].error
    assert torch.equal(result.student.conv2.pointwise.weight, student.conv2.pointwise.weight)
    assert not torch.equal(result.student.norm.running_mean, student.norm.running_mean)


class InPlace(Tiny):
    """Prepares its input where it lies."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).mul_(2.0))


class Apart(Tiny):
    """Prepares a copy of its input in the same way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) * 2.0)


def test_a_network_may_prepare_its_input_in_place() -> None:
    results = []
    for kind in (InPlace, Apart):
        torch.manual_seed(0)
        teacher = kind().eval()
        results.append(calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES.clone(), **QUICK))
    in_place, apart = results
    assert [stage.error for stage in in_place.stages] == [stage.error for stage in apart.stages]


def test_imitation_shows_teacher_and_student_the_same_images() -> None:
    students = []
    for kind in (InPlace, Apart):
        torch.manual_seed(0)
        teacher = kind().eval()
        loader = DataLoader(TensorDataset(IMAGES), batch_size=20)
        students.append(cs.distill(teacher, cs.rewrite(teacher), loader, method="imitate", epochs=1).student)
    in_place, apart = students
    assert all(torch.equal(a, b) for a, b in zip(in_place.parameters(), apart.parameters(), strict=True))


def test_answers_that_nothing_is_comparable_with(teacher: nn.Module) -> None:
    maps = nn.Sequential(conv(1, 8), conv(8, 8)).eval()
    with pytest.raises(CalibrationError, match="needs a row of two class scores or more an image, and the teacher's"):
        cs.calibrate(maps, cs.rewrite(maps), IMAGES, answers="scores")
    broken = copy.deepcopy(teacher)
    broken.fc.bias.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="the teacher answers with NaN or infinite numbers on these images"):
        cs.calibrate(broken, cs.rewrite(broken), IMAGES)


class Direct(nn.Module):
    """Calls a convolution past its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.past = conv(1, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return type(self.past).forward(self.past, self.stem(x)).mean((2, 3))


def test_a_convolution_whose_outputs_are_not_seen_is_none_that_fits() -> None:
    torch.manual_seed(0)
    teacher = Direct().eval()
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, polish=False)
    assert [(site.before, site.after) for site in result.sites] == [(None, None)]
    assert result.sites[0].note.endswith("as it was")


def test_statistics_of_norms_that_do_not_run_stay_and_shared_ones_weigh_images_alike() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.idle = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(x) + self.shared(3 * x)

    net = Net().eval()
    net.idle.running_mean.fill_(7.0)
    net.idle.num_batches_tracked.fill_(30)
    batches = [torch.randn(count, 2, 5, 5) + count for count in (6, 2)]
    estimate_statistics(net, batches)
    torch.testing.assert_close(net.shared.running_mean, 2 * torch.cat(batches).mean(dim=(0, 2, 3)))
    assert (net.idle.running_mean.tolist(), int(net.idle.num_batches_tracked)) == ([7.0, 7.0], 30)
    assert not any(len(norm._forward_pre_hooks) for norm in (net.shared, net.idle))


def test_a_polish_whose_first_steps_diverge_is_undone(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_args: Any, **_more: Any) -> Any:
        raise DivergenceError("the loss is nan at step 1")

    monkeypatch.setattr(_polish, "distill", diverge)
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES)
    assert result.stages[-1].note == "undone: it diverged"


def test_a_polish_that_is_stopped_says_nothing_of_runs_and_folders(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: Any, **_more: Any) -> Any:
        raise KeyboardInterrupt("stopped after step 20 of 100; nothing was kept: no run folder")

    monkeypatch.setattr(_polish, "distill", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped in the polish; nothing was kept$"):
        cs.calibrate(teacher, cs.rewrite(teacher), IMAGES)


@pytest.mark.parametrize("seed", [-1, 2**40, 1.5, None, True])
def test_seeds_that_are_refused(teacher: nn.Module, seed: Any) -> None:
    with pytest.raises(OptionError, match="seed must be a whole number from 0 to 4294967295, got "):
        cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, seed=seed)


def test_odd_teachers_and_images(teacher: nn.Module) -> None:
    wanted = cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, **QUICK)
    learning = cs.calibrate(teacher, cs.rewrite(teacher), IMAGES.clone().requires_grad_(), **QUICK)
    compiled = cs.calibrate(torch.compile(teacher), cs.rewrite(teacher), IMAGES, **QUICK)
    for found in (learning, compiled):
        assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), found.parameters(), strict=True))
    with pytest.warns(FutureWarning, match="deprecated"):
        traced = torch.jit.trace(teacher, IMAGES[:1])
    with pytest.raises(CalibrationError, match=r"cannot be calibrated: .* give the network"):
        cs.calibrate(traced, cs.rewrite(teacher), IMAGES)


def test_half_precision_is_fitted_and_not_polished(teacher: nn.Module) -> None:
    half = copy.deepcopy(teacher).half()
    with pytest.raises(CalibrationError, match=r"conv1\.weight is torch\.float16, in which the polish cannot train"):
        cs.calibrate(half, cs.rewrite(half), IMAGES)


def test_whatever_a_forward_raises_is_one_line() -> None:
    class Lookup(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward({28: x}[x.shape[-1]])

    teacher = Lookup()
    with pytest.raises(
        CalibrationError, match="the student cannot take 64 images of 1x8x8: KeyError: 8; give them as it"
    ):
        cs.calibrate(teacher, cs.rewrite(teacher, example_inputs=torch.zeros(1, 1, 28, 28)), IMAGES)


class Stream(IterableDataset[Any]):
    """Gives images and labels one by one, or in batches."""

    def __init__(self, *, batched: bool) -> None:
        self.batched = batched

    def __iter__(self) -> Any:
        return iter(
            [(IMAGES[:40], LABELS[:40]), (IMAGES[40:], LABELS[40:])]
            if self.batched
            else zip(IMAGES, LABELS, strict=True)
        )


@pytest.mark.parametrize("batched", [False, True])
def test_streams_of_samples_and_of_batches(batched: bool) -> None:
    taken = gather(Stream(batched=batched), limit=50, seed=0)
    assert torch.equal(torch.cat([taken.held, taken.fitted]).sum(), IMAGES[:50].sum())
    assert (len(taken.fitted), len(taken.held)) == (40, 10)


def test_whole_numbers_in_a_dataset_are_refused(teacher: nn.Module) -> None:
    pixels = TensorDataset((IMAGES * 255).to(torch.uint8))
    with pytest.raises(DataError, match=r"must be a float batch, prepared as the network takes it, got torch\.uint8"):
        cs.calibrate(teacher, cs.rewrite(teacher), pixels)


def test_a_polish_that_agrees_on_fewer_says_so(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Closeness(0.9, 0.5, 0.3), Closeness(0.9, 0.4, 0.2), Closeness(0.8, 0.3, 0.1)])
    monkeypatch.setattr(_calibrate._Run, "statistics", lambda _self: None)
    monkeypatch.setattr(_calibrate._Run, "fit", lambda _self: None)
    monkeypatch.setattr(_calibrate, "closeness", lambda *_args, **_more: next(found))
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, **QUICK)
    assert result.stages[-1].note == "kept: closer in all, though it agrees on fewer images"


def test_the_result_as_plain_data(teacher: nn.Module) -> None:
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, polish=False)
    assert isinstance(result, CalibrationResult)
    data = result.to_dict()
    assert data["images"] == {"fitted": 64, "held_out": 16}
    assert data["sites"][0]["fqn"] == "conv2"
    assert data["peak_memory"] > 10**8
    assert 0 < data["seconds"] < 600


class Stubborn(Tiny):
    """Does in training what a network may do that was made for other losses, or for use only."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "raises" and self.training:
            raise ValueError("targets should not be None")
        answer = super().forward(x)
        return answer.detach() if self.way == "detached" else answer


def test_a_student_that_cannot_be_trained_is_fitted_and_not_polished() -> None:
    teacher = Stubborn("detached")
    student = cs.rewrite(teacher)
    result = calibrate_and_report(teacher, student, IMAGES, **QUICK)
    assert result.stages[-1].note.startswith("left out: the student cannot be trained: no gradient comes from")
    fitted = cs.calibrate(teacher, student, IMAGES, polish=False)
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), result.student.parameters(), strict=True))


def test_a_student_that_runs_in_eval_mode_only_is_polished_there() -> None:
    teacher = Stubborn("raises")
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, **QUICK)
    assert result.polish is not None
    assert (result.polish.steps, result.polish.obstacle) == (12, "")


def test_a_frozen_student_is_polished(teacher: nn.Module) -> None:
    """Its ops learn whatever their flags say, and the flags stay."""
    student = cs.rewrite(teacher).requires_grad_(False)
    result = calibrate_and_report(teacher, student, IMAGES, **QUICK)
    assert result.polish is not None
    assert (result.polish.steps, result.polish.obstacle) == (12, "")
    assert not any(parameter.requires_grad for parameter in result.student.parameters())


class Gate(nn.Module):
    """Sends on the rows only that its own data choose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(1, 4), conv(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        size = h.abs().mean(dim=(1, 2, 3))
        chosen = size > size.median() * 1.02
        means = h.mean((2, 3))
        more: Tensor = self.second(h[chosen]).mean((2, 3))
        return self.head(means.index_put((chosen,), more, accumulate=True))  # type: ignore[no-any-return]


def test_rows_that_the_data_choose() -> None:
    """Teacher and student choose different ones, and which belong together is not known."""
    torch.manual_seed(0)
    teacher = Gate()
    student = cs.rewrite(teacher, mapping={"first": "shift", "second": "shift"}, example_inputs=IMAGES[:4])
    result = calibrate_and_report(teacher, student, IMAGES, **QUICK)
    notes = {site.fqn: site.note for site in result.sites}
    assert notes["first"] == ""
    assert notes["second"] in ("", "takes other rows than in the teacher; as it was")
    assert result.stages[-1].name == "polish"


def test_moments_of_different_numbers_of_rows(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(*args: Any, **more: Any) -> Any:
        return ([patches[:-1] for patches in calls] for calls in patches_of(*args, **more))

    monkeypatch.setattr(_calibrate, "patches_of", fewer)
    result = calibrate_and_report(teacher, cs.rewrite(teacher), IMAGES, polish=False)
    assert {site.note for site in result.sites} == {"takes other rows than in the teacher; as it was"}
    assert {site.after for site in result.sites} == {None}


def test_a_student_that_was_converted_in_two_steps() -> None:
    dense = nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 4))
    once = cs.rewrite(dense, mapping={"0": "shift"}, only="0")
    twice = cs.rewrite(once, "depthwise", only="2")
    result = calibrate_and_report(once, twice, IMAGES, polish=False)
    notes = {site.fqn: site.note for site in result.sites}
    assert notes == {"2": "", "0": "is a cheap convolution in the teacher already; as it was"}
    assert {site.fqn for site in calibrate_and_report(dense, twice, IMAGES, polish=False).sites} == {"0", "2"}
    with pytest.raises(CalibrationError, match="the teacher has every cheap convolution of the student already; give"):
        cs.calibrate(twice, copy.deepcopy(twice), IMAGES)


def test_numbers_that_are_none(teacher: nn.Module) -> None:
    student = cs.rewrite(teacher)
    with torch.no_grad():
        next(student.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"the student's conv1\.weight holds NaN or infinite numbers; make it"):
        cs.calibrate(teacher, student, IMAGES)
    gram = Gram(2, 1, torch.device("cpu"))
    gram.add(torch.ones(3, 2), torch.ones(3, 1))
    assert str(gram.squared_error(torch.full((1, 2), torch.nan))) == "nan"
    stage = Stage("fit", None, float("inf"), 1.0, divergence=float("nan"))
    result = CalibrationResult(student, (stage,), (), (8, 2), 1.0, None, 0, None)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))["stages"][0]
    assert (written["error"], written["divergence"], written["seconds"]) == (None, None, 1.0)


@pytest.mark.parametrize("polish", ["no", {"steps": 10}, None, 1])
def test_a_polish_of_another_kind(teacher: nn.Module, polish: Any) -> None:
    with pytest.raises(OptionError, match="polish must be True, False or a Polish, got "):
        cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, polish=polish)


@pytest.mark.parametrize("wrong", [{"flip": "no"}, {"steps": True}, {"seconds": True}])
def test_settings_of_another_kind(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"Polish: {next(iter(wrong))} must be "):
        Polish(**wrong)


def test_seeds_of_other_whole_numbers(teacher: nn.Module) -> None:
    student = cs.rewrite(teacher)
    fits = [cs.calibrate(teacher, student, IMAGES, polish=False, seed=seed) for seed in (3, np.int64(3))]
    assert all(torch.equal(a, b) for a, b in zip(*(fit.parameters() for fit in fits), strict=True))
    cs.calibrate(teacher, student, IMAGES, polish=False, seed=2**32 - 1)


# --- what is refused


def test_what_cannot_be_calibrated_is_said_in_one_line(teacher: nn.Module) -> None:
    student = cs.rewrite(teacher)
    wrong: list[tuple[type[Exception], str, Any, Any, Any]] = [
        (CalibrationError, "no cheap convolution", teacher, teacher, IMAGES),
        (CalibrationError, "no convolution 'conv2'", nn.Sequential(conv(1, 4)), student, IMAGES),
        (CalibrationError, "8x8x3x3 .* give the network", _wider(), student, IMAGES),
        (CalibrationError, "cannot take 16 images of 3x8x8", teacher, student, torch.zeros(20, 3, 8, 8)),
        (DataError, "at least 10 images, got 3", teacher, student, IMAGES[:3]),
        (DataError, "NaN", teacher, student, IMAGES * float("nan")),
        (DataError, "float batch", teacher, student, (IMAGES * 0).to(torch.uint8)),
        (DataError, "got int", teacher, student, 5),
        (DataError, "one shape", teacher, student, [IMAGES, torch.zeros(4, 1, 9, 9)]),
        (DataError, "must be a tensor, got str", teacher, student, ["a.png"]),
    ]
    for kind, said, a, b, images in wrong:
        with pytest.raises(kind, match=said) as caught:
            cs.calibrate(a, b, images, polish=False)
        assert "\n" not in str(caught.value)


def _wider() -> nn.Module:
    net = tiny()
    net.conv2 = conv(8, 16)
    return net


def test_shifts_are_chosen_by_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neighbouring pixels are alike the strongest taps are not the best ones."""
    torch.manual_seed(0)
    donor = nn.Conv2d(6, 8, 3, bias=False)
    images = nn.functional.avg_pool2d(torch.randn(40, 6, 24, 24), 5, stride=1, padding=2)
    patches = nn.functional.unfold(images, 3).mT.flatten(0, 1)
    outputs = patches @ donor.weight.detach().flatten(1).mT
    fitted, held = (Gram(54, 8, torch.device("cpu")) for _ in range(2))
    fitted.add(patches[:8000], outputs[:8000])
    held.add(patches[8000:10_000], outputs[8000:10_000])

    def error_and_taps(assignment: str) -> tuple[float, Tensor, Tensor]:
        op = ops.get("shift").from_conv(donor, {"assignment": assignment})
        before = op.taps.clone()
        return fit_op(op, donor.weight.detach().flatten(1), fitted, held).after, before, op.taps

    for assignment in ("balanced", "fixed"):
        _, before, after = error_and_taps(assignment)
        assert torch.equal(before, after)
    by_data, before, after = error_and_taps("energy")
    assert not torch.equal(before, after)
    monkeypatch.setattr(ops.get("shift"), "choose_by_data", lambda op, gram, cross: None)
    by_kernel, before, after = error_and_taps("energy")
    assert torch.equal(before, after)
    assert by_data < 0.97 * by_kernel
