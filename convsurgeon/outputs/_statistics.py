"""Statistics that tell the logits of a softmax from other numbers.

The gradient of a cross-entropy with a softmax sums to zero over the classes of an image, so gradient descent moves
the logits within the hyperplane of zero sum, and their mean over the classes keeps the little spread that it had at
first. Adam, whose steps do not sum to zero, moves it more where there are many classes. What tells those from other
numbers, and a softmax from sigmoids whose labels are equally many in every image, is how far the highest is ahead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEWEST_ROWS = 16
"""How many rows it takes."""
_PATTERNS = 256


def shared_part(output_BK: Tensor) -> float:
    """Return ``R = K · mean_b (mean_k c)² / mean_bk c²`` of the centered outputs ``c = o − mean_b o``.

    It is near 0 for logits trained with a softmax, about 1 for independent numbers, and up to K for numbers that rise
    and fall together. Centered, since Adam, whose steps do not sum to zero, moves the mean of all images.
    """
    return float(_along(_centered(output_BK), torch.ones(1, output_BK.shape[1])))


def lead(output_BK: Tensor) -> float:
    """Return how far the highest number is ahead of the second, over the largest later gap in the upper half.

    Both are means over images. Independent normal numbers have about 2; labels of which each image has several have
    less. Infinite where there are two numbers only.
    """
    sorted_BK = output_BK.double().sort(dim=1, descending=True).values
    gaps = -sorted_BK.diff(dim=1).mean(0)
    later = gaps[1 : max(2, output_BK.shape[1] // 2)]
    return float(gaps[0] / later.max().clamp_min(1e-30)) if len(later) else math.inf


def confidence(output_BK: Tensor) -> float:
    """Return the highest share (0..1) of a softmax, a mean over images: of a trained classifier, about its accuracy."""
    return float(output_BK.double().softmax(1).amax(1).mean())


def uniqueness(output_BK: Tensor) -> float:
    """Return the share (0..1) of sums with other signs that vary as little as the plain sum, of up to 256 patterns.

    Numbers of which few are independent have a small sum by chance, but then other sums are as small.
    """
    columns = output_BK.shape[1]
    if 2 ** (columns - 1) <= _PATTERNS:
        bits = torch.arange(1, 2 ** (columns - 1))[:, None] >> torch.arange(columns) & 1
    else:
        bits = torch.randint(2, (_PATTERNS, columns), generator=torch.Generator().manual_seed(0))
    centered = _centered(output_BK)
    others = _along(centered, 1.0 - 2 * bits)
    return float((others <= _along(centered, torch.ones(1, columns))).float().mean())


def _centered(output_BK: Tensor) -> Tensor:
    return output_BK.double().cpu() - output_BK.double().cpu().mean(0)


def _along(centered_BK: Tensor, signs_PK: Tensor) -> Tensor:
    sums_BP = centered_BK @ signs_PK.to(centered_BK).mT
    energy = centered_BK.square().mean() * centered_BK.shape[1]
    return sums_BP.square().mean(0) / energy.clamp_min(1e-30)
