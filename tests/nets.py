"""Small networks, and a witness of everything about one that must not change."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, **kwargs: Any) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **kwargs)


class Small(nn.Module):
    """Stem, a residual block with a 1x1 shortcut, a grouped layer, a head: one of every default keep."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.norm0 = nn.BatchNorm2d(8)
        self.conv1 = conv(8, 16, stride=2, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        self.conv2 = conv(16, 16)
        self.norm2 = nn.BatchNorm2d(16)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2)
        self.depth = conv(16, 16, groups=16)
        self.grouped = conv(16, 16, groups=4)
        self.last = conv(16, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm0(self.stem(x)))
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        x = torch.relu(y + self.shortcut(x))
        x = self.last(self.grouped(self.depth(x)))
        return self.fc(x.mean((2, 3)))


class Branching(nn.Module):
    """Control flow on values: cannot be traced, its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8))
        self.up = conv(8, 8)
        self.down = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.up(x) if x.sum() > 0 else self.down(x)


class Shared(nn.Module):
    """One convolution object under three names, called twice, and held in a list, a dict and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv(8, 8)
        self.alias = self.first
        self.block = nn.Sequential(conv(8, 8), nn.ReLU(), self.first)
        self.plain = [self.first, self.block[0]]
        self.lookup = {"a": {"b": self.first}}

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.plain[0](x))


class Tiny(nn.Module):
    """A classifier of 8x8 grey images, with a norm and a dropout."""

    def __init__(self, classes: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(channels, 8)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = conv(8, 8)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.fc(self.drop(self.pool(x).flatten(1)))


def tiny(seed: int = 0, **kwargs: Any) -> Tiny:
    """A `Tiny` from its own random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny(**kwargs)


def stripes(count: int = 64, seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images whose bright pair of columns is the label: float `(N, 1, 8, 8)` and int64 `(N,)`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, :, :, 2 * label : 2 * label + 2] += 1
    return images, labels


class Witness:
    """Remembers a model, the random states and the warnings filter; `check` says what has changed."""

    def __init__(self, *models: nn.Module) -> None:
        self.models = models
        self.before = self._look()

    def check(self) -> None:
        """Fail if anything is not as it was, bit by bit."""
        now = self._look()
        for key, value in self.before.items():
            assert _same(value, now[key]), f"{key} has changed"

    def _look(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "torch random state": torch.get_rng_state(),
            "python random state": random.getstate(),
            "numpy random state": str(np.random.get_state()),
            "warnings filter": list(warnings.filters),
        }
        for index, model in enumerate(self.models):
            for fqn, module in model.named_modules(remove_duplicate=False):
                where = f"model {index} {fqn}"
                hooks = (*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks)
                found[f"{where} module"] = id(module)
                found[f"{where} class"] = type(module)
                found[f"{where} mode"] = module.training
                found[f"{where} hooks"] = hooks
                found[f"{where} attributes"] = sorted(vars(module))
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None:
                        found[f"{where} {name}"] = (id(tensor), type(tensor), tensor.requires_grad)
                        if not nn.parameter.is_lazy(tensor):
                            found[f"{where} {name} value"] = tensor.detach().clone()
        return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def assert_bit_identical(a: nn.Module, b: nn.Module) -> None:
    """Fail unless both have the same entries in their state, with the same bits."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key
