"""What kind of outputs a network gives: by what shows it, and what is done with each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import conv
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import convsurgeon as cs
from convsurgeon.calibration import Polish, _polish, calibrate_and_report
from convsurgeon.distillation import Augmentation, methods, objectives
from convsurgeon.distillation.methods import Setting
from convsurgeon.distillation.methods.imitate import cut_mix, signal_axis
from convsurgeon.errors import CalibrationError, DistillationError, DivergenceError
from convsurgeon.evaluation import float_leaves
from convsurgeon.outputs import (
    PreciseShares,
    Source,
    binary_divergence,
    binary_divergence_of_logits,
    divergence_of,
    kind_of_outputs,
    last_operation,
    look_at_outputs,
)
from convsurgeon.progress import Progress
from convsurgeon.record import update_record

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images / 16, dtype=torch.float32)[:, None]
LABELS = torch.tensor(DIGITS.target)
TRAINED_ON, HELD = slice(0, 1400), slice(1400, 1797)
QUICK = Polish(steps=12, learning_rate=0.02)


def attributes(labels: Tensor) -> Tensor:
    """Several labels an image."""
    return torch.stack(
        [labels % 2 == 0, labels > 4, labels % 3 == 0, labels < 3, (labels == 1) | (labels == 7)], 1
    ).float()


def centers(images: Tensor) -> Tensor:
    """Where the ink is, `(N, 8)`: four pairs of coordinates from -1 to 1."""
    places = torch.linspace(-1, 1, 8)
    found = []
    for ink in (images, images.clamp_max(0.5), images**2, images[..., :4, :].repeat(1, 1, 2, 1) + 0.1):
        total = ink.sum((1, 2, 3))
        found += [(ink.sum((1, 2)) * places).sum(1) / total, (ink.sum((1, 3)) * places).sum(1) / total]
    return torch.stack(found, 1)


def triplets(rows: Tensor, labels: Tensor) -> Tensor:
    apart, same = torch.cdist(rows, rows), labels[:, None] == labels
    return functional.relu((apart * same).max(1).values - (apart + 1e6 * same).min(1).values + 1).mean()


class Normalized(nn.Module):
    """Rows of unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x)


Loss = Callable[[Tensor, Tensor], Tensor]
TASKS: dict[str, tuple[int, list[nn.Module], Loss, Tensor]] = {
    "ten classes": (10, [], functional.cross_entropy, LABELS),
    "two classes": (2, [], functional.cross_entropy, (LABELS > 4).long()),
    "three classes": (3, [], functional.cross_entropy, LABELS % 3),
    "smoothed labels": (10, [], functools.partial(functional.cross_entropy, label_smoothing=0.1), LABELS),
    "one-hot regression": (10, [], functional.mse_loss, functional.one_hot(LABELS, 10).float()),
    "softmax": (10, [nn.Softmax(1)], lambda p, y: functional.nll_loss((p + 1e-9).log(), y), LABELS),
    "log-softmax": (10, [nn.LogSoftmax(1)], functional.nll_loss, LABELS),
    "sigmoids": (5, [nn.Sigmoid()], functional.binary_cross_entropy, attributes(LABELS)),
    "one sigmoid": (1, [nn.Sigmoid()], functional.binary_cross_entropy, (LABELS > 4).float()[:, None]),
    "multi-label logits": (5, [], functional.binary_cross_entropy_with_logits, attributes(LABELS)),
    "embedding": (16, [], triplets, LABELS),
    "unit embedding": (16, [Normalized()], triplets, LABELS),
    "normed embedding": (16, [nn.LayerNorm(16)], triplets, LABELS),
    "tanh keypoints": (8, [nn.Tanh()], functional.mse_loss, centers(IMAGES)),
    "keypoints": (8, [], functional.mse_loss, 5 * centers(IMAGES)),
    "one number": (1, [], functional.mse_loss, LABELS[:, None].float()),
}


