"""Ranks as people give them: a number, a share of the full rank, or a share of the kernel's energy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from convsurgeon.errors import OptionError, UnsupportedConvError

Rank = int | float | str
"""`16` is a number of components; `0.25` a share of as many as make the kernel exact; `"90%"` as many as
keep that share of its energy, its squared Frobenius norm."""

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


def check_rank(rank: Rank, what: str) -> None:
    """Raise an `OptionError` for what is no rank; `what` names the option: `lowrank: option rank`."""
    percent = _percent(rank)
    if (
        (percent is not None and 0 < percent <= 100)
        or (isinstance(rank, int) and rank >= 1)
        or (isinstance(rank, float) and 0 < rank <= 1)
    ):
        return
    raise OptionError(
        f"{what} must be a number from 1, a share of the full rank as 0.25, or of the energy kept as 90%, got {rank!r}"
    )


def is_share_of_energy(rank: Any) -> bool:
    """Whether an option's value is a rank as a share of energy, which only a trained kernel turns into a number."""
    return _percent(rank) is not None


def fit_rank(rank: Rank, full: int, keeping: Callable[[float], int] | None, *, multiple: int = 1) -> Rank:
    """Return a rank as a number from 1 to `full`, or as it is where it depends on a kernel that is not known.

    Args:
        full: the rank at which the op can represent every kernel.
        keeping: returns how many components keep a share (0..1) of the kernel's energy; None without a kernel.
        multiple: what shares come to, rounded up, is a multiple of this number.

    >>> fit_rank(0.25, 64, None), fit_rank(100, 64, None), fit_rank("90%", 64, None)
    (16, 64, '90%')
    >>> fit_rank(0.1, 64, None, multiple=4), fit_rank(1.0, 27, None, multiple=4), fit_rank(9, 27, None, multiple=4)
    (8, 27, 9)
    """
    if isinstance(rank, int):
        return min(full, rank)
    percent = _percent(rank)
    if percent is not None and keeping is None:
        return rank
    asked = round(float(rank) * full) if percent is None or keeping is None else keeping(percent / 100)
    return min(full, math.ceil(max(1, asked) / multiple) * multiple)


def rank_not_known(rank: Rank) -> str | None:
    """Return the sentence why a fitted rank is no number, or None."""
    if isinstance(rank, int):
        return None
    return f"rank={rank} is a share of the trained kernel's energy, and there are no weights; give a number or a ratio"


def known_rank(rank: Rank) -> int:
    """Return a fitted rank.

    Raises:
        UnsupportedConvError: with the sentence of `rank_not_known`.
    """
    if reason := rank_not_known(rank):
        raise UnsupportedConvError(reason)
    assert isinstance(rank, int)
    return rank


def _percent(rank: Any) -> float | None:
    found = _PERCENT.fullmatch(rank) if isinstance(rank, str) else None
    return float(found[1]) if found else None
