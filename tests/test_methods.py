"""Who teaches whom, and in which loss: formulas by hand, and the head of the online teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from nets import Tiny, conv, stripes, tiny
from torch import Tensor, nn
from torch.nn import functional

import convsurgeon as cs
from convsurgeon.distillation import methods, objectives
from convsurgeon.distillation._features import split_at_features
from convsurgeon.distillation.methods import AbstractMethod, Setting
from convsurgeon.distillation.methods.imitate import relative_error

IMAGES, LABELS = stripes(8)


def setting(*, trained: bool | None = True, seed: int = 0, **objective: Any) -> Setting:
    return Setting(objectives.get("kd")(objective), IMAGES, 4, trained, seed)


def make(name: str, *, options: dict[str, Any] | None = None, **kwargs: Any) -> AbstractMethod:
    student = cs.rewrite(tiny())
    return methods.get(name)(tiny(1), student, setting=setting(**kwargs), options=options or {}).train()


def kd_by_hand(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    p = (teacher / temperature).exp()
    p = p / p.sum(1, keepdim=True)
    q = (student / temperature).exp()
    q = q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p.log() - q.log())).sum() / len(student)


STUDENT = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
TEACHER = torch.tensor([[0.0, 4.0, 1.0], [2.0, -2.0, 0.0]])


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_kd_is_its_formula(temperature: float) -> None:
    kd = objectives.get("kd")({"temperature": temperature})
    torch.testing.assert_close(kd(STUDENT, TEACHER), kd_by_hand(STUDENT, TEACHER, temperature))
    assert float(kd(TEACHER, TEACHER)) == pytest.approx(0, abs=1e-6)
    assert not torch.allclose(kd(STUDENT, TEACHER), kd(TEACHER, STUDENT))


def test_kd_with_reduction_mean_is_the_classes_fold_smaller() -> None:
    whole, averaged = (objectives.get("kd")({"reduction": how}) for how in ("batchmean", "mean"))
    torch.testing.assert_close(averaged(STUDENT, TEACHER), whole(STUDENT, TEACHER) / 3)


def test_kd_options() -> None:
    assert objectives.get("kd")().options.temperature == 4.0
    with pytest.raises(cs.errors.OptionError, match="temperature must be above 0, got 0"):
        objectives.get("kd")({"temperature": 0})
    with pytest.raises(cs.errors.OptionError, match=r"no option 'temperatur'\. Did you mean 'temperature'"):
        objectives.get("kd")({"temperatur": 2})
    with pytest.raises(cs.errors.OptionError, match="reduction must be one of batchmean, mean, got 'sum'"):
        objectives.get("kd")({"reduction": "sum"})


@pytest.mark.parametrize("kind", [methods, objectives])
def test_every_variant_says_what_it_is(kind: Any) -> None:
    assert kind.names()
    for name in kind.names():
        found = kind.get(name)
        assert found.name == name
        assert found.summary
        assert found.reference
        assert found.__doc__
    with pytest.raises(cs.errors.UnknownNameError, match="Available"):
        kind.get("nothing")


@pytest.mark.parametrize("name", methods.names())
def test_every_method_trains_every_parameter_it_says_it_trains(name: str) -> None:
    method = make(name)
    lesson = method(IMAGES, LABELS)
    assert lesson.loss.dim() == 0
    assert lesson.student_BK.shape == (8, 4)
    lesson.loss.backward()
    groups = method.parameter_groups(learning_rate=0.1, weight_decay=0.5)
    trained = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in trained}) == len(trained)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    for group in groups:
        assert group["weight_decay"] == (0.5 if group["params"][0].dim() > 1 else 0.0)
    assert {id(p) for student in method.students().values() for p in student.parameters()} <= {
        id(parameter) for parameter in trained
    }


def test_blocks_lead_at_first_and_answers_decide_in_the_end() -> None:
    def loss(progress: float, **options: float) -> float:
        method = make("imitate", options={"cutmix": 0.0, **options})
        method.progress = progress
        return float(method(IMAGES, LABELS).loss.detach())

    both = loss(0.0, blocks=4.0)
    assert loss(0.0, blocks=2.0) == pytest.approx(0.5 * both, rel=2e-3)
    assert loss(0.25, blocks=4.0) == pytest.approx(0.75 * both, rel=2e-3)
    assert 0 < loss(1.0, blocks=4.0) < 1e-3 * both  # the answers, which differ by dropout alone


def test_relative_error_is_its_formula_and_keeps_the_layout_of_gradients() -> None:
    t = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    s = (t + torch.randn(2, 3, 4, 5)).requires_grad_()
    error = relative_error(s, t)
    torch.testing.assert_close(error, (s - t).square().sum() / t.square().sum())
    (gradient,) = torch.autograd.grad(error, s)
    torch.testing.assert_close(gradient, 2 * (s - t) / t.square().sum())
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert float(relative_error(torch.ones(4), torch.zeros(4))) == pytest.approx(1e12)


def test_no_difference_has_no_gradient() -> None:
    t = torch.randn(2, 3)
    s = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(relative_error(s, t), s)
    assert not gradient.any()


def test_norms_are_frozen_in_the_last_steps() -> None:
    method = no_dropout(make("imitate", options={"cutmix": 0.0, "frozen_norms": 0.25}))
    norm = method.student.norm

    def moves(progress: float) -> bool:
        before, method.progress = norm.running_mean.clone(), progress
        method(IMAGES, LABELS).loss.backward()
        return not torch.equal(norm.running_mean, before)

    assert [moves(progress) for progress in (0.0, 0.7, 0.75, 0.9, 0.1)] == [True, True, False, False, True]
    method.progress = 0.9
    torch.testing.assert_close(method(IMAGES, LABELS).student_BK, method.student.eval()(IMAGES))
    assert norm.weight.grad.any()


@pytest.mark.parametrize("option", ["cutmix", "frozen_norms"])
def test_shares_of_imitation_are_shares(option: str) -> None:
    with pytest.raises(cs.errors.OptionError, match=f"option {option} must be a share from 0 to 1, got 1.5"):
        make("imitate", options={option: 1.5})


@pytest.mark.parametrize("name", methods.names())
def test_what_is_frozen_is_not_trained(name: str) -> None:
    student = cs.rewrite(tiny())
    student.conv1.requires_grad_(False)
    before = student.conv1.weight.clone()
    method = methods.get(name)(tiny(1), student, setting=setting(), options={})
    groups = method.parameter_groups(learning_rate=0.1, weight_decay=0.5)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for each in method.students().values():
        assert id(each.conv1.weight) not in trained
        assert id(each.fc.weight) in trained
        assert torch.equal(each.conv1.weight, before)


@pytest.mark.parametrize("name", methods.names())
def test_unknown_options_of_a_method(name: str) -> None:
    with pytest.raises(cs.errors.OptionError, match=f"{name} has no option 'colour'"):
        make(name, options={"colour": 1})


def no_dropout(method: AbstractMethod) -> AbstractMethod:
    for module in method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return method


def test_supervised_is_cross_entropy() -> None:
    method = no_dropout(make("supervised"))
    expected = functional.cross_entropy(method.student(IMAGES), LABELS)
    lesson = method(IMAGES, LABELS)
    torch.testing.assert_close(lesson.loss, expected)
    assert lesson.teacher_BK is None


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_frozen_is_its_formula_with_a_teacher_in_eval_mode(weight: float) -> None:
    method = no_dropout(make("frozen", options={"weight": weight}))
    assert {module.training for module in method.teacher.modules()} == {False}
    assert method.student.training
    s, t = method.student(IMAGES), method.teacher(IMAGES)
    expected = functional.cross_entropy(s, LABELS) + weight * kd_by_hand(s, t)
    lesson = method(IMAGES, LABELS)
    torch.testing.assert_close(lesson.loss, expected)
    lesson.loss.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


@pytest.mark.parametrize(
    ("trained", "options", "rate", "mutual"),
    [
        (True, {}, 0.01, 0.05),
        (False, {}, 1.0, 1.0),
        (None, {}, 1.0, 1.0),
        (True, {"teacher_rate": 0.5}, 0.5, 0.05),
        (True, {"mutual": 0.0}, 0.01, 0.0),
        (False, {"teacher_rate": 0.1, "mutual": 0.2}, 0.1, 0.2),
    ],
)
def test_joint_leads_a_trained_teacher_gently(
    trained: bool | None, options: dict[str, Any], rate: float, mutual: float
) -> None:
    method = no_dropout(make("joint", options={**options, "weight": 0.5}, trained=trained))
    rates = {
        id(parameter): group["lr"]
        for group in method.parameter_groups(learning_rate=0.1, weight_decay=0)
        for parameter in group["params"]
    }
    assert {rates[id(parameter)] for parameter in method.student.parameters()} == {0.1}
    assert {rates[id(parameter)] for parameter in method.teacher.parameters()} == {0.1 * rate}
    s, t = method.student(IMAGES), method.teacher(IMAGES)
    learn = functional.cross_entropy(s, LABELS) + 0.5 * kd_by_hand(s, t.detach())
    teach = functional.cross_entropy(t, LABELS) + mutual * kd_by_hand(t, s.detach())
    lesson = method(IMAGES, LABELS)
    torch.testing.assert_close(lesson.loss, learn + teach)
    for found, network, loss in (("student", method.student, learn), ("teacher", method.teacher, teach)):
        expected = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        got = torch.autograd.grad(lesson.loss, list(network.parameters()), retain_graph=True)
        torch.testing.assert_close(got, expected, msg=lambda text, found=found: f"{found}: {text}")


def test_joint_refuses_a_teacher_that_would_not_learn() -> None:
    with pytest.raises(cs.errors.OptionError, match=r"teacher_rate must be above 0, got 0\.0.*frozen"):
        make("joint", options={"teacher_rate": 0.0})


def feature_map(net: Tiny, x: Tensor) -> Tensor:
    return torch.relu(net.conv2(torch.relu(net.norm(net.conv1(x)))))


@pytest.mark.parametrize("reference", [False, True])
def test_ensemble_is_its_formula_and_detaches_nothing(reference: bool) -> None:
    options = {"peers": 3, "weight": 0.5, "reference": reference}
    method = no_dropout(make("ensemble", options=options))
    peers = list(method.students().values())
    assert len(peers) == 3
    norm, relu, _, linear = method.head
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(relu, nn.ReLU)
    assert (norm.num_features, linear.in_features, linear.out_features) == (24, 24 * 16, 4)

    students = [peer(IMAGES) for peer in peers]
    joined = torch.cat([feature_map(peer, IMAGES) for peer in peers], dim=1)
    teacher = linear(functional.adaptive_avg_pool2d(torch.relu(norm(joined)), 4).flatten(1))
    expected = functional.cross_entropy(teacher, LABELS)
    for student in students:
        share = 0.5 / (4 if reference else 1)
        expected = expected + functional.cross_entropy(student, LABELS) + share * kd_by_hand(student, teacher)

    lesson = method(IMAGES, LABELS)
    torch.testing.assert_close(lesson.loss, expected)
    torch.testing.assert_close(lesson.teacher_BK, teacher)
    trained = [p for group in method.parameter_groups(learning_rate=1, weight_decay=0) for p in group["params"]]
    got = torch.autograd.grad(lesson.loss, trained)
    torch.testing.assert_close(got, torch.autograd.grad(expected, trained), rtol=1e-4, atol=1e-5)


def test_peers_differ_by_noise_of_their_own_and_the_first_is_the_student() -> None:
    student = cs.rewrite(tiny())
    expected = {key: value.clone() for key, value in student.state_dict().items()}
    state = torch.get_rng_state()
    method = methods.get("ensemble")(None, student, setting=setting(), options={"noise": 0.1})
    assert torch.equal(state, torch.get_rng_state())
    peers = list(method.students().values())
    assert len(peers) == 4
    assert all(torch.equal(value, expected[key]) for key, value in peers[0].state_dict().items())
    weights = [peer.fc.weight for peer in peers]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(weights[i], weights[j])
    relative = (weights[1] - weights[0]).std() / weights[0].std()
    assert relative.item() == pytest.approx(0.1, rel=0.2)
    assert all(torch.equal(peer.fc.bias, peers[0].fc.bias) for peer in peers)
    again = methods.get("ensemble")(None, cs.rewrite(tiny()), setting=setting(), options={"noise": 0.1})
    assert torch.equal(again.peers[2].fc.weight, weights[2])
    other = methods.get("ensemble")(None, cs.rewrite(tiny()), setting=setting(seed=1), options={})
    assert not torch.equal(other.peers[2].fc.weight, weights[2])


def test_noise_of_a_single_weight_is_a_number() -> None:
    class Scaled(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.scale = conv(1, 1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.scale(x))

    method = methods.get("ensemble")(None, Scaled(), setting=setting(), options={"peers": 2})
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_ensemble_needs_two_peers() -> None:
    with pytest.raises(cs.errors.OptionError, match="peers must be at least 2, got 1"):
        make("ensemble", options={"peers": 1})


# --- the last feature map, found in the graph


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)
        self.fc = nn.Linear(6 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv(x)), 2)
        return self.fc(functional.dropout(torch.flatten(functional.avg_pool2d(x, 2), 1), 0.0))


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)
        self.pool = nn.AvgPool2d(8)
        self.fc1 = nn.Linear(6 * 64, 7)
        self.fc2 = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x).relu())
        return self.fc2(self.fc1(x.view(x.size(0), -1)).relu())


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 6)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean([2, 3]))


def zoo(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return torchvision.models.get_model(name, weights=None, num_classes=5)


@pytest.mark.parametrize(
    ("build", "channels", "width"),
    [
        (lambda: zoo("resnet18"), 512, 512),
        (lambda: zoo("densenet121"), 1024, 1024),
        (lambda: zoo("mobilenet_v2"), 1280, 1280),
        (lambda: zoo("squeezenet1_0"), 5, 5),
        (lambda: zoo("shufflenet_v2_x0_5"), 1024, 1024),
        pytest.param(lambda: zoo("vgg11_bn"), 512, 512 * 49, marks=pytest.mark.slow),
        (Functional, 6, 6 * 16 * 16),
        (Viewed, 6, 6 * 64),
        (Mean, 6, 6),
    ],
)
def test_the_last_feature_map_of_a_classifier(build: Any, channels: int, width: int) -> None:
    model = build()
    x = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
    split = split_at_features(model, x)
    assert split.channels == channels
    assert split.pooled_width(1) == width
    assert split.pooled_width(4) == 4 * width
    assert not list(split.pooling.parameters())
    assert {id(p) for p in split.network.parameters()} == {id(p) for p in model.parameters()}
    split.network.eval()
    with torch.no_grad():
        features, logits = split.network(x)
        assert features.shape == (2, channels, *split.size)
        torch.testing.assert_close(logits, model.eval()(x))
        pooled = split.pooling.eval()(features)
    assert pooled.shape == (2, width)
    assert split.pooling(torch.cat([features, features], 1)).shape == (2, 2 * width)


def test_vgg_like_pooling_is_the_students_own() -> None:
    net = nn.Sequential(
        nn.Sequential(conv(3, 6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(54, 8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(8, 5),
    )
    split = split_at_features(net, torch.ones(2, 3, 8, 8))
    assert (split.channels, split.size, split.pooled_width(2)) == (6, (8, 8), 108)
    x = torch.rand(2, 6, 8, 8)
    torch.testing.assert_close(split.pooling(x), net[2](net[1](net[0][2](x))))


class Branches(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Many(Tiny):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branches(), "ensemble needs the graph of Branches"),
        (Many(), "ensemble: Many does not end in one tensor of class scores"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "Sequential has no feature map"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), "no feature map"),
    ],
)
def test_a_network_without_such_a_map_is_refused_with_a_way_out(model: nn.Module, message: str) -> None:
    with pytest.raises(cs.errors.DistillationError, match=message) as caught:
        methods.get("ensemble")(None, model, setting=setting(), options={})
    assert str(caught.value).endswith("use --method joint or --method frozen")
    assert "\n" not in str(caught.value)
