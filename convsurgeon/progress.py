"""What long work says while it runs: one small event, handed to a callback.

Only the command line draws; the library calls `report(Progress(...))` and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One step of a long job.

    Args:
        stage: what is going on, such as `"train"` or `"export"`.
        done: how many units are behind us.
        total: how many there will be, or None where nobody knows.
        figures: what there is to show now, by name (`loss`, `images_per_second`, `seconds_left`).
        message: one line for a person, where there is one.
    """

    stage: str
    done: int = 0
    total: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


Report = Callable[[Progress], None]


def be_silent(event: Progress) -> None:
    """Ignore the event: the default of every `report` argument."""
