"""Networks that give something else in train mode than in eval mode, and networks that keep parts in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import conv, stripes
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import convsurgeon as cs
from convsurgeon.calibration import Polish, calibrate_and_report
from convsurgeon.calibration._norms import estimate_statistics
from convsurgeon.distillation import methods, objectives
from convsurgeon.distillation._output_form import choose_form
from convsurgeon.errors import DistillationError
from convsurgeon.evaluation import float_leaves
from convsurgeon.progress import Progress

IMAGES, LABELS = stripes(96)
DATA = TensorDataset(IMAGES, LABELS)
RUN: dict[str, Any] = {"epochs": 4, "batch_size": 16, "precision": "no", "device": "cpu", "warmup": 0.0}


class Trunk(nn.Module):
    """A classifier of striped images, and what else its heads give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(1, 8), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = conv(8, 8), nn.BatchNorm2d(8)
        self.aux, self.head = nn.Linear(8 * 16, 4), nn.Linear(8 * 16, 4)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(x)))
        return tuple(functional.adaptive_avg_pool2d(each, 4).flatten(1) for each in (x, y))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Any:
        early, late = self.features(x)
        return self.answer(self.aux(early), self.head(late))

    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return main


class SoftmaxInUse(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return main if self.training else main.softmax(1)


class LogSoftmaxInUse(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return main if self.training else main.log_softmax(1)


class SigmoidInUse(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return main if self.training else torch.sigmoid(main)


class AuxiliaryFirst(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return [aux, main] if self.training else main


class AuxiliaryInADict(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return {"aux": aux, "out": main} if self.training else main


class AuxiliaryFirstOfProbabilities(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return (aux, main) if self.training else (main.softmax(1), main)


class Stacked(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return torch.stack([aux, main]) if self.training else main


class MeanInUse(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return (aux, main) if self.training else (aux + main) / 2


class FunctionalDropout(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return functional.dropout(main, 0.5, self.training)


class OwnStochasticDepth(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        kept = torch.rand(len(main), 1) < 0.8 if self.training else 1
        return main * kept


class RandomAndOther(Trunk):
    """Its two modes have nothing in common but their sizes."""

    def answer(self, aux: Tensor, main: Tensor) -> Any:
        return functional.dropout(main, 0.2, training=True) if self.training else main.softmax(1)


class TargetsInTraining(Trunk):
    def answer(self, aux: Tensor, main: Tensor) -> Any:
        if self.training:
            raise ValueError("targets should not be None")
        return main


class DecodedWithoutGradient(Trunk):
    """As the heads of detectors do."""

    def answer(self, aux: Tensor, main: Tensor) -> Any:
        if self.training:
            return [aux, main]
        with torch.no_grad():
            return torch.cat([aux.sigmoid(), main.exp()], 1)


class OwnBatchNorm(nn.Module):
    """Batch norm as somebody wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)[0]
            self.mean.lerp_(mean.detach(), 0.1)
        return x - mean


class WithOwnBatchNorm(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = OwnBatchNorm()  # type: ignore[assignment]


CLASSIFIERS: list[type[Trunk]] = [
    Trunk,
    SoftmaxInUse,
    LogSoftmaxInUse,
    AuxiliaryFirst,
    AuxiliaryInADict,
    AuxiliaryFirstOfProbabilities,
    Stacked,
    MeanInUse,
    FunctionalDropout,
    OwnStochasticDepth,
    RandomAndOther,
    TargetsInTraining,
    WithOwnBatchNorm,
]
OTHERS: list[type[Trunk]] = [SigmoidInUse, DecodedWithoutGradient]


def trained(kind: type[Trunk]) -> Trunk:
    """A network whose both heads know the stripes, in eval mode."""
    torch.manual_seed(0)
    network = kind()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(40):
        early, late = network.features(IMAGES)
        loss = functional.cross_entropy(network.aux(early), LABELS)
        loss = loss + functional.cross_entropy(network.head(late), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def blurred(teacher: nn.Module, noise: float = 0.3) -> nn.Module:
    """A student whose ops are somewhat off."""
    student = cs.rewrite(teacher, "depthwise", example_inputs=IMAGES[:4])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.conv2.parameters():
            parameter.add_(noise * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return student


@torch.no_grad()
def error(student: nn.Module, teacher: nn.Module) -> float:
    """Squared error of the outputs in eval mode over the teacher's squares."""
    pairs = list(zip(float_leaves(student.eval()(IMAGES)), float_leaves(teacher.eval()(IMAGES)), strict=True))
    return float(sum((s - t).square().sum() for s, t in pairs) / sum(t.square().sum() for _, t in pairs))


@pytest.mark.parametrize("kind", [*CLASSIFIERS, *OTHERS])
def test_a_student_that_imitates_comes_closer_in_use(kind: type[Trunk]) -> None:
    teacher = trained(kind)
    student = blurred(teacher)
    settings = {
        **RUN,
        "learning_rate": 0.01,
        "optimizer": "muon",
        "method_options": {"cutmix": 0.0, "frozen_norms": 0.5},
    }
    result = cs.distill(teacher, student, TensorDataset(IMAGES), method="imitate", **settings)
    assert error(result.student, teacher) < 0.5 * error(student, teacher)


@pytest.mark.parametrize("kind", [*CLASSIFIERS, *OTHERS])
def test_calibration_polishes_it(kind: type[Trunk]) -> None:
    teacher = trained(kind)
    polish = Polish(steps=40, learning_rate=0.005, cutmix=0.0)
    result = calibrate_and_report(teacher, blurred(teacher), IMAGES, polish=polish)
    assert result.polish is not None
    assert result.polish.obstacle == ""
    errors = [stage.error for stage in result.stages]
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("method", ["frozen", "joint", "supervised"])
def test_labels_are_learned_by_what_is_used(kind: type[Trunk], method: str) -> None:
    teacher = trained(kind)
    student = blurred(teacher, noise=5.0)
    before = cs.evaluate(student, DATA).accuracy
    assert before < 0.9
    result = cs.distill(teacher, student, DATA, method=method, learning_rate=0.05, **RUN)
    assert cs.evaluate(result.student, DATA).accuracy > 0.95


@pytest.mark.parametrize("kind", [AuxiliaryFirst, AuxiliaryInADict, SoftmaxInUse])
def test_the_scores_of_training_are_those_that_are_used(kind: type[Trunk]) -> None:
    network = trained(kind)
    form = choose_form([network], IMAGES[:8], for_labels=True)
    assert form.training
    form.apply(network, learns=True)
    norms = network.norm1, network.norm2
    for norm in norms:
        norm.eval()
    _, late = network.features(IMAGES)
    torch.testing.assert_close(form.scores(network(IMAGES)), network.head(late))


@pytest.mark.parametrize("kind", [Trunk, WithOwnBatchNorm, FunctionalDropout, OwnStochasticDepth])
def test_ordinary_networks_train_as_they_always_did(kind: type[Trunk]) -> None:
    """Also with a layer of their own and, by labels, dropout of their own; a teacher that does not learn is at rest."""
    teacher, student = trained(kind), trained(kind)
    for for_labels in (True,) if kind in (FunctionalDropout, OwnStochasticDepth) else (False, True):
        form = choose_form([teacher, student], IMAGES[:8], for_labels=for_labels)
        assert (form.training, form.modes_agree, form.index, form.probabilities) == (True, True, 0, False)
        form.apply(student, learns=True)
        assert all(module.training for module in student.modules())
        form.apply(teacher, learns=False)
        assert not any(module.training for module in teacher.modules())


def test_a_teacher_in_the_form_of_training_does_not_change() -> None:
    network = trained(DecodedWithoutGradient)
    form = choose_form([network], IMAGES[:8], for_labels=False)
    assert form.training
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    form.apply(network, learns=False)
    assert isinstance(network(IMAGES), list)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class NoForm(Trunk):
    """Is of no use for learning in either mode."""

    def answer(self, aux: Tensor, main: Tensor) -> Any:
        if self.training:
            raise ValueError("targets should not be None")
        return main.detach()


REASONS = (
    "in eval mode no gradient comes from its answers; take away what detaches them, as torch.no_grad() does; "
    "in train mode the network fails: ValueError: targets should not be None"
)


def test_calibration_keeps_the_fit_where_no_form_serves() -> None:
    teacher = trained(NoForm)
    student = blurred(teacher)
    result = calibrate_and_report(teacher, student, IMAGES, polish=Polish(steps=12))
    assert result.stages[-1].name == "polish"
    assert result.stages[-1].note.endswith(REASONS)
    fitted = cs.calibrate(teacher, student, IMAGES, polish=False)
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), result.student.parameters(), strict=True))


def test_distill_says_that_no_form_serves() -> None:
    teacher = trained(NoForm)
    for method, data in (("imitate", TensorDataset(IMAGES)), ("frozen", DATA)):
        with pytest.raises(DistillationError, match="no gradient comes from its answers"):
            cs.distill(teacher, blurred(teacher), data, method=method, **RUN)


class FailsLater(Trunk):
    """Fails in training on batches larger than those that are looked at first."""

    def answer(self, aux: Tensor, main: Tensor) -> Any:
        if self.training and self.norm1.training and len(main) > 8:
            raise IndexError("out of room")
        return main


def test_calibration_keeps_the_fit_where_a_step_fails() -> None:
    teacher = trained(Trunk)
    other = FailsLater()
    other.load_state_dict(teacher.state_dict())
    other.eval()
    result = calibrate_and_report(other, blurred(other), IMAGES, polish=Polish(steps=12))
    assert result.stages[-1].note == "left out: the student cannot be trained: IndexError: out of room"


# --- what a network's own train() keeps in eval mode


def freeze_first(network: nn.Module, mode: bool) -> None:
    network.norm1.eval()  # type: ignore[union-attr,operator]


def freeze_both(network: nn.Module, mode: bool) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = False


def freeze_by_flag(network: nn.Module, mode: bool) -> None:
    if mode:
        network.norm1.train(False)  # type: ignore[union-attr,operator]


FREEZES: dict[str, Callable[[nn.Module, bool], None]] = {
    "the first norm": freeze_first,
    "all norms": freeze_both,
    "in train mode only": freeze_by_flag,
}


def frozen_class(base: type[Trunk], how: str) -> type[Trunk]:
    class Frozen(base):  # type: ignore[misc,valid-type]
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            FREEZES[how](self, mode)
            return self

    return Frozen


def statistics(network: nn.Module) -> Tensor:
    return torch.cat([network.norm1.running_mean, network.norm1.running_var]).clone()  # type: ignore[union-attr,list-item]


@pytest.mark.parametrize("how", FREEZES)
@pytest.mark.parametrize("method", methods.names())
def test_a_frozen_norm_stays_as_it_is_in_every_method(how: str, method: str) -> None:
    teacher = trained(frozen_class(Trunk, how))
    student = blurred(teacher)
    before = statistics(student)
    options: dict[str, Any] = {"peers": 2} if method == "ensemble" else {}
    data = TensorDataset(IMAGES + 1, LABELS)
    settings = {**RUN, "epochs": 1, "learning_rate": 0.001}
    result = cs.distill(teacher, student, data, method=method, method_options=options, **settings)
    assert torch.equal(statistics(result.student), before)
    if how != "all norms":
        assert not torch.equal(result.student.norm2.running_mean, student.norm2.running_mean)


@pytest.mark.parametrize("how", FREEZES)
@pytest.mark.parametrize("kind", [Trunk, SoftmaxInUse, DecodedWithoutGradient])
def test_a_frozen_norm_stays_as_it_is_in_calibration(how: str, kind: type[Trunk]) -> None:
    teacher = trained(frozen_class(kind, how))
    student = blurred(teacher)
    before = statistics(student)
    result = cs.calibrate(teacher, student, IMAGES + 1, polish=Polish(steps=12))
    assert torch.equal(statistics(result), before)


def test_statistics_of_frozen_norms_are_not_estimated() -> None:
    network = trained(frozen_class(Trunk, "the first norm"))
    before = statistics(network)
    other = network.norm2.running_mean.clone()
    estimate_statistics(network, [IMAGES + 1])
    assert torch.equal(statistics(network), before)
    assert not torch.equal(network.norm2.running_mean, other)
    assert not any(module.training for module in network.modules())


def test_only_frozen_norms_leave_the_stage_out() -> None:
    teacher = trained(frozen_class(Trunk, "all norms"))
    said: list[Progress] = []
    result = calibrate_and_report(teacher, blurred(teacher), IMAGES, polish=False, report=said.append)
    assert [stage.name for stage in result.stages] == ["closed form", "fit"]
    assert result.stages[-1].note == ""


@pytest.mark.parametrize("kind", ["scores", "multilabel", "probabilities", "distribution"])
def test_outputs_of_train_mode_are_values_where_those_of_eval_mode_are_others(kind: Any) -> None:
    teacher = trained(DecodedWithoutGradient)
    setting = methods.Setting(objectives.get("kd")({}), IMAGES[:8], 4, True, 0, outputs=kind)
    method: Any = methods.get("imitate")(teacher, blurred(teacher), setting=setting, options={})
    assert (method.form.training, method.kind) == (True, "values")