@functools.cache
def trained(task: str, epochs: int = 6) -> nn.Module:
    """Return a small network that has learned a task on digits, in eval mode."""
    width, last, loss, targets = TASKS[task]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = [conv(1, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 16, stride=2), nn.BatchNorm2d(16), nn.ReLU()]
        net = nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, width), *last)
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(1400).split(64):
                loss(net(IMAGES[chosen]), targets[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return net.eval().requires_grad_(True)


@torch.no_grad()
def look(net: nn.Module, **more: Any) -> Any:
    return look_at_outputs(net, IMAGES[HELD], net(IMAGES[HELD]), first=lambda answer: float_leaves(answer)[0], **more)


# --- found without a word


@pytest.mark.parametrize(
    ("task", "kind", "sure"),
    [
        ("ten classes", "scores", True),
        ("two classes", "scores", True),
        ("three classes", "scores", True),
        ("smoothed labels", "scores", True),
        ("one-hot regression", "scores", True),
        ("log-softmax", "scores", True),
        ("softmax", "distribution", True),
        ("sigmoids", "probabilities", True),
        ("one sigmoid", "probabilities", True),
        ("unit embedding", "values", True),
        ("tanh keypoints", "values", True),
        ("one number", "values", True),
        ("multi-label logits", "values", False),
        ("embedding", "values", False),
        ("normed embedding", "values", False),
        ("keypoints", "values", False),
    ],
)
def test_the_kind_of_outputs_of_trained_networks(task: str, kind: str, sure: bool) -> None:
    found = look(trained(task))
    assert (found.kind, found.sure) == (kind, sure), found
    assert bool(found.question("answers='scores'")) is not sure


def test_a_network_that_has_learned_nothing_is_no_classifier_by_its_numbers_alone() -> None:
    found = look(trained("ten classes", epochs=0))
    assert (found.kind, found.sure) == ("values", False)


PAIRS = torch.randint(1400, (3000, 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("task", "kind"), [("hundred classes", "scores"), ("two of ten labels", "values")])
def test_many_classes_and_labels_of_which_each_image_has_as_many(task: str, kind: str) -> None:
    """Adam, which moves all scores of an image together; and sigmoids whose sum is the same for every image."""
    images, numbers = torch.cat([IMAGES[side] for side in PAIRS.T], dim=3), LABELS[PAIRS]
    several = functional.one_hot(numbers, 10).amax(1).float()
    width, loss, targets = {
        "hundred classes": (100, functional.cross_entropy, numbers[:, 0] * 10 + numbers[:, 1]),
        "two of ten labels": (10, functional.binary_cross_entropy_with_logits, several),
    }[task]
    torch.manual_seed(0)
    net = nn.Sequential(conv(1, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 32, stride=2), nn.ReLU())
    net = nn.Sequential(net, nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(), nn.Linear(256, width))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(6):
        for chosen in torch.randperm(2600).split(64):
            loss(net(images[chosen]), targets[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        outputs = net(images[2600:])
    assert kind_of_outputs(outputs, last_operation="linear").kind == kind


@pytest.mark.parametrize(
    ("task", "labels", "kind"),
    [
        ("multi-label logits", attributes(LABELS), "multilabel"),
        ("multi-label logits", attributes(LABELS).bool(), "multilabel"),
        ("sigmoids", attributes(LABELS), "probabilities"),
        ("ten classes", LABELS, "scores"),
        ("ten classes", functional.one_hot(LABELS, 10), "scores"),
        ("keypoints", 5 * centers(IMAGES), "values"),
        ("embedding", LABELS, "values"),  # ten classes, sixteen numbers
        ("ten classes", torch.zeros_like(LABELS), "scores"),  # of images without labels
    ],
)
def test_labels_tell_the_kind(task: str, labels: Tensor, kind: str) -> None:
    assert look(trained(task), labels=labels).kind == kind


@pytest.mark.parametrize("labels", [LABELS, functional.one_hot(LABELS, 10)])
def test_labels_tell_the_kind_of_a_network_that_has_learned_nothing(labels: Tensor) -> None:
    found = look(trained("ten classes", epochs=0), labels=labels)
    assert (found.kind, found.sure) == ("scores", True)
    assert look(trained("ten classes", epochs=0), class_names=10).kind == "scores"
    assert look(trained("ten classes", epochs=0), class_names=7).kind == "values"


RANDOM = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("source", "kind", "sure"),
    [
        (Source(names=12), "scores", True),
        (Source(names=7), "values", False),
        (Source(counts=(("num_classes", 12),)), "scores", True),
        (Source(counts=(("n_classes", 12),)), "scores", True),
        (Source(counts=(("num_classes", 0),), package="timm"), "values", True),
        (Source(counts=(("num_classes", 7),)), "values", False),
        (Source(package="torchvision"), "values", False),
    ],
)
def test_what_a_network_says_of_itself(source: Source, kind: str, sure: bool) -> None:
    found = kind_of_outputs(RANDOM, last_operation="linear", source=source)
    assert (found.kind, found.sure) == (kind, sure)


def test_a_count_of_classes_is_not_believed_where_all_scores_are_low_together() -> None:
    """As those of a network that was fine-tuned for several labels an image, most of them absent."""
    source = Source(counts=(("num_classes", 12),), package="timm")
    assert kind_of_outputs(RANDOM - 3, last_operation="linear", source=source).kind == "values"
    assert kind_of_outputs(RANDOM - 0.5, last_operation="linear", source=source).kind == "scores"


@pytest.mark.parametrize("where", ["attribute", "record", "arguments", "library"])
def test_where_a_network_says_it(where: str) -> None:
    import torchvision

    net: nn.Module = trained("ten classes", epochs=0)
    images = IMAGES[HELD]
    if where == "library":
        net, images = torchvision.models.mobilenet_v3_small().eval(), torch.randn(4, 3, 32, 32)
    else:
        net = nn.Sequential(*net)
    if where == "attribute":
        net.num_classes = 10
    elif where == "record":
        update_record(net, classes=[str(number) for number in range(10)])
    elif where == "arguments":
        update_record(net, source={"name": "torchvision:resnet18", "args": {"num_classes": 10}})
    with torch.no_grad():
        found = look_at_outputs(net, images, net(images), first=lambda answer: answer)
    assert (found.kind, found.sure) == ("scores", True), found


@pytest.mark.parametrize(
    ("said", "task", "kind"),
    [
        ("values", "ten classes", "values"),
        ("scores", "embedding", "scores"),
        ("multilabel", "multi-label logits", "multilabel"),
        ("probabilities", "sigmoids", "probabilities"),
        ("probabilities", "softmax", "distribution"),
    ],
)
def test_what_is_said_decides(said: Any, task: str, kind: str) -> None:
    assert look(trained(task), said=said, labels=LABELS).kind == kind


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (torch.rand(32, 4), "values"),  # shares, pixels, boxes
        (torch.rand(32, 1, 4, 4), "values"),
        (torch.randn(32), "values"),
        (torch.randn(32, 1), "values"),
        (torch.randn(32, 10, 4, 4), "values"),
        (torch.randn(32, 10, 4, 4).softmax(1), "values"),  # nothing says that a softmax made it
    ],
)
def test_shape_and_range(output: Tensor, kind: str) -> None:
    assert kind_of_outputs(output, last_operation="linear").kind == kind


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (None, "values"),
        (torch.randint(2, (32, 4)), "probabilities"),
        (torch.arange(32) % 4, "probabilities"),
        (torch.rand(32, 4), "values"),
    ],
)
def test_a_sigmoid_that_nobody_sees_is_told_by_labels(labels: Tensor | None, kind: str) -> None:
    assert kind_of_outputs(torch.rand(32, 4), last_operation="reciprocal", labels=labels).kind == kind


