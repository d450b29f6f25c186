"""What a network's origin says about its outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from convsurgeon.record import read_record

_LIBRARIES = {"torchvision.models": "torchvision", "timm.models": "timm"}
_COUNTS = ("num_classes", "n_classes", "num_labels")


@dataclass(frozen=True)
class Source:
    """What a network says of its classes.

    Args:
        names: how many class names its record holds; 0 for none.
        counts: what counts its classes, such as its attribute `num_classes`, or the argument that it was built with.
        package: the name of the library of classifiers that its class belongs to; empty for one of the user's own.
    """

    names: int = 0
    counts: tuple[tuple[str, int], ...] = ()
    package: str = ""


def source_of(network: nn.Module) -> Source:
    """Return what a network says of its classes."""
    record = read_record(network)
    arguments = record.get("source", {}).get("args", {})
    found = [(name, arguments.get(name, getattr(network, name, None))) for name in _COUNTS]
    counts = tuple((name, count) for name, count in found if isinstance(count, int) and not isinstance(count, bool))
    module = type(network).__module__
    package = next((name for start, name in _LIBRARIES.items() if module.startswith(start)), "")
    return Source(len(record.get("classes") or ()), counts, package)
