"""Attributes that users hang on parameters: kept by distill, and heeded by the optimiser's groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import stripes, tiny
from torch import nn
from torch.utils.data import TensorDataset

import convsurgeon as cs
from convsurgeon.calibration import Polish
from convsurgeon.distillation import methods, objectives
from convsurgeon.distillation.methods import AbstractMethod, Setting

IMAGES, LABELS = stripes(32)
DATA = TensorDataset(IMAGES, LABELS)
RUN: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "no", "device": "cpu", "learning_rate": 0.01}


def marked() -> nn.Module:
    """A network with attributes on parameters of layers that stay."""
    network = tiny()
    network.fc.weight.no_decay = True  # type: ignore[attr-defined]
    network.fc.bias.lr_scale = 0.25  # type: ignore[attr-defined]
    network.conv1.weight.note = {"why": ["by hand"]}  # type: ignore[attr-defined]
    return network


def attributes(network: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(parameter)) for name, parameter in network.named_parameters() if vars(parameter)}


@pytest.mark.parametrize("method", methods.names())
def test_they_survive_every_method(method: str) -> None:
    teacher = marked()
    student = cs.rewrite(teacher)
    expected = attributes(teacher)
    assert {"fc.weight", "fc.bias", "conv1.weight"} <= set(expected)
    assert attributes(student) == expected
    options = {"peers": 2} if method == "ensemble" else {}
    result = cs.distill(teacher, student, DATA, method=method, method_options=options, **RUN)
    assert attributes(result.student) == expected
    assert result.teacher is None or attributes(result.teacher) == expected
    assert attributes(teacher) == attributes(student) == expected


@pytest.mark.parametrize("polish", [False, Polish(steps=10)])
def test_they_survive_calibration(polish: bool | Polish) -> None:
    teacher = marked()
    student = cs.calibrate(teacher, cs.rewrite(teacher), IMAGES, polish=polish)
    assert attributes(student) == attributes(teacher)


def test_they_survive_a_run_that_is_resumed(tmp_path: Any) -> None:
    teacher = marked()
    cs.distill(teacher, cs.rewrite(teacher), DATA, run_dir=tmp_path / "RUN", **RUN)
    result = cs.distill(teacher, cs.rewrite(teacher), DATA, run_dir=tmp_path / "RUN", resume=True, **RUN)
    assert attributes(result.student) == attributes(teacher)


def make(student: nn.Module, name: str = "supervised", teacher: nn.Module | None = None) -> AbstractMethod:
    setting = Setting(objectives.get("kd")({}), IMAGES[:8], 4, True, 0)
    return methods.get(name)(teacher, student, setting=setting, options={})


def settings_of(method: AbstractMethod) -> dict[int, tuple[float, float]]:
    groups = method.parameter_groups(learning_rate=0.1, weight_decay=0.5)
    return {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ["no_decay", "no_weight_decay", "_no_weight_decay"])
@pytest.mark.parametrize("value", [True, False])
def test_parameters_that_shall_not_decay_do_not(name: str, value: bool) -> None:
    network = tiny()
    setattr(network.fc.weight, name, value)
    found = settings_of(make(network))
    assert found[id(network.fc.weight)] == (0.1, 0.0 if value else 0.5)
    assert found[id(network.conv1.weight)] == (0.1, 0.5)
    assert found[id(network.fc.bias)] == (0.1, 0.0)


def test_a_share_of_the_rate_multiplies_the_methods_own() -> None:
    teacher, student = tiny(1), tiny()
    teacher.fc.weight.lr_scale = 0.5  # type: ignore[assignment]
    student.conv2.weight.lr_scale = 0.1  # type: ignore[assignment]
    found = settings_of(make(student, "joint", teacher))
    assert found[id(student.conv2.weight)] == (pytest.approx(0.01), 0.5)
    assert found[id(student.conv1.weight)] == (0.1, 0.5)
    assert found[id(teacher.fc.weight)] == (pytest.approx(0.1 * 0.01 * 0.5), 0.5)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_what_does_not_decay_is_trained_by_its_gradient_alone(optimizer: str) -> None:
    """A weight without a gradient keeps its value, where it would have shrunk."""
    network = tiny()
    network.unused = nn.Parameter(torch.ones(3, 3))
    network.unused.no_decay = True
    network.shrinks = nn.Parameter(torch.ones(3, 3))

    def use(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 0 * (module.unused.sum() + module.shrinks.sum())

    network.register_forward_hook(use)
    result = cs.distill(None, network, DATA, method="supervised", optimizer=optimizer, weight_decay=0.1, **RUN)
    assert torch.equal(result.student.unused, torch.ones(3, 3))
    assert float(result.student.shrinks.detach().max()) < 1
    assert result.student.unused.no_decay
