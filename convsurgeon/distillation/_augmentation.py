"""Random crops and mirror images of a batch that is already on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from convsurgeon.errors import OptionError


@dataclass(frozen=True)
class Augmentation:
    """What is done to a batch before teacher and students see it, all of them the same.

    Args:
        shift: each image is moved by up to so many pixels both ways; the border is repeated. A side of 1 stays, and
            signals `(B, C, L)` move along their one axis.
        flip: whether half of the images are mirrored left to right.
    """

    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise OptionError(f"augmentation shift must be 0 or more pixels, got {self.shift}")

    @classmethod
    def usual(cls, size: tuple[int, int], *, flip: bool) -> Augmentation:
        """Return the usual one for images of that height and width: shifts by an eighth (4 pixels of 32).

        Of signals, which have a side of 1, by an eighth of the other one.
        """
        return cls(shift=min((side for side in size if side > 1), default=1) // 8, flip=flip)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Augment a batch with torch's global random state."""
        if images_BCHW.dim() == 3:
            return self._shifted(images_BCHW[..., None])[..., 0] if self.shift else images_BCHW
        if images_BCHW.dim() != 4:
            return images_BCHW
        if self.flip:
            mirrored = torch.rand(len(images_BCHW), 1, 1, 1, device=images_BCHW.device) < 0.5
            images_BCHW = torch.where(mirrored, images_BCHW.flip(-1), images_BCHW)
        return self._shifted(images_BCHW) if self.shift else images_BCHW

    def _shifted(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        device = images.device
        down, across = (self.shift if side > 1 else 0 for side in (height, width))
        padded = functional.pad(images, [across, across, down, down], mode="replicate")
        corner = [torch.randint(2 * most + 1, (batch, 1), device=device) for most in (down, across)]
        rows = (corner[0] + torch.arange(height, device=device))[:, None, :, None]
        columns = (corner[1] + torch.arange(width, device=device))[:, None, None, :]
        index = torch.arange(batch, device=device)[:, None, None, None]
        return padded[index, torch.arange(channels, device=device)[None, :, None, None], rows, columns]