def test_few_images_tell_nothing() -> None:
    output = look_at_outputs  # the trained classifier's scores, of some images only
    net = trained("ten classes")
    with torch.no_grad():
        found = output(net, IMAGES[:8], net(IMAGES[:8]), first=lambda answer: answer)
    assert (found.kind, found.sure) == ("values", False)
    assert "8 images are too few" in found.question("answers='scores'")


# --- the last operation


LINEAR = nn.Linear(4, 3)
X = torch.randn(5, 4)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: torch.sigmoid(LINEAR(X)), "sigmoid"),
        (lambda: LINEAR(X).sigmoid(), "sigmoid"),
        (lambda: LINEAR(X).sigmoid_(), "sigmoid"),
        (lambda: nn.Sigmoid()(LINEAR(X)), "sigmoid"),
        (lambda: torch.special.expit(LINEAR(X)), "sigmoid"),
        (lambda: torch.sigmoid(LINEAR(X))[:, :1].squeeze(1), "sigmoid"),
        (lambda: torch.sigmoid(LINEAR(X)).reshape(-1, 1).clone(), "sigmoid"),
        (lambda: torch.cat([torch.sigmoid(LINEAR(X)), torch.sigmoid(X)], 1), "sigmoid"),
        (lambda: torch.cat([torch.sigmoid(LINEAR(X)), torch.tanh(X)], 1), ""),
        (lambda: nn.Tanh()(LINEAR(X)), "tanh"),
        (lambda: functional.hardtanh(LINEAR(X)), "tanh"),
        (lambda: functional.softmax(LINEAR(X), 1), "softmax"),
        (lambda: functional.log_softmax(LINEAR(X), 1), "log_softmax"),
        (lambda: LINEAR(X), "linear"),
        (lambda: nn.Linear(4, 3, bias=False)(X), "linear"),
        (lambda: LINEAR(X) / 2.0, "linear"),
        (lambda: LINEAR(X[None])[0], "linear"),
        (lambda: nn.Conv2d(4, 3, 1)(X[:, :, None, None]).flatten(1), "linear"),
        (lambda: nn.Conv2d(4, 3, 1)(X[:, :, None, None]).mean((2, 3)), "linear"),
        (
            lambda: nn.AdaptiveAvgPool2d(1)(nn.Conv2d(4, 3, 1)(X[:, :, None, None].repeat(1, 1, 2, 2))).flatten(1),
            "linear",
        ),
        (lambda: torch.relu(LINEAR(X)), "relu"),
        (lambda: nn.LayerNorm(3)(LINEAR(X)), "native_layer_norm"),
        (lambda: X, ""),
    ],
)
def test_the_last_operation(run: Callable[[], Tensor], expected: str) -> None:
    assert last_operation(run) == expected


