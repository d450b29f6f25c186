"""In which form the outputs of networks are compared, where they give others in train mode than in eval mode.

Some networks give logits in train mode and probabilities in eval mode, some give a list with auxiliary outputs, some
undecoded feature maps. A network's own code tells the modes apart by `training`; so do its layers, of which dropout
and batch norm compute something else in train mode, but give the same form. So the two are set apart here: the code
of student and teacher runs in one mode, while the layers of a network that learns stay in train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from convsurgeon.errors import DistillationError, one_line
from convsurgeon.evaluation import float_leaves
from convsurgeon.surgery import copy_module, in_mode, untouched_random_state

_LAYERS_OF = ("torch.nn.", "torchvision.ops.", "timm.layers.")
_LOOKED_AT = 2
_LINKS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda leaf: leaf,
    lambda leaf: leaf.softmax(1),
    lambda leaf: leaf.log_softmax(1),
    torch.sigmoid,
)
"""What eval mode may make of an output of train mode."""


@dataclass(frozen=True)
class OutputForm:
    """The mode in which a network's own code runs, and where its scores are in what it gives then.

    Args:
        training: whether that is train mode.
        modes_agree: whether both modes give the same, so that a network that does not learn stays in eval mode.
        index: the position of the output that eval mode gives among the float tensors; the first in eval mode.
        probabilities: whether its rows sum to one, so that the scores are their logarithms.
        layers: names of further modules that are layers: they write to their buffers in train mode.
    """

    training: bool
    modes_agree: bool = False
    index: int = 0
    probabilities: bool = False
    layers: frozenset[str] = frozenset()

    def apply(self, network: nn.Module, *, learns: bool) -> None:
        """Put a network into the form, in place.

        The layers of one that learns are in train mode, but for those that its own `train()` keeps in eval mode; the
        layers of another one are in eval mode.
        """
        training = self.training and (learns or not self.modes_agree)
        in_mode(network, training=learns or training)
        layers = [(layer, layer.training) for layer in _layers_of(network, self.layers)]
        if not training:
            in_mode(network, training=False)
        for layer, training in layers:
            layer.training = learns and training

    def scores(self, output: Any) -> Tensor:
        """Return the class scores `(B, K)` in an output of that form."""
        leaf = float_leaves(output)[self.index]
        return leaf.clamp_min(torch.finfo(leaf.dtype).tiny).log() if self.probabilities else leaf


def choose_form(networks: Sequence[nn.Module], images: Tensor, *, for_labels: bool) -> OutputForm:
    """Return the form in which all networks are run.

    Where both modes give the same, it does not matter. Where they differ, outputs that are matched with each other are
    those of eval mode, as they are used; if no gradient flows through these, those of train mode. Labels are learned
    from the output of train mode that eval mode makes its own from, or that differs by chance only, as dropout in the
    network's own code makes it; else in the form of eval mode.

    Args:
        networks: teacher and student, or the student alone, on the CPU.
        images: a batch that they take.
        for_labels: whether class scores are needed.

    Raises:
        DistillationError: if no form serves, with the reasons.
    """
    with untouched_random_state():
        first, *_ = looks = [_Look(network, images[:_LOOKED_AT]) for network in networks]
        in_use, in_training = first.outputs(training=False), first.outputs(training=True)
        layers = frozenset().union(*(look.layers for look in looks))
        random = any(look.is_random for look in looks)
        if random:
            same = _are_alike(in_use, in_training)
            index = 0 if same else None
        else:
            same, index = _are_equal(in_use, in_training), _link(in_use, in_training)
        train = OutputForm(True, same, index or 0, _are_distributions(in_training, index or 0), layers)
        use = OutputForm(False, False, 0, _are_distributions(in_use, 0), layers)
        forms = [train, use] if (same and not random) or (for_labels and index is not None) else [use, train]
        if for_labels and index is None:
            forms = [use]
        reasons = {form.training: _why_not(looks, form) for form in forms}
    for form in forms:
        if reasons[form.training] is None:
            return form
    if len(set(reasons.values())) == 1:
        raise DistillationError(str(reasons[forms[0].training]))
    said = "; ".join(f"in {'train' if mode else 'eval'} mode {reason}" for mode, reason in reasons.items())
    raise DistillationError(f"the outputs cannot be learned from: {said}")


class _Look:
    """What a copy of a network gives in either mode, its layers in eval mode; an error as text."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network, self.images = copy_module(network), images
        self.layers: set[str] = set()
        self.is_random = False
        """Whether train mode gives something else each time."""
        self._known: dict[bool, list[Tensor] | str] = {}

    def outputs(self, *, training: bool) -> list[Tensor] | str:
        """Return the float tensors that it gives, with their history."""
        if training not in self._known:
            self._known[training] = self._run(training=training)
        return self._known[training]

    def _run(self, *, training: bool) -> list[Tensor] | str:
        for _ in range(2):  # anew where layers were found that had been taken for the network's own code
            OutputForm(training, layers=frozenset(self.layers)).apply(self.network, learns=False)
            before = {fqn: buffer.clone() for fqn, buffer in self.network.named_buffers()}
            try:
                with torch.enable_grad():
                    leaves = float_leaves(self.network(self.images.clone()))
                    again = float_leaves(self.network(self.images.clone())) if training else leaves
            except Exception as error:  # whatever a forward of the user's raises
                return f"the network fails: {one_line(error)}"
            written = {
                fqn.rpartition(".")[0]
                for fqn, buffer in self.network.named_buffers()
                if fqn in before and not torch.equal(buffer, before[fqn])
            }
            with torch.no_grad():
                for fqn, buffer in self.network.named_buffers():
                    if fqn in before:
                        buffer.copy_(before[fqn])
            if not training or written <= self.layers:
                break
            self.layers |= written
        self.is_random = self.is_random or (training and not _are_equal(leaves, again))
        return leaves


