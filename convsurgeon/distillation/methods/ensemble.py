"""The paper's method: a teacher built online from the feature maps of several students."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from convsurgeon.distillation._features import split_at_features
from convsurgeon.distillation.methods._base import AbstractMethod, Lesson, Setting, register
from convsurgeon.errors import OptionError
from convsurgeon.surgery import copy_module


@final
@register
class Ensemble(AbstractMethod):
    """``CE(t) + Σ_j [CE(s_j) + weight · objective(s_j, t)]`` over several peers; nothing is detached.

    The peers have the student's architecture. The teacher `t` reads their last feature maps:
    concatenated, batch norm, ReLU, the student's own pooling, one linear layer. It is thrown away
    at the end; the peer that is best on validation data is the student. The dense network takes no part.

    Peers that start from one closed form would stay twins, so each but the first has noise added to
    its weights, `noise` times their standard deviation. With `reference=true` the divergence is
    averaged over the classes too, as the paper's reference code does.

    Reference:
        Xie, Lin, Zhang, Luo, 2019, arXiv:1909.13063.
    """

    name: ClassVar[str] = "ensemble"
    summary: ClassVar[str] = "students teach themselves through their joined feature maps"
    reference: ClassVar[str] = "Xie, Lin, Zhang, Luo, 2019, arXiv:1909.13063"
    needs_teacher: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options:
        """How many peers, how different they start, and how much the online teacher counts."""

        peers: int = 4
        noise: float = 0.1
        weight: float = 1.0
        reference: bool = False

        def __post_init__(self) -> None:
            if self.peers < 2:
                raise OptionError(f"ensemble: option peers must be at least 2, got {self.peers}")

    def set_up(self, setting: Setting) -> None:
        """Make the peers and the online teacher."""
        self.teacher = None
        count = self.options.peers
        peers = [self.student, *(copy_module(self.student) for _ in range(count - 1))]
        generator = torch.Generator().manual_seed(setting.seed)
        for peer in peers[1:]:
            _disturb(peer, self.options.noise, generator)
        splits = [split_at_features(peer, setting.sample) for peer in peers]
        self.peers = nn.ModuleList(peers)
        self.graphs = nn.ModuleList(split.network for split in splits)
        channels, width = splits[0].channels * count, splits[0].pooled_width(count)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            linear = nn.Linear(width, setting.classes)
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), splits[0].pooling, linear)
        if self.options.reference:
            values: dict[str, Any] = {**vars(self.objective.options), "reduction": "mean"}
            self.objective = type(self.objective)(values)

    def students(self) -> dict[str, nn.Module]:
        """Return the peers."""
        return {f"peer {index}": peer for index, peer in enumerate(self.peers, start=1)}

    def learning_rates(self) -> list[tuple[nn.Module, float]]:
        """Return the peers and the online teacher."""
        return [(self.peers, 1.0), (self.head, 1.0)]

    def forward(self, images: Tensor, labels: Tensor) -> Lesson:
        """Return the loss of all peers and of the online teacher."""
        features, students = zip(*(graph(images) for graph in self.graphs), strict=True)
        teacher = self.head(torch.cat(features, dim=1))
        loss = functional.cross_entropy(teacher, labels)
        for student in students:
            loss = loss + functional.cross_entropy(student, labels)
            loss = loss + self.options.weight * self.objective(student, teacher)
        return Lesson(loss, students[0], teacher)


@torch.no_grad()
def _disturb(peer: nn.Module, noise: float, generator: torch.Generator) -> None:
    for parameter in peer.parameters():
        if parameter.dim() > 1 and parameter.requires_grad:
            random = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(random * parameter.std(correction=0) * noise)
