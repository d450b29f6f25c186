"""`convsurgeon demo`: the whole pipeline on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convsurgeon.cli import _arguments as arguments
from convsurgeon.cli._drawing import Drawing, console, draw_comparison, emit, tell


def run(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything is written.")] = Path(
        "convsurgeon-demo"
    ),
    to: arguments.To = "shift",
    seed: arguments.Seed = 0,
    threads: Annotated[
        int,
        typer.Option(min=1, help="Processor threads to train with; images of 8x8 pixels gain nothing from more."),
    ] = 1,
    json: arguments.Json = False,
) -> None:
    """Train a small residual CNN on digits, convert, distil, export, and compare: a few minutes, no download."""
    from convsurgeon.cli._models import set_threads
    from convsurgeon.demo import run_demo

    set_threads(threads)
    with Drawing() as drawing:
        result = run_demo(output, to=to, seed=seed, report=drawing)
    if json:
        emit(result.to_dict())
        return
    console().print(draw_comparison(result.comparison, ended=result.teacher_ended))
    for path in result.paths:
        tell(f"wrote {path}")
