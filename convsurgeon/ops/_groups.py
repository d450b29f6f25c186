"""How many groups: as many as asked for, or the largest number below that divides the channels."""

from __future__ import annotations

from convsurgeon.errors import OptionError


def check_groups(groups: int, owner: str) -> None:
    """Raise an `OptionError` for fewer than two groups."""
    if groups < 2:
        raise OptionError(f"{owner}: option groups must be at least 2, got {groups}")


def largest_divisor(channels: int, at_most: int) -> int:
    """Return the largest divisor of `channels` that is at most so large.

    >>> largest_divisor(12, 8)
    6
    """
    return max(g for g in range(1, min(at_most, channels) + 1) if channels % g == 0)


def no_two_groups(channels: int, asked: int, side: str) -> str:
    """Return the sentence why so many channels, `input` or `output` ones, cannot be in two groups or more."""
    return f"no number of groups from 2 to {asked} divides {channels} {side} channel{'s' if channels > 1 else ''}"
