"""The ONNX table of docs/benchmarks: its tools tell the truth, and its most instructive networks still export."""

from __future__ import annotations

import importlib
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
# weight standardization, same-padding, attention, a squeeze in every block, two branches of a backbone, and feature
# maps joined by concatenation
INSTRUCTIVE = [
    "timm:nf_resnet26",
    "timm:tf_efficientnetv2_b0",
    "timm:mobilevit_xxs",
    "timm:seresnet18",
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:squeezenet1_1",
]


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("onnx_zoo")


def test_every_classifier_and_segmenter_is_in_the_table(zoo: ModuleType) -> None:
    models = torchvision.models
    wanted = {
        f"torchvision:{name}"
        for name in models.list_models()
        if models.get_model_builder(name).__module__.split(".")[2]
        not in ("detection", "optical_flow", "quantization", "video")
    }
    assert {name for name in zoo.names() if name.startswith("torchvision:")} == wanted
    assert len(zoo.TIMM.split()) == len(set(zoo.TIMM.split())) == 44


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (lambda send, name, memory: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda send, name, memory: os._exit(3), "exit 3"),
        (lambda send, name, memory: time.sleep(60), "took more than 2 s"),
    ],
)
def test_whatever_ends_a_worker_is_a_row(zoo: ModuleType, target: Callable[..., None], says: str) -> None:
    row = zoo.run_one("timm:resnet18", seconds=2, memory=1, target=target)
    assert row["error"] == says
    assert not zoo.onnx_zoo_report.good(row)
    assert zoo.onnx_zoo_report.outcome(row) == f"cut off at start: {says}"


def test_a_worker_that_lacks_memory_is_a_row(zoo: ModuleType) -> None:
    row = zoo.run_one("timm:resnet18", seconds=120, memory=10**6)
    # what runs out first depends on the machine: an allocation, or what oneDNN makes of one
    assert any(said in row["error"] for said in ("alloc", "MemoryError", "could not create a primitive"))
    assert row["stage"] in ("build", "dense")


def test_no_parameter_is_left_a_constant_and_no_statistics_as_they_were(zoo: ModuleType) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 3))
    nn.init.zeros_(model[1].weight)
    zoo.roughen(model)
    assert all(parameter.std() > 0 for parameter in model.parameters())
    model.eval()
    zoo.settle(model, 16)
    seeds, size = range(zoo.BATCHES), (zoo.BATCH, 3, 16, 16)
    x = torch.cat([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    y = model[0](x)
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1
    assert zoo.varies(model, 16) > 0.01


def test_a_deep_network_without_norms_still_sees_the_picture(zoo: ModuleType) -> None:
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(16)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Flatten(), nn.LazyLinear(4)).eval()
    assert zoo.varies(model, 16) < 1e-3
    zoo.settle(model, 16)
    assert zoo.varies(model, 16) > 0.01
    assert not any(module._forward_hooks for module in model.modules())


def test_an_answer_that_ignores_the_picture_is_seen(zoo: ModuleType) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": x, "aux": x * 0 + 1}

    assert zoo.varies(Constant(), 16) == 0


SIDE = {"max_rel": 1e-6, "varies": 0.5, "batch_norms_left": 0, "nodes": 9, "bytes": 10**6}
BASE: dict[str, Any] = {"code": "x", "stage": "done", "size": 64, "seconds": 1.0, "converted": 2, "convolutions": 5}


@pytest.mark.parametrize(
    ("row", "good", "missed", "says"),
    [
        ({"dense": SIDE, "student": SIDE}, True, False, "exported (2 of 5), 1.0e-06"),
        ({"dense": SIDE, "student": SIDE, "nothing": "why"}, True, False, "exported (stem on request), 1.0e-06"),
        ({"dense": SIDE, "student": {"error": "E: e", "varies": 0.5}}, False, True, "student not exported: E: e"),
        ({"dense": {"error": "E: e"}, "student": {"error": "E: e"}}, False, False, "dense not exported: E: e"),
        ({"dense": {"error": "E: e"}, "student": SIDE}, False, False, "dense not exported: E: e"),
        ({"dense": SIDE, "nothing": "why"}, False, True, "no student: why"),
        ({"dense": SIDE, "stage": "student", "error": "SIGKILL"}, False, True, "cut off at student: SIGKILL"),
    ],
)
def test_the_page_tells_what_came_of_a_network(
    zoo: ModuleType, row: dict[str, Any], good: bool, missed: bool, says: str
) -> None:
    report = zoo.onnx_zoo_report
    row = {"name": "timm:resnet18", **BASE, **row}
    assert (report.good(row), report.missed(row), report.outcome(row)) == (good, missed, says)
    page = report.render({row["name"]: row}, ["timm:resnet18", "torchvision:alexnet"])
    assert "| networks | 1 | 1 | 2 |\n| looked at | 0 | 1 | 1 |" in page
    assert f"| **dense exported, student not** | 0 | {int(missed)} | {int(missed)} |" in page
    assert (f"- `timm:resnet18`: {says}" in page) == (not good)


def test_rows_are_the_latest_and_a_cut_line_is_left_out(zoo: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a", "n": 1}\n{"name": "a", "n": 2}\n{"name": "b", "n"')
    assert zoo.read_rows(path) == {"a": {"name": "a", "n": 2}}
    assert zoo.read_rows(tmp_path / "none.jsonl") == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUCTIVE)
def test_dense_network_and_student_are_exported(zoo: ModuleType, name: str) -> None:
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, about deprecated arguments
        zoo.examine(name, rows.append)
    row = rows[-1]
    assert zoo.onnx_zoo_report.good({"name": name, **row}), zoo.onnx_zoo_report.outcome(row)
    for side in ("dense", "student"):
        assert row[side]["batch_norms_left"] == 0
        assert row[side]["max_rel"] < 0.01 * row[side]["varies"]