def _why_not(looks: Sequence[_Look], form: OutputForm) -> str | None:
    """Return why outputs of that form cannot be learned from, or None."""
    outputs = [look.outputs(training=form.training) for look in looks]
    if form.training and not form.modes_agree and any(look.is_random for look in looks):
        return "the outputs differ from run to run"
    for found in outputs:
        if isinstance(found, str):
            return found
    shapes = [[tuple(leaf.shape) for leaf in found] for found in outputs if not isinstance(found, str)]
    if not shapes[-1]:
        return "the student gives no float tensor"
    if shapes[0] != shapes[-1]:
        return f"the student gives tensors of shapes {shapes[-1]}, the teacher {shapes[0]}"
    student = outputs[-1]
    assert not isinstance(student, str)
    learns = any(parameter.requires_grad for parameter in looks[-1].network.parameters())
    if learns and not any(leaf.requires_grad for leaf in student):
        return "no gradient comes from its answers; take away what detaches them, as torch.no_grad() does"
    return None


def _layers_of(network: nn.Module, further: frozenset[str]) -> list[nn.Module]:
    return [
        module
        for fqn, module in network.named_modules()
        if isinstance(module, (_NormBase, _DropoutNd))
        or type(module).__module__.startswith(_LAYERS_OF)
        or fqn in further
    ]


def _link(in_use: Sequence[Tensor] | str, in_training: Sequence[Tensor] | str) -> int | None:
    """Return which output of train mode the first one of eval mode is made from, or None."""
    if isinstance(in_use, str) or isinstance(in_training, str):
        return None
    for index, leaf in enumerate(in_training):
        if in_use and leaf.shape == in_use[0].shape and leaf.dim() > 1:
            for link in _LINKS:
                if torch.allclose(link(leaf), in_use[0], rtol=1e-3, atol=1e-5):
                    return index
    return None


def _are_equal(some: Sequence[Tensor] | str, others: Sequence[Tensor] | str) -> bool:
    if isinstance(some, str) or isinstance(others, str) or len(some) != len(others):
        return False
    pairs = zip(some, others, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in pairs)


def _are_alike(some: Sequence[Tensor] | str, others: Sequence[Tensor] | str) -> bool:
    """Whether two outputs may be of one form, as far as it can be told where one of them is random."""
    if isinstance(some, str) or isinstance(others, str):
        return False
    sizes = [[leaf.shape for leaf in leaves] for leaves in (some, others)]
    ranges = [[bool(((leaf >= 0) & (leaf <= 1)).all()) for leaf in leaves] for leaves in (some, others)]
    return sizes[0] == sizes[1] and ranges[0] == ranges[1]


def _are_distributions(leaves: Sequence[Tensor] | str, index: int) -> bool:
    if isinstance(leaves, str) or len(leaves) <= index or leaves[index].dim() != 2 or leaves[index].shape[1] < 2:
        return False
    rows = leaves[index].detach().float()
    sums = rows.sum(1)
    return bool((rows >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