# --- how far apart


def test_the_binary_divergence_is_its_formula() -> None:
    s, t = torch.rand(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    expected = sum(
        float(functional.kl_div(torch.stack([a, 1 - a]).log(), torch.stack([b, 1 - b]), reduction="sum"))
        for a, b in zip(s.flatten(), t.flatten(), strict=True)
    )
    assert float(binary_divergence(s, t)) == pytest.approx(expected)
    assert float(binary_divergence_of_logits(s.logit(), t.logit())) == pytest.approx(expected)
    assert float(binary_divergence(t, t)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("target", [0.0, 1e-30, 0.3, 1 - 6e-8, 1.0])
@pytest.mark.parametrize("logit", [-200.0, -60.0, 0.0, 20.0, 200.0])
def test_probabilities_at_the_ends_have_finite_gradients(logit: float, target: float) -> None:
    x = torch.full((2, 3), logit, requires_grad=True)
    loss = binary_divergence(x.sigmoid(), torch.full((2, 3), target))
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(x.grad.isfinite().all())
    if abs(logit) < 16:
        torch.testing.assert_close(x.grad, x.detach().sigmoid() - target)


@pytest.mark.parametrize("kind", ["scores", "distribution", "probabilities", "multilabel"])
def test_divergences_are_those_of_the_distributions(kind: Any) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 4)
    give = {"distribution": lambda x: x.softmax(1), "probabilities": torch.sigmoid}.get(kind, lambda x: x)
    other = {"scores": "distribution", "distribution": "scores", "probabilities": "multilabel"}.get(
        kind, "probabilities"
    )
    again = {"distribution": lambda x: x.softmax(1), "probabilities": torch.sigmoid}.get(other, lambda x: x)
    assert divergence_of(give(a), give(b), kind) == pytest.approx(divergence_of(again(a), again(b), other), rel=1e-4)
    assert divergence_of(give(b), give(b), kind) == pytest.approx(0, abs=1e-6)


def imitation(net: nn.Module, kind: Any, **options: Any) -> Any:
    net = copy.deepcopy(net)
    student = cs.rewrite(net, mapping={"3": "depthwise"})
    setting = Setting(objectives.get("kd")({}), IMAGES[:8], 0, True, 0, kind)
    return methods.get("imitate")(net, student, setting=setting, options={"cutmix": 0.0, "blocks": 0.0, **options})


@pytest.mark.parametrize(
    ("task", "kind"),
    [("softmax", "distribution"), ("sigmoids", "probabilities"), ("multi-label logits", "multilabel")],
)
def test_each_kind_is_matched_by_its_own_divergence(task: str, kind: Any) -> None:
    method = imitation(trained(task), kind).eval()
    loss = float(method(IMAGES[:8], LABELS[:8]).loss.detach())
    with torch.no_grad():
        student, teacher = method.student(IMAGES[:8]), method.teacher(IMAGES[:8])
    if kind == "distribution":
        assert loss == pytest.approx(float(objectives.get("kd")({})(student.log(), teacher.log())), rel=1e-4)
    else:
        assert loss == pytest.approx(divergence_of(student, teacher, kind) / 8, rel=1e-4)
    values = imitation(trained(task), kind, answers="values").eval()
    assert loss != pytest.approx(float(values(IMAGES[:8], LABELS[:8]).loss.detach()))


# --- by the verbs


@pytest.mark.parametrize(
    ("task", "agrees", "told"),
    [
        ("ten classes", True, 0),
        ("softmax", True, 0),
        ("sigmoids", False, 0),
        ("unit embedding", False, 0),
        ("embedding", False, 1),
        ("multi-label logits", False, 1),
    ],
)
def test_calibrate_compares_by_the_kind_and_asks_where_it_is_open(task: str, agrees: bool, told: int) -> None:
    net, said = trained(task), []
    student = cs.rewrite(net, mapping={"3": "depthwise"})
    result = calibrate_and_report(net, student, IMAGES[HELD], polish=QUICK, report=said.append)
    assert all((stage.agreement is not None) is agrees for stage in result.stages)
    assert result.stages[-1].error < result.stages[0].error
    questions = [event.message for event in said if "--answers scores" in event.message]
    assert len(questions) == told
    assert all("\n" not in question and "matched as values" in question for question in questions)


@pytest.mark.parametrize(
    "images",
    [
        DataLoader(TensorDataset(IMAGES[HELD], LABELS[HELD]), batch_size=50),
        TensorDataset(IMAGES[HELD], LABELS[HELD]),
        [(IMAGES[HELD], LABELS[HELD])],
        list(zip(IMAGES[HELD].split(40), LABELS[HELD].split(40), strict=True)),
        DataLoader(TensorDataset(IMAGES[HELD], functional.one_hot(LABELS[HELD], 10)), batch_size=50),
    ],
    ids=["loader", "dataset", "pairs", "batches", "one-hot"],
)
def test_labels_beside_the_images_of_a_calibration_are_looked_at(images: Any) -> None:
    net = trained("ten classes", epochs=0)
    result = calibrate_and_report(net, cs.rewrite(net, mapping={"3": "depthwise"}), images, polish=False)
    assert result.stages[0].agreement is not None


@pytest.mark.parametrize("labels", ["names", None, [1.0, 2.0]])
def test_labels_that_are_no_tensors_do_no_harm(labels: Any) -> None:
    net = trained("ten classes")
    images = [(IMAGES[HELD], labels)]
    result = calibrate_and_report(net, cs.rewrite(net, mapping={"3": "depthwise"}), images, polish=False)
    assert result.stages[0].agreement is not None


@pytest.mark.parametrize(
    ("task", "answers", "told"),
    [
        ("ten classes", "auto", 0),
        ("embedding", "auto", 1),
        ("embedding", "values", 0),
        ("sigmoids", "probabilities", 0),
    ],
)
def test_imitation_asks_where_it_is_open(task: str, answers: str, told: int) -> None:
    said: list[Progress] = []
    net = trained(task)
    cs.distill(
        net,
        cs.rewrite(net, mapping={"3": "depthwise"}),
        TensorDataset(IMAGES[:128]),
        method="imitate",
        method_options={"answers": answers},
        epochs=1,
        batch_size=64,
        device="cpu",
        report=said.append,
    )
    assert sum("--method-option answers=scores" in event.message for event in said) == told


@pytest.mark.parametrize(("answers", "said"), [("probabilities", "from 0 to 1"), ("scores", "row of two class scores")])
def test_what_cannot_be_is_refused(answers: Any, said: str) -> None:
    net = trained("one number")
    student = cs.rewrite(net, mapping={"3": "depthwise"})
    with pytest.raises(CalibrationError, match=said):
        cs.calibrate(net, student, IMAGES[HELD], answers=answers)
    with pytest.raises(DistillationError, match=said):
        cs.distill(
            net,
            student,
            TensorDataset(IMAGES[:64]),
            method="imitate",
            method_options={"answers": answers},
            device="cpu",
        )


def test_a_polish_of_probabilities_brings_them_closer() -> None:
    net = trained("sigmoids")
    student = cs.rewrite(net, mapping={"3": "group"}, options={"group.groups": 4})
    result = calibrate_and_report(net, student, IMAGES[TRAINED_ON], polish=Polish(steps=60, learning_rate=0.02))
    divergences = [stage.divergence for stage in result.stages]
    assert divergences[-1] < 0.95 * divergences[-2] < 0.95 * divergences[0]
    assert result.stages[-1].note == ""


@pytest.mark.parametrize(
    "share",
    [
        torch.sigmoid,
        lambda x: x.sigmoid(),
        nn.Sigmoid(),
        functional.sigmoid,
        torch.special.expit,
        nn.Softmax(1),
        lambda x: x.softmax(1),
        lambda x: torch.softmax(x, dim=1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_probabilities_are_not_rounded_to_one(share: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.tensor([[9.0, -2.0], [7.5, 0.0]], dtype=dtype)
    with PreciseShares():
        found = share(x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), share(x.double()))
    assert share(x).dtype == dtype


def test_imitation_under_autocast_sees_what_bf16_does_not() -> None:
    """Of a teacher and a student that are both surer than 0.998, and not alike."""
    method = imitation(trained("sigmoids"), "probabilities").eval()
    with torch.no_grad():
        method.student[8].bias += 9
        method.teacher[8].bias += 7
        exact = float(method(IMAGES[:8], LABELS[:8]).loss)
        with torch.autocast("cpu", torch.bfloat16):
            assert float(method(IMAGES[:8], LABELS[:8]).loss) == pytest.approx(exact, rel=0.2)


# --- signals


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((6, 1, 50, 1), 2),
        ((6, 1, 1, 50), 3),
        ((6, 12, 50, 1), 2),
        ((6, 2, 50), 2),
        ((6, 1, 8, 8), None),
        ((6, 4, 1, 1), None),
        ((6, 9), None),
    ],
)
def test_signals_are_mixed_by_stretches(shape: tuple[int, ...], axis: int | None) -> None:
    assert signal_axis(shape) == axis
    if axis is None:
        return
    torch.manual_seed(0)
    images = torch.arange(6.0).view(6, *[1] * (len(shape) - 1)).expand(shape).clone()
    before, lengths = images.clone(), set()
    for _ in range(20):
        mixed = cut_mix(images)
        assert torch.equal(images, before)
        rows = mixed.movedim(axis, -1).reshape(6, -1, 50)[:, 0]
        other = rows != torch.arange(6.0)[:, None]
        assert torch.equal(rows[other], torch.arange(6.0).roll(1)[:, None].expand(6, 50)[other])
        assert torch.equal(other, other[:1].expand(6, 50))
        assert int(other[0].diff().sum()) <= 2  # one stretch
        lengths.add(int(other[0].sum()))
    assert len(lengths) > 10


@pytest.mark.parametrize(("shape", "share"), [((16, 1, 32, 1), 0.5), ((16, 6, 32, 1), 0.5), ((16, 6, 8, 8), 0.0)])
def test_a_polish_mixes_pictures_and_signals(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], share: float
) -> None:
    told: list[Any] = []

    def stop(*_args: Any, **more: Any) -> Any:
        told.append(more["method_options"]["cutmix"])
        raise DivergenceError("enough")

    monkeypatch.setattr(_polish, "distill", stop)
    net = nn.Sequential(nn.Conv2d(shape[1], 8, (3, 1)), nn.ReLU(), nn.Conv2d(8, 8, (3, 1)), nn.Flatten()).eval()
    cs.calibrate(net, cs.rewrite(net, "group", options={"groups": 4}), torch.randn(shape), polish=QUICK)
    assert set(told) == {share}


@pytest.mark.parametrize("shape", [(5, 2, 64, 1), (5, 2, 1, 64), (5, 2, 64)])
def test_signals_move_along_their_axis(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    augment = Augmentation.usual((64, 1), flip=False)
    assert augment.shift == 8
    signals = torch.arange(64.0).view(1, 1, *(side if side == 64 else 1 for side in shape[2:])).expand(shape)
    moved = augment(signals)
    assert moved.shape == signals.shape
    steps = moved.reshape(5, 2, 64) - torch.arange(64.0)
    assert torch.equal(steps[:, 0], steps[:, 1])
    by = steps[:, 0, 32]  # away from the border
    assert by.abs().max() <= 8
    assert len(set(by.tolist())) > 1
    assert torch.equal(moved.reshape(5, 2, 64)[:, 0], (torch.arange(64.0) + by[:, None]).clamp(0, 63))


@pytest.mark.parametrize(
    ("size", "shift"), [((32, 32), 4), ((28, 40), 3), ((1024, 1), 128), ((1, 80), 10), ((1, 1), 0)]
)
def test_the_usual_shift_is_an_eighth_of_what_can_move(size: tuple[int, int], shift: int) -> None:
    assert Augmentation.usual(size, flip=False).shift == shift
