"""The data sets that have a name of their own, each read whole into memory as uint8."""

from __future__ import annotations

import gzip
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convsurgeon.data._splits import TEST_SEED, hold_out
from convsurgeon.errors import DataError, one_line
from convsurgeon.preprocessing import Preprocessing

DEFAULT_ROOT = Path("data")
# where Debian's package dataset-fashion-mnist puts the four files, gzipped
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True)
class Raw:
    """Images uint8 `(N, C, H, W)` or `(N, H, W)` as they come, and int64 labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class NamedSet:
    """A set that is loaded by name.

    Args:
        preprocessing: its natural one: native size, mean and deviation of its training images.
        flip: whether a mirrored image is still one of its class.
        read: reads it from the folder where downloaded data sets lie.
    """

    preprocessing: Preprocessing
    flip: bool
    read: Callable[[Path], Raw]


def _read_digits(root: Path) -> Raw:
    """Read scikit-learn's 1,797 digits, which need no download; a fifth of them are the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    stay, held = hold_out(labels, count=math.ceil(len(labels) / 5), seed=TEST_SEED, what="digits")
    classes = tuple(str(name) for name in digits.target_names)
    return Raw((images[stay], labels[stay]), (images[held], labels[held]), classes)


def _read_fashion_mnist(root: Path) -> Raw:
    """Read torchvision's folder or, where no other was named, the Debian package's, unpacked for the moment only."""
    from torchvision.datasets import FashionMNIST

    raw = root / "FashionMNIST" / "raw"
    if all((raw / name).is_file() for name in _FASHION_MNIST_FILES):
        return _from_torchvision("fashion-mnist", FashionMNIST, root)
    for packed in (raw, *([DEBIAN_FASHION_MNIST] if root == DEFAULT_ROOT else [])):
        if all((packed / f"{name}.gz").is_file() for name in _FASHION_MNIST_FILES):
            with tempfile.TemporaryDirectory() as folder:
                _unpack(packed, Path(folder) / "FashionMNIST" / "raw")
                return _from_torchvision("fashion-mnist", FashionMNIST, Path(folder), where=packed)
    raise DataError(
        f"fashion-mnist is not under {root}; get it with"
        f" torchvision.datasets.FashionMNIST('{root}', download=True) or with"
        " apt-get install dataset-fashion-mnist, or name its folder with --data-root"
    )


def _unpack(packed: Path, raw: Path) -> None:
    raw.mkdir(parents=True)
    for name in _FASHION_MNIST_FILES:
        try:
            with gzip.open(packed / f"{name}.gz") as source, open(raw / name, "wb") as target:
                shutil.copyfileobj(source, target)
        except (OSError, EOFError) as error:
            raise DataError(f"{packed / name}.gz cannot be unpacked: {one_line(error)}; get it anew") from error


def _read_cifar10(root: Path) -> Raw:
    from torchvision.datasets import CIFAR10

    return _read_cifar("cifar10", CIFAR10, root)


def _read_cifar100(root: Path) -> Raw:
    from torchvision.datasets import CIFAR100

    return _read_cifar("cifar100", CIFAR100, root)


def _read_cifar(name: str, kind: Any, root: Path) -> Raw:
    way_out = f"torchvision.datasets.{kind.__name__}('{root}', download=True)"
    if not (root / kind.base_folder).is_dir():
        raise DataError(f"{name} is not under {root}; get it with {way_out}, or name its folder with --data-root")
    return _from_torchvision(name, kind, root)


def _from_torchvision(name: str, kind: Any, root: Path, *, where: Path | None = None) -> Raw:
    try:
        train, test = kind(root, train=True, download=False), kind(root, train=False, download=False)
        return Raw(_tensors(train), _tensors(test), tuple(train.classes))
    except Exception as error:  # a damaged file fails in whatever way its parser fails
        raise DataError(
            f"{name} under {where or root} is damaged: {one_line(error)}; remove it and get it anew with"
            f" torchvision.datasets.{kind.__name__}(ROOT, download=True)"
        ) from error


def _tensors(part: Any) -> tuple[Tensor, Tensor]:
    """torchvision keeps MNIST's kind as tensors (N, H, W) and CIFAR's as arrays (N, H, W, C)."""
    images = torch.as_tensor(part.data)
    images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images
    return images, torch.as_tensor(part.targets, dtype=torch.int64)


NAMED: dict[str, NamedSet] = {
    "digits": NamedSet(Preprocessing((8, 8), (0.305,), (0.376,), color="gray"), False, _read_digits),
    "fashion-mnist": NamedSet(Preprocessing((28, 28), (0.2860,), (0.3530,), color="gray"), True, _read_fashion_mnist),
    "cifar10": NamedSet(
        Preprocessing((32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), True, _read_cifar10
    ),
    "cifar100": NamedSet(
        Preprocessing((32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), True, _read_cifar100
    ),
}
