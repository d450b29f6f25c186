"""Two convolutions for one, with a few channels between them: a kernel, seen as a matrix, of lower rank."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

from torch import Tensor

from convsurgeon.factorization import rank_keeping
from convsurgeon.ops._base import AbstractCheapConv
from convsurgeon.ops._ranks import fit_rank, known_rank, rank_not_known
from convsurgeon.spec import ConvSpec


class AbstractLowRank(AbstractCheapConv):
    """A convolution to `rank` channels, then one from them.

    A subclass says as which matrix it takes the kernel; the rank is given as a number, as a share of the
    matrix's full rank, or as a share of the energy (squared Frobenius norm) that the kernel shall keep. It is
    the option `rank`.
    """

    @classmethod
    @abstractmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        """Return the dense kernel `(O, I, kh, kw)` as the matrix whose rank is lowered."""

    @classmethod
    @abstractmethod
    def matrix_size(cls, spec: ConvSpec) -> tuple[int, int]:
        """Return the rows and columns of that matrix."""

    @classmethod
    @abstractmethod
    def refuse(cls, spec: ConvSpec) -> str | None:
        """Return why the geometry does not fit, whatever the rank, or None."""

    @classmethod
    def fit_options(cls, spec: ConvSpec, options: Any, weight: Tensor | None = None) -> Any:
        """Turn the rank into a number of at most the full rank; a share of energy needs the weight."""
        keeping = None if weight is None else lambda share: rank_keeping(cls.as_matrix(weight), share)
        return replace(options, rank=fit_rank(options.rank, min(cls.matrix_size(spec)), keeping))

    @classmethod
    def why_not(cls, spec: ConvSpec, options: Any) -> str | None:
        """Refuse what does not fit, and a share of energy without a kernel to take it from."""
        return cls.refuse(spec) or rank_not_known(cls.fit_options(spec, options).rank)

    @classmethod
    def rank_of(cls, spec: ConvSpec, options: Any) -> int:
        """Return the rank as a number.

        Raises:
            UnsupportedConvError: if it is a share of energy.
        """
        return known_rank(cls.fit_options(spec, cls.parse_options(options)).rank)
