"""Small networks that hypothesis draws: sequential, residual, concatenating, shared-module and branching ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convsurgeon.testing._cases import Choose, strategy

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_CHANNELS = (2, 3, 4, 6, 8)
_KINDS = ("plain", "residual", "joined", "twice", "switch", "functional")


class Residual(nn.Module):
    """A body and the input, added."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        return torch.relu(self.body(x) + x)


class Joined(nn.Module):
    """Two branches, concatenated."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the channels of both branches."""
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Twice(nn.Module):
    """One module object under two names and in a list."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one = layer
        self.two = layer
        self.everything = [layer]

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        out: Tensor = self.everything[0](torch.relu(self.two(x))) + self.one(x)
        return out


class Switch(nn.Module):
    """Control flow on values, which no trace survives."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` by one of two convolutions."""
        out: Tensor = self.left(x) if x.mean() > 0 else self.right(x)
        return out


class Functional(nn.Module):
    """A convolution that is no module, and a dropout that asks for the mode."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` as the convolution does."""
        x = nn.functional.conv2d(x, self.weight, self.bias, **self.geometry)
        return nn.functional.dropout(x, 0.1, training=self.training)


@dataclass(frozen=True)
class _Layer:
    """A recipe for one layer; `kind` says how it is wired."""

    kind: str
    outputs: int
    conv: dict[str, Any] = field(default_factory=dict)


def models() -> SearchStrategy[nn.Module]:
    """Return a hypothesis strategy for small networks with a convolution that every op can replace.

    They take images of `(N, 3, 9, 9)` of their own dtype, float32 or float64, and are in either mode.
    """
    return strategy(draw_model)


def draw_model(choose: Choose) -> nn.Module:
    """Return a network for the choices made: `random.Random(0).choice` makes some."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(choose(range(100)))
        first = _Layer("plain", choose(_CHANNELS), {"kernel_size": 3, "padding": 1})
        second = _Layer("plain", 8, {"kernel_size": 3, "padding": 1})
        layers = [_draw_layer(choose) for _ in range(choose((0, 1, 2, 3)))]
        network = _build(3, [first, second, *layers])
    network.train(choose((False, True)))
    return network.to(choose((torch.float32, torch.float64)))


def _draw_layer(choose: Choose) -> _Layer:
    kind, kernel = choose(_KINDS), choose((1, 3, 5, (1, 3)))
    geometry = {"kernel_size": kernel, "padding": "same", "bias": choose((False, True))}
    if kind != "functional":
        geometry["padding_mode"] = choose(("zeros", "replicate"))
    if kind == "plain" and choose((False, True)):
        pads = (kernel // 2,) * 2 if isinstance(kernel, int) else (0, 1)
        geometry |= {"padding": pads, "stride": choose((2, (1, 2)))}
    elif choose((False, True)):
        geometry["dilation"] = 2
    return _Layer(kind, choose(_CHANNELS), geometry)


def _build(inputs: int, layers: list[_Layer]) -> nn.Sequential:
    made: list[nn.Module] = []
    for layer in layers:
        outputs = inputs if layer.kind in ("residual", "twice") else layer.outputs

        def conv(outputs: int = outputs, inputs: int = inputs, layer: _Layer = layer) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, **layer.conv)

        if layer.kind == "residual":
            made.append(Residual(conv(), nn.BatchNorm2d(outputs)))
        elif layer.kind == "joined":
            made.append(Joined(conv(), nn.Sequential(conv(), nn.ReLU())))
            outputs *= 2
        elif layer.kind == "twice":
            made.append(Twice(conv()))
        elif layer.kind == "switch":
            made.append(Switch(conv(), conv()))
        elif layer.kind == "functional":
            made.append(Functional(conv()))
        else:
            made.extend([conv(), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)])
        inputs = outputs
    return nn.Sequential(*made)
