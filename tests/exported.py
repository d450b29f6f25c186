"""Exported programs for tests: small ones, and ones whose archive was edited afterwards."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Records = dict[str, bytes]


class Digits(nn.Module):
    """Convolutions with and without bias, batch norm, dropout as a layer and as a function, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(), nn.BatchNorm2d(16))
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.dropout(self.blocks(x), 0.2, self.training)
        return self.fc(self.drop(x.mean((2, 3)).view(x.shape[0], -1)))


def export(net: nn.Module, path: Path, *args: Any, batch: bool = True, **kwargs: Any) -> Path:
    """Write the program of a network as it is; without arguments, for images of 3x9x9."""
    args = args or (() if kwargs else (torch.zeros(2, 3, 9, 9),))
    dim = torch.export.Dim("batch")
    free = torch.utils._pytree.tree_map(lambda leaf: {0: dim} if isinstance(leaf, Tensor) else None, (args, kwargs))
    shapes = {**dict(zip(("x", "y"), free[0], strict=False)), **free[1]} if batch else None
    torch.export.save(torch.export.export(net, args, kwargs, dynamic_shapes=shapes), path)
    return path


def settle(net: nn.Module) -> nn.Module:
    """Give batch norms statistics that are not their initial ones."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=torch.Generator().manual_seed(0))
            module.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    return net


def read_records(path: Path) -> Records:
    """Return the records of an archive, under their names without its root folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_records(path: Path, records: Records, *, compress: bool = False) -> Path:
    """Write an archive as torch.export.save does."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(f"net/{name}", content)
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], None], *, record: str = "models/model.json") -> Path:
    """Change the JSON of a record in place."""
    records = read_records(path)
    document = json.loads(records[record])
    change(document)
    return write_records(path, {**records, record: json.dumps(document).encode()})


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and key of everything in a JSON document."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from places_in(item)


def strings_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and key of every string in a JSON document."""
    return ((container, key) for container, key in places_in(value) if isinstance(container[key], str))
