"""Training, validation and test images, and how one set is divided into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from convsurgeon.data._images import ImageSet
from convsurgeon.errors import DataError, OptionError
from convsurgeon.preprocessing import Preprocessing

TEST_SEED = 0
"""Test splits are drawn with this seed always, so that no choice of the user's moves them."""

Images = ImageSet | DataLoader[Any]


@dataclass(frozen=True)
class DataSplits:
    """What there is to train on, to choose by, and to be judged by at the end.

    Args:
        name: the name that it was loaded by.
        classes: labels in the order of the class numbers; empty where nobody has said them.
        preprocessing: what the images have gone through; None where the user's own loaders did it.
        flip: whether a mirrored image is still one of its class.
    """

    name: str
    train: Images
    val: Images | None
    test: Images | None
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None
    flip: bool


def check_fraction(val_fraction: float) -> None:
    """Raise unless it is a share that leaves something to train on.

    Raises:
        OptionError: naming it.
    """
    if not 0 <= val_fraction < 1:
        raise OptionError(f"val_fraction is a share from 0 up to, not including, 1, not {val_fraction}")


def hold_out(labels: Tensor, *, count: int, seed: int, what: str) -> tuple[Tensor, Tensor]:
    """Divide images at random: the numbers of those that stay, and of `count` that are held out.

    Every class gives its share, unless one has too few images for that. Global random states are not touched.

    Args:
        what: what is being divided, for the message.

    Raises:
        DataError: if one side would be empty.
    """
    from sklearn.model_selection import train_test_split

    total = len(labels)
    if count < 1 or count >= total:
        raise DataError(f"{what}: {total} image(s) are too few to hold out {max(count, 1)}; add images")
    sizes = labels.bincount()
    sizes = sizes[sizes > 0]
    stratified = int(sizes.min()) >= 2 and min(count, total - count) >= len(sizes)
    stay, held = train_test_split(
        range(total), test_size=count, random_state=seed, stratify=labels.numpy() if stratified else None
    )
    return torch.tensor(stay), torch.tensor(held)


def hold_out_validation(
    images: ImageSet, *, val_fraction: float, seed: int, what: str, of: int | None = None
) -> tuple[ImageSet, ImageSet | None]:
    """Divide training images into those to train on and `val_fraction` of them to choose by; None for 0.

    Args:
        of: the number of images that the fraction refers to, where it is not all of `images`.

    Raises:
        DataError: if there are too few.
    """
    if val_fraction == 0:
        return images, None
    count = round(val_fraction * (len(images) if of is None else of))
    stay, held = hold_out(images.labels, count=count, seed=seed, what=f"validation split of {what}")
    return images.subset(stay), images.subset(held)
