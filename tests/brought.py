"""The files that people bring, as docs/bring-your-own.md names them: each written as its own code base writes it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from command import forget_mynet, mynet, write_pictures
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

PARTS = '''\
"""What a network of a company's own is made with."""

import enum
from dataclasses import dataclass

import torch
from torch import nn


class Activation(enum.Enum):
    RELU = "relu"
    SILU = "silu"


@dataclass
class Config:
    width: int = 8
    activation: Activation = Activation.RELU


def swish(x):
    return x * torch.sigmoid(x)


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.config, self.function = Config(), swish
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.function(self.conv(self.stem(x)))
        return self.fc(x.mean((2, 3)))
'''

State = dict[str, Tensor]


def _under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _other(state: State) -> State:
    """The same network a step later."""
    return {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _lightning(net: nn.Module) -> Any:
    state = _under("model.", net.state_dict())
    state |= {"criterion.weight": torch.ones(3), "train_acc.total": torch.zeros(())}
    return {"epoch": 3, "global_step": 99, "state_dict": state, "hyper_parameters": {"lr": 0.1}, "callbacks": {}}


def _timm(net: nn.Module) -> Any:
    state = net.state_dict()
    return {"epoch": 3, "arch": "net", "state_dict": state, "state_dict_ema": _other(state)}


def _deit(net: nn.Module) -> Any:
    state = net.state_dict()
    return {"model": state, "model_ema": _other(state), "epoch": 3, "scaler": {"scale": 1.0}}


def _basicsr(net: nn.Module) -> Any:
    state = net.state_dict()
    return {"params": state, "params_ema": _other(state)}


def _yolo(net: nn.Module) -> Any:
    half = copy.deepcopy(net).half().requires_grad_(False)
    return {"epoch": -1, "best_fitness": None, "model": half, "ema": copy.deepcopy(half), "updates": 7, "date": "today"}


def _swa(net: nn.Module) -> Any:
    return AveragedModel(net).state_dict()


def _two(net: nn.Module) -> Any:
    state = net.state_dict()
    return {"state_dict": _under("student.", state) | _under("teacher.", _other(state))}


def _nested(net: nn.Module) -> Any:
    return {
        "model_state_dict": _under("_orig_mod.module.net.", net.state_dict()),
        "optimizer_state_dict": {"state": {}},
    }


WRITTEN: dict[str, Callable[[nn.Module], Any]] = {
    "net.pt": lambda net: net,
    "weights.pth": lambda net: net.state_dict(),
    "lightning.ckpt": _lightning,
    "timm.pth.tar": _timm,
    "deit.pth": _deit,
    "restorer.pth": _basicsr,
    "yolo.pt": _yolo,
    "swa.pth": _swa,
    "two.pth": _two,
    "nested.pth": _nested,
    "parallel.pth": lambda net: _under("module.", net.state_dict()),
    "compiled.pth": lambda net: torch.compile(net).state_dict(),  # type: ignore[attr-defined]
    "half.pth": lambda net: copy.deepcopy(net).half().state_dict(),
    "parallel.pt": nn.DataParallel,
    "averaged.pt": AveragedModel,
}


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported for a while."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("company", None)


def write_brought(folder: Path) -> Path:
    """Write every file of the table into a folder, and what is beside them: modules and pictures."""
    net = mynet(folder)
    (folder / "company.py").write_text(PARTS)
    for name, made in WRITTEN.items():
        torch.save(made(net), folder / name)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), folder / "resnet.pth")
    forget_mynet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(net).save(folder / "scripted.pt")
    example = (torch.zeros(2, 3, 16, 16),)
    torch.export.save(torch.export.export(net, example), folder / "net.pt2")
    with _importable(folder):
        torch.save(importlib.import_module("company").Configured(), folder / "company.pt")
    write_pictures(folder / "pictures", each=12)
    return folder
