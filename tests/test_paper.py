"""The paper's network and its students have the paper's sizes (Xie et al., 2019, arXiv:1909.13063)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import convsurgeon as cs
from convsurgeon.surgery import count_macs, count_params, plan_of, survey, totals


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "paper" / "resnet.py"
    spec = importlib.util.spec_from_file_location("paper_resnet", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


IMAGE = torch.zeros(1, 3, 32, 32)

# parameters in M and MACs in M: with the dense stride in each block's second 3x3, and in its first
SIZES = {
    "dense": (0.856, 132.8, 125.7),
    "shift": (0.102, 15.4, 14.6),
    "depthwise": (0.120, 20.5, 19.4),
    "group": (0.154, 24.2, 22.6),
}


@pytest.mark.parametrize("stride_on", ["second", "first"])
@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_to_three_digits(paper: ModuleType, name: str, stride_on: str) -> None:
    dense = paper.ResNet(56, stride_on=stride_on)
    params, second, first = SIZES[name]
    network = dense
    if name != "dense":
        options: dict[str, Any] = {"stride_on": "pointwise"}
        network = cs.rewrite(dense, name, options=options | ({"groups": 16} if name == "group" else {}))
        found = totals(plan_of(network), survey(dense, example_inputs=IMAGE))
        rest = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.Linear)]
        assert found.params_after == count_params(network) - sum(count_params(module) for module in rest)
    assert round(count_params(network) / 1e6, 3) == params
    macs = count_macs(network, IMAGE).true / 1e6
    assert round(macs, 1) == (second if stride_on == "second" else first)


def test_the_stem_and_the_shortcuts_are_kept(paper: ModuleType) -> None:
    the_plan = cs.plan(paper.resnet56(), "shift")
    assert {d.fqn: d.label for d in the_plan.kept} == {
        "conv1": "stem",
        "layer2.0.shortcut.0": "1x1",
        "layer3.0.shortcut.0": "1x1",
    }
    assert len(the_plan.converted) == 54


def test_the_form_without_stride_on_pointwise_is_cheaper(paper: ModuleType) -> None:
    dense = paper.ResNet(20)
    spatial, pointwise = (
        count_macs(cs.rewrite(dense, "depthwise", options={"stride_on": where}), IMAGE).true
        for where in ("spatial", "pointwise")
    )
    assert spatial < pointwise


def test_a_depth_that_is_none(paper: ModuleType) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        paper.ResNet(18)
    assert paper.resnet20(num_classes=7, in_channels=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
