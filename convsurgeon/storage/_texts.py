"""Texts out of files, where they stand in a message."""

from __future__ import annotations

_LONGEST = 200


def printable(text: object) -> str:
    """Return a text as one line that moves no cursor, and no longer than a line should be.

    >>> printable("a\\nb\\x1b[2J")
    'a\\\\nb\\\\x1b[2J'
    """
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text)[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
