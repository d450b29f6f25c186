"""Shifts with learned offsets are delivered rounded: the file equals the rounded student, and that is told."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from convsurgeon import load, rewrite, save
from convsurgeon.delivery import compare, export, session
from convsurgeon.evaluation import evaluate

IMAGE = torch.zeros(1, 3, 12, 12)


def images(count: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 12, 12, generator=generator) + 2 * torch.randn(count, 3, 1, 1, generator=generator)


@pytest.fixture
def teacher() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, (3, 5), stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).eval()
    with torch.no_grad():  # scores that differ from picture to picture
        scores = net(images(256))
        net[-1].bias.sub_(scores.mean(0)).div_(scores.std())
        net[-1].weight.div_(scores.std())
    return net


@pytest.fixture
def student(teacher: nn.Module) -> nn.Module:
    return rewrite(teacher, "shift", options={"assignment": "learned"})


def rounded(student: nn.Module) -> nn.Module:
    result = copy.deepcopy(student)
    for name in ("1", "4"):
        result.get_submodule(name).round_taps()  # type: ignore[operator]
    return result


def test_the_file_equals_the_rounded_student(student: nn.Module, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in student.state_dict().items()}
    messages: list[str] = []
    delivery = export(
        student, tmp_path / "a.onnx", example_inputs=IMAGE, report=lambda event: messages.append(event.message)
    )
    opened = session(delivery.path)
    (got,) = opened.run(None, {opened.get_inputs()[0].name: images().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), rounded(student)(images()), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(torch.from_numpy(got), student(images()), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert set(delivery.frozen.ops) == {"1", "4"}
    assert delivery.frozen.max_rel > 1e-3
    said = f"4: {delivery.frozen.ops['4']}"
    assert said.startswith("4: 8 of 8 learned offsets were rounded to whole taps, by 0.")
    assert said in messages
    assert any(message.startswith("this changes outputs by up to ") for message in messages)


def test_the_file_holds_one_hot_kernels(student: nn.Module, tmp_path: Path) -> None:
    graph = onnx.load(export(student, tmp_path / "a.onnx", example_inputs=IMAGE).path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["Conv"] == 5
    assert set(kinds) <= {"Conv", "Pad", "Relu", "GlobalAveragePool", "ReduceMean", "Reshape", "Flatten", "Gemm"}
    kernels = [numpy_helper.to_array(tensor) for tensor in graph.initializer if list(tensor.dims[:2]) == [8, 1]]
    assert len(kernels) == 2
    for kernel in kernels:
        assert sorted(set(kernel.ravel().tolist())) == [0, 1]
        assert (kernel.reshape(8, -1).sum(1) == 1).all()


def test_a_student_that_is_rounded_already_is_delivered_as_it_is(student: nn.Module, tmp_path: Path) -> None:
    whole = rounded(student)
    save(whole, tmp_path / "student.pt")
    again = load(tmp_path / "student.pt")
    messages: list[str] = []
    delivery = export(
        again, tmp_path / "a.onnx", example_inputs=IMAGE, report=lambda event: messages.append(event.message)
    )
    assert not delivery.frozen.ops
    assert delivery.frozen.max_rel == 0
    assert messages == ["copy", "trace", "write", "compare", "done"]
    with torch.no_grad():
        torch.testing.assert_close(again(images()), whole(images()))


def test_the_accuracy_in_a_comparison_is_that_of_what_is_delivered(
    teacher: nn.Module, student: nn.Module, tmp_path: Path
) -> None:
    labels = teacher(images(256)).argmax(1)
    data = [(images(256), labels)]
    found = compare(teacher, student, tmp_path, example=IMAGE, test=data, threads=[1])
    assert found.before.accuracy == 1
    assert found.after.accuracy == evaluate(rounded(student), data).accuracy != evaluate(student, data).accuracy
    assert set(found.to_dict()["after"]["delivery"]["frozen"]["ops"]) == {"1", "4"}
