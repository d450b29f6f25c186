"""What a calibration came to, stage by stage and site by site."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PolishRun:
    """What the polish did.

    Args:
        student: in eval mode; None if every run diverged, or none could be done.
        steps: of the run that counts, without the trials of learning rates.
        learning_rate: its peak.
        batch_size: images a step.
        obstacle: why there is no student; empty where there is one.
        wanted: how many steps were asked for, trials included.
        trial_steps: how many went into the trials of learning rates.
        step_seconds: what a step of the run that counts took; 0 where there was none.
    """

    student: nn.Module | None
    steps: int
    learning_rate: float
    batch_size: int
    obstacle: str = ""
    wanted: int = 0
    trial_steps: int = 0
    step_seconds: float = 0.0

    @property
    def cut(self) -> str:
        """How many of the steps were taken, where the time did not suffice for all; empty where it did."""
        taken = self.steps + self.trial_steps
        return f"{taken:,} of {self.wanted:,} steps" if 0 < taken < self.wanted else ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the student as plain JSON data."""
        return {
            "steps": self.steps,
            "trial_steps": self.trial_steps,
            "wanted_steps": self.wanted,
            "step_seconds": round(self.step_seconds, 4),
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class Stage:
    """How close the student is to the teacher on the images held out, after one stage.

    Args:
        name: `closed form`, `batch-norm statistics`, `fit`, `polish`.
        agreement: the share (0..1) of images with the same highest score; None where answers are no scores.
        error: squared difference of the answers over the teacher's squared answers.
        seconds: that the stage took.
        note: what was decided in it.
        score: what the caller's judge said of the student then.
        divergence: of the class distributions, in nats, by which two students are compared; None as for `agreement`.
    """

    name: str
    agreement: float | None
    error: float
    seconds: float
    note: str = ""
    score: float | None = None
    divergence: float | None = None


@dataclass(frozen=True)
class SiteFit:
    """What the fit did for one op: relative squared errors of its output, and the ridge chosen; None if not fitted."""

    fqn: str
    before: float | None
    after: float | None
    ridge: float | None
    note: str = ""


@dataclass(frozen=True)
class CalibrationResult:
    """The student, and what each stage was worth.

    Args:
        student: in eval mode.
        stages: in the order in which they were done.
        sites: one entry for each op that runs on the images.
        images: how many were fitted and held out.
        seconds: in all, reading the images included, without the judge's.
        peak_memory: of the process until now, in bytes; None where the system does not say.
        seed: of the choice of images and positions, and of the polish.
        polish: how it went; None if there was none.
    """

    student: nn.Module
    stages: tuple[Stage, ...]
    sites: tuple[SiteFit, ...]
    images: tuple[int, int]
    seconds: float
    peak_memory: int | None
    seed: int
    polish: PolishRun | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the student as plain JSON data; None for what is no finite number."""
        return {
            "seed": self.seed,
            "images": {"fitted": self.images[0], "held_out": self.images[1]},
            "stages": [_plain(stage) for stage in self.stages],
            "polish": self.polish and self.polish.to_dict(),
            "sites": [_plain(site) for site in self.sites],
            "seconds": round(self.seconds, 1),
            "peak_memory": self.peak_memory,
        }


def _plain(found: Stage | SiteFit) -> dict[str, Any]:
    entries = asdict(found).items()
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entries}


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far in bytes, or None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
