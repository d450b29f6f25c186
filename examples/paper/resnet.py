"""The paper's network: a residual network for 32x32 images with 1x1 shortcuts.

He et al., 2015 (arXiv:1512.03385), section 4.2, as used in Xie, Lin, Zhang, Luo, 2019 (arXiv:1909.13063):
three stages of 16, 32 and 64 channels, `6n + 2` layers. Where a block halves the map, its shortcut is a
strided 1x1 convolution. The usual place of a block's stride is its first 3x3; the reference code's
sizes imply the second (`stride_on="second"`).

    python examples/paper/resnet.py

prints parameters and MACs of ResNet-56 and of its students, in both forms. It takes a few seconds.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon.surgery import count_macs, count_params


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, stride_on: Literal["first", "second"]) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_on == "first" else (1, stride)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, first, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images: stem, three stages, average pool, linear classifier."""

    def __init__(
        self,
        depth: int = 56,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        stride_on: Literal["first", "second"] = "first",
    ) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2, such as 20 or 56, got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs, stages = 16, []
        for outputs, stride in ((16, 1), (32, 2), (64, 2)):
            blocks = []
            for index in range((depth - 2) // 6):
                step = stride if index == 0 else 1
                blocks.append(Block(inputs, outputs, stride=step, stride_on=stride_on))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-20 for small images."""
    return ResNet(20, num_classes=num_classes, in_channels=in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-56 for small images."""
    return ResNet(56, num_classes=num_classes, in_channels=in_channels)


def main() -> None:
    """Print parameters and MACs of ResNet-56 and its students, the paper's placement of the stride."""
    image = torch.zeros(1, 3, 32, 32)
    for stride_on in ("second", "first"):
        dense = ResNet(56, stride_on=stride_on)
        print(f"stride in each block's {stride_on} 3x3")
        for name in ("dense", "shift", "depthwise", "group"):
            if name == "dense":
                net: nn.Module = dense
            else:
                options = {"stride_on": "pointwise"} | ({"groups": 16} if name == "group" else {})
                net = cs.rewrite(dense, name, options=options)
            macs = count_macs(net, image).true
            print(f"  {name:10} {count_params(net) / 1e6:.3f} M parameters  {macs / 1e6:6.1f} M MACs")


if __name__ == "__main__":
    main()
