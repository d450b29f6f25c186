"""Calibration on the command line: images in, stages and sites out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from convsurgeon.cli._data import PreprocessingFlags, comes_as_it_is, refuse_idle_flags
from convsurgeon.cli._drawing import Drawing, console, say, tell
from convsurgeon.errors import OptionError, UnknownNameError

if TYPE_CHECKING:
    from torch import nn

    from convsurgeon.calibration import CalibrationResult, PolishRun

_IMAGES, _MINUTES = 2048, 30.0


@dataclass(frozen=True)
class CalibrationRequest:
    """What the flags of a calibration say."""

    data: str | None
    images: int | None
    answers: str | None
    polish: bool | None
    polish_minutes: float | None
    data_root: Path | None
    flags: PreprocessingFlags
    seed: int

    def check(self) -> None:
        """Raise an `OptionError` for flags that say something about a calibration that nobody asked for."""
        said = {
            "--calibration-images": self.images,
            "--answers": self.answers,
            "--polish" if self.polish else "--no-polish": self.polish,
            "--polish-minutes": self.polish_minutes,
            "--data-root": self.data_root,
        }
        idle = [*(flag for flag, value in said.items() if value is not None), *self.flags.typed()]
        if self.data is None and idle:
            raise OptionError(f"{idle[0]} is about calibration; say --calibrate DATA, too")
        if self.answers is not None:
            from convsurgeon.outputs import ANSWERS

            if self.answers not in ANSWERS:
                raise OptionError(f"--answers must be one of {', '.join(ANSWERS)}, got {self.answers!r}")
        if self.polish_minutes is None:
            return
        if self.polish is False:
            raise OptionError("--polish-minutes and --no-polish contradict each other; say one of them")
        if not 0 < self.polish_minutes < math.inf:
            raise OptionError(
                f"--polish-minutes must be a number above 0, got {self.polish_minutes:g}; or say --no-polish"
            )

    def load(self, model: nn.Module, *, source: str) -> tuple[Any, bool]:
        """Return the images, as the model takes them, and whether they may be mirrored.

        Args:
            source: what the model was loaded from.
        """
        from convsurgeon.data import ImageSet, expect_images, is_folder, load_images, names
        from convsurgeon.record import read_record

        if not self.data:
            raise OptionError("--calibrate needs a folder of images or the name of a data set, got an empty string")
        folder = is_folder(self.data)
        if folder and self.data in names():
            say(f"note: {self.data} is the folder of that name here, not the data set; ./{self.data} says so, too")
        refuse_idle_flags(self.data, self.flags, root=self.data_root, is_path=folder)
        try:
            expect_images(self.data)
            prepared = not folder and comes_as_it_is(self.data)
            wanted = None if prepared else self.flags.choose(self.data, {source: read_record(model)}, is_path=folder)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error} There is no folder of that name either.") from error
        images, flip = load_images(self.data, root=self.data_root, preprocessing=wanted, seed=self.seed)
        if isinstance(images, ImageSet):
            say(f"preprocessing: {images.preprocessing}")
        return images, flip

    def refuse(self, model: nn.Module, loaded: tuple[Any, bool]) -> None:
        """Raise for what calibration would refuse, before the work that comes first."""
        from convsurgeon.calibration import refuse_calibration, refuse_few
        from convsurgeon.data import ImageSet

        refuse_calibration(model, polish=self.polish is not False, seed=self.seed)
        if isinstance(loaded[0], ImageSet):
            refuse_few(len(loaded[0]))

    def run(self, teacher: nn.Module, student: nn.Module, loaded: tuple[Any, bool]) -> CalibrationResult:
        """Calibrate, drawing the progress."""
        from convsurgeon.calibration import Polish, calibrate_and_report

        images, flip = loaded
        polish = (
            Polish(seconds=60 * (self.polish_minutes or _MINUTES), flip=flip) if self.polish is not False else False
        )
        with Drawing() as drawing:
            return calibrate_and_report(
                teacher,
                student,
                images,
                polish=polish,
                answers=self.answers or "auto",  # type: ignore[arg-type]
                limit=self.images or _IMAGES,
                seed=self.seed,
                report=drawing,
            )

    def report(self, result: CalibrationResult, model: str) -> dict[str, Any]:
        """Return what the stages and sites came to, and with what, as plain JSON data."""
        from convsurgeon import __version__

        return {"convsurgeon": __version__, "model": model, "data": self.data, **result.to_dict()}

    def remember(self, student: nn.Module, loaded: tuple[Any, bool]) -> None:
        """Let the student's file say what the images went through."""
        from convsurgeon.record import update_record

        used = getattr(loaded[0], "preprocessing", None)
        if used is not None:
            update_record(student, preprocessing=used.to_dict(), preprocessing_of=None)


def shape_of(loaded: tuple[Any, bool]) -> str | None:
    """Return the shape of one image as it is typed after `--input-shape`, or None if the images do not say it."""
    preprocessing = getattr(loaded[0], "preprocessing", None)
    return preprocessing and ",".join(map(str, (1, preprocessing.channels, *preprocessing.size)))


def draw(result: CalibrationResult) -> None:
    """Print the table of stages, and what the fit came to."""
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
    sites = [site for site in result.sites if site.before is not None and site.after is not None]
    if sites:
        before, after = (median(errors) for errors in zip(*((s.before, s.after) for s in sites), strict=True))
        tell(f"fit: {len(sites)} convolutions, squared error of their outputs {before:.2g} → {after:.2g} (medians)")
    for site in result.sites:
        if site.note:
            tell(f"{site.fqn}: {site.note}")
    if result.polish is not None and result.polish.steps:
        tell(_steps_line(result.polish))
    peak = "" if result.peak_memory is None else f", peak memory {result.peak_memory / 1e9:.1f} GB"
    tell(f"calibrated in {result.seconds:.0f} s{peak}")


def _steps_line(polish: PolishRun) -> str:
    """Return how many steps were taken, of how many, and what one took."""
    line = f"polish: {polish.steps + polish.trial_steps:,} of {polish.wanted:,} steps of {polish.batch_size} images"
    trials = f", {polish.trial_steps:,} of them to find the learning rate" if polish.trial_steps else ""
    return f"{line}{trials}, {polish.step_seconds:.2g} s a step"
