"""What a least-squares fit of one convolution needs to know of its data.

Shape letters: N rows (positions of images), F features of a patch (I * kh * kw), O out_channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

_GRAM_FEATURES = 5120
"""Up to so many features the Gram matrix is kept (210 MB), beyond it the rows themselves."""
_ROWS = 8192
"""About how many rows are kept where there is no Gram matrix: 600 MB with 18,432 features."""
_DOUBLE_PRODUCT = 2e8
"""Up to so many multiply-adds a product is done in float64."""


class AbstractMoments(ABC):
    """The squared error ``sum_n |W x_n - y_n|²`` as a function of the kernel `W` `(O, F)`."""

    rows: int = 0
    energy: float = 0.0
    """``sum_n |y_n|²``."""

    @abstractmethod
    def add(self, x_NF: Tensor, y_NO: Tensor) -> None:
        """Take more rows into account."""

    @abstractmethod
    def value_and_gradient(self, weight_OF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error, a float64 scalar, and its gradient `(O, F)`, at the cost of one product."""

    @abstractmethod
    def squared_error(self, weight_OF: Tensor) -> float:
        """Return the squared error over all rows, in float64."""

    @abstractmethod
    def product_cost(self, channels: int) -> int:
        """Return how many multiply-adds `value_and_gradient` takes for a kernel of so many output channels."""

    @property
    @abstractmethod
    def feature_energy(self) -> float:
        """The mean over features of ``sum_n x_nf²``."""

    def relative_error(self, weight_OF: Tensor) -> float:
        """Return the squared error over the targets' energy: 0 is exact, 1 is what zeros would do."""
        return self.squared_error(weight_OF) / self.energy if self.energy > 0 else 0.0


class Gram(AbstractMoments):
    """Second moments: ``G = sum x xᵀ`` `(F, F)` and ``D = sum y xᵀ`` `(O, F)`, in float64.

    Each batch of rows is multiplied in the precision in which it comes, and the sums are float64.
    """

    def __init__(self, features: int, channels: int, device: torch.device) -> None:
        self.gram_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross_OF = torch.zeros(channels, features, dtype=torch.float64, device=device)
        self._single_FF: Tensor | None = None

    def add(self, x_NF: Tensor, y_NO: Tensor) -> None:
        """Take more rows into account."""
        self._single_FF = None
        self.gram_FF += x_NF.mT @ x_NF
        self.cross_OF += y_NO.mT @ x_NF
        self.energy += float(y_NO.double().square().sum())
        self.rows += len(x_NF)

    def value_and_gradient(self, weight_OF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error and its gradient; large products are done in float32."""
        weight = weight_OF.double()
        if len(weight) * self.gram_FF.numel() <= _DOUBLE_PRODUCT:
            product_OF = weight @ self.gram_FF
        else:
            if self._single_FF is None:
                self._single_FF = self.gram_FF.float()
            product_OF = (weight.float() @ self._single_FF).double()
        value = ((product_OF - 2 * self.cross_OF) * weight).sum() + self.energy
        return value, 2 * (product_OF - self.cross_OF)

    def squared_error(self, weight_OF: Tensor) -> float:
        """Return the squared error over all rows."""
        weight = weight_OF.double()
        half = weight @ self.gram_FF - 2 * self.cross_OF
        # a difference of large numbers where the fit is exact; what is no number stays none
        error = float((half * weight).sum()) + self.energy
        return 0.0 if error < 0 else error

    def product_cost(self, channels: int) -> int:
        """Return the multiply-adds of one product with the Gram matrix."""
        return channels * self.gram_FF.numel()

    @property
    def feature_energy(self) -> float:
        """The mean of the Gram matrix's diagonal."""
        return float(self.gram_FF.diagonal().mean())

    def merged(self, other: Gram) -> Gram:
        """Return the moments of the rows of both."""
        result = Gram(len(self.gram_FF), len(self.cross_OF), self.gram_FF.device)
        result.gram_FF, result.cross_OF = self.gram_FF + other.gram_FF, self.cross_OF + other.cross_OF
        result.energy, result.rows = self.energy + other.energy, self.rows + other.rows
        return result


class Rows(AbstractMoments):
    """The rows themselves, where a Gram matrix would be larger than they are: a fit on a sample of positions."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []

    def add(self, x_NF: Tensor, y_NO: Tensor) -> None:
        """Take more rows into account."""
        self._x.append(x_NF.float())
        self._y.append(y_NO.float())
        self.energy += float(y_NO.double().square().sum())
        self.rows += len(x_NF)

    def value_and_gradient(self, weight_OF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error and its gradient, in float32 but for the sums."""
        weight = weight_OF.float()
        value, gradient_OF = (
            weight_OF.new_zeros((), dtype=torch.float64),
            torch.zeros_like(weight_OF, dtype=torch.float64),
        )
        for x, y in self._pairs():
            misses_NO = self._misses(x, y, weight)
            value += misses_NO.double().square().sum()
            gradient_OF += 2 * (misses_NO.mT @ x)
        return value, gradient_OF

    def squared_error(self, weight_OF: Tensor) -> float:
        """Return the squared error over all rows."""
        weight = weight_OF.float()
        return sum(float(self._misses(x, y, weight).double().square().sum()) for x, y in self._pairs())

    def product_cost(self, channels: int) -> int:
        """Return the multiply-adds of the outputs, and of the gradient."""
        return 2 * channels * self.rows * self._x[0].shape[1]

    @property
    def feature_energy(self) -> float:
        """The mean over features of their summed squares."""
        return sum(float(x.double().square().sum()) for x in self._x) / self._x[0].shape[1]

    def merged(self, other: Rows) -> Rows:
        """Return the moments of the rows of both, which share their memory."""
        result = Rows()
        result._x, result._y = self._x + other._x, self._y + other._y
        result.energy, result.rows = self.energy + other.energy, self.rows + other.rows
        return result

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._x, self._y, strict=True))

    @staticmethod
    def _misses(x_NF: Tensor, y_NO: Tensor, weight_OF: Tensor) -> Tensor:
        return x_NF @ weight_OF.mT - y_NO


def keeps_gram(features: int) -> bool:
    """Whether second moments of so many features are kept whole, or a sample of rows instead."""
    return features <= _GRAM_FEATURES


def rows_an_image(images: int, *, most: int) -> int:
    """Return how many rows of each image are kept where there is no Gram matrix: one at least, `most` at most."""
    return max(1, min(most, _ROWS // images))
