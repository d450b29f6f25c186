"""The networks that everybody has: converted by the command, loaded, run, and exported with parity."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import convsurgeon as cs
from convsurgeon import ops
from convsurgeon.cli import main
from convsurgeon.surgery import example_like

NAMES = ["resnet18", "resnet50", "vgg16_bn", "densenet121", "deeplabv3_resnet50", "fasterrcnn_resnet50_fpn"]
DETECTORS = ("fasterrcnn_resnet50_fpn",)
# vgg's classifier reads a map that its pooling makes of any input; 64 pixels leave something to pool everywhere
SHAPE = (1, 3, 64, 64)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the program in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["convsurgeon", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def settle(model: nn.Module) -> None:
    """Re-estimate batch-norm statistics, so that the outputs of random weights mean something."""
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(4, *SHAPE[1:], generator=torch.Generator().manual_seed(0)))
    model.eval()


# every op with a third of the networks, and every network with a third of the ops
PAIRS = [(name, op) for i, name in enumerate(NAMES) for j, op in enumerate(ops.names()) if (i + j) % 3 == 0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_convert_save_load_run_export(
    name: str, op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = ",".join(map(str, SHAPE))
    # detectors enlarge their images; small ones do here
    sizes = {"min_size": 64, "max_size": 96} if name in DETECTORS else {}
    args = [part for key, value in sizes.items() for part in ("--model-arg", f"{key}={value}")]
    assert run_command(monkeypatch, "convert", f"torchvision:{name}", "--to", op, "--input-shape", shape, *args) == 0
    assert "converted" in capsys.readouterr().out
    student = cs.load(f"{name}.{op}.safetensors").eval()
    plan = cs.plan_of(student)
    assert plan is not None
    assert {decision.op for decision in plan.converted} == {op}
    for decision in plan.converted:
        assert isinstance(student.get_submodule(decision.fqns[0]), ops.get(op))

    teacher = cs.load(f"torchvision:{name}", model_args=sizes).eval()
    example = example_like(teacher, SHAPE)
    with torch.no_grad():
        want, have = teacher(example), student(example)
    assert pytree.tree_structure(want) == pytree.tree_structure(have)
    for a, b in zip(pytree.tree_leaves(want), pytree.tree_leaves(have), strict=True):
        # the number of detections depends on what the weights find
        assert a.shape[1:] == b.shape[1:]
        assert name in DETECTORS or a.shape == b.shape
    if name in DETECTORS:
        return
    settle(student)
    delivery = cs.export(student, "student.onnx", example_inputs=example)
    assert delivery.parity.max_rel <= 1e-4
    assert delivery.batch_norms_left == 0
