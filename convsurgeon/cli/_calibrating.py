"""Calibration on the command line: images in, stages and sites out."""

from __future__ import annotations

import json as json_module
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsurgeon.cli._drawing import Drawing, console, say
from convsurgeon.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    from convsurgeon.calibration import CalibrationResult


@dataclass(frozen=True)
class CalibrationRequest:
    """What the flags of a calibration say."""

    data: str | None
    images: int
    polish: bool
    polish_minutes: float
    data_root: Path | None
    size: str | None
    mean: str | None
    std: str | None
    color: str | None
    seed: int

    def check(self) -> None:
        """Raise an `OptionError` for flags that say something about a calibration that nobody asked for."""
        said = {"--data-root": self.data_root, "--size": self.size, "--mean": self.mean, "--std": self.std}
        idle = [flag for flag, value in {**said, "--color": self.color}.items() if value is not None]
        if self.data is None and idle:
            raise OptionError(f"{idle[0]} is about images to calibrate with; say --calibrate DATA, too")
        if not 0 < self.polish_minutes < math.inf:
            raise OptionError(
                f"--polish-minutes must be a number above 0, got {self.polish_minutes:g}; or say --no-polish"
            )

    def load(self, model: nn.Module) -> tuple[Any, bool]:
        """Return the images, as the model takes them, and whether they may be mirrored."""
        from convsurgeon.data import ImageSet, default_preprocessing, load_images
        from convsurgeon.preprocessing import IMAGENET, parse_preprocessing, preprocessing_of

        assert self.data is not None
        named = None if Path(self.data).expanduser().is_dir() else default_preprocessing(self.data)
        start = preprocessing_of(model) or named or IMAGENET
        wanted = parse_preprocessing(start, size=self.size, mean=self.mean, std=self.std, color=self.color)
        images, flip = load_images(self.data, root=self.data_root, preprocessing=wanted, seed=self.seed)
        if isinstance(images, ImageSet):
            say(f"preprocessing: {images.preprocessing}")
        return images, flip

    def run(self, teacher: nn.Module, student: nn.Module, loaded: tuple[Any, bool]) -> CalibrationResult:
        """Calibrate, drawing the progress."""
        from convsurgeon.calibration import Polish, calibrate_and_report

        images, flip = loaded
        polish = Polish(seconds=60 * self.polish_minutes, flip=flip) if self.polish else False
        with Drawing() as drawing:
            return calibrate_and_report(
                teacher, student, images, polish=polish, limit=self.images, seed=self.seed, report=drawing
            )


def shape_of(loaded: tuple[Any, bool]) -> str | None:
    """Return the shape of one image as it is typed after `--input-shape`, or None if the images do not say it."""
    preprocessing = getattr(loaded[0], "preprocessing", None)
    return preprocessing and ",".join(map(str, (1, preprocessing.channels, *preprocessing.size)))


def write_report(result: CalibrationResult, path: Path) -> None:
    """Write what the stages and sites came to as JSON."""
    path.write_text(json_module.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")


def draw(result: CalibrationResult) -> None:
    """Print the table of stages."""
    from rich.table import Table

    fitted, held = result.images
    table = Table(title=f"calibration: {fitted} images fitted, {held} held out")
    table.add_column("after")
    for name in ("agreement with the teacher", "squared error of the answers", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("")
    for stage in result.stages:
        agreement = "–" if stage.agreement is None else f"{100 * stage.agreement:.1f} %"
        table.add_row(stage.name, agreement, f"{stage.error:.3g}", f"{stage.seconds:.0f}", stage.note)
    console().print(table)
