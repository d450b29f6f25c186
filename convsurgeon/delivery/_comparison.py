"""What a network gained and lost: teacher and student side by side, each through the same steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convsurgeon.delivery._export import Delivery, export
from convsurgeon.delivery._freeze import delivered_form
from convsurgeon.delivery._latency import Latency, measure_latency
from convsurgeon.evaluation import evaluate
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.surgery import count_macs, count_params, plan_of, survey, totals

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Side:
    """One network, measured.

    Args:
        params: parameters.
        macs: multiply-adds for one image, convolutions and matrix products.
        counted_macs: the same with frozen one-hot taps, which a counter sees.
        converted_macs: those of the convolutions that were converted, None if nobody knows which.
        accuracy: on the test images, 0..1, or None without any.
        agreement: how often it answers as the teacher does.
        delivery: its ONNX file.
        latency: by number of threads.
    """

    params: int
    macs: int
    counted_macs: int
    converted_macs: int | None
    accuracy: float | None
    agreement: float | None
    delivery: Delivery
    latency: Mapping[int, Latency]

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain JSON data."""
        data = asdict(self)
        data["delivery"] = {**data["delivery"], "path": str(self.delivery.path)}
        data["latency"] = {str(threads): asdict(latency) for threads, latency in self.latency.items()}
        return data


@dataclass(frozen=True)
class Comparison:
    """Teacher (`before`) and student (`after`)."""

    before: Side
    after: Side

    def to_dict(self) -> dict[str, Any]:
        """Return both sides as plain JSON data."""
        return {BEFORE: self.before.to_dict(), AFTER: self.after.to_dict()}


def compare(
    teacher: nn.Module,
    student: nn.Module,
    folder: Path,
    *,
    example: Tensor,
    test: Any = None,
    images: Any = None,
    batch_size: int = 256,
    limit_batches: int | None = None,
    threads: Sequence[int] | None = None,
    force: bool = False,
    report: Report = be_silent,
) -> Comparison:
    """Count, evaluate, export with parity, and time teacher and student.

    Writes `teacher.onnx` and `student.onnx` into the folder. Accuracy and agreement are those of the
    form that is delivered.

    Args:
        example: an input of batch 1.
        test: labelled images for accuracy and agreement.
        images: real images for the parity check.
        batch_size: of the evaluation, where the test images are not in batches already.
        limit_batches: stop the evaluation after so many batches.
        threads: thread counts to time with; one and all cores by default.
    """
    files = {BEFORE: folder / "teacher.onnx", AFTER: folder / "student.onnx"}
    networks = {BEFORE: teacher, AFTER: student}
    deliveries = {
        side: export(
            network,
            files[side],
            example_inputs=example,
            images=images,
            force=force,
            report=_named(report, files[side]),
        )
        for side, network in networks.items()
    }
    timings = measure_latency(files, threads=threads, report=report)
    converted = _converted_macs(teacher, student, example)
    sides = {}
    for side, network in networks.items():
        macs = count_macs(network, example)
        score = None
        if test is not None:
            score = evaluate(
                delivered_form(network),
                test,
                teacher=teacher,
                batch_size=batch_size,
                limit_batches=limit_batches,
                report=report,
            )
        sides[side] = Side(
            params=count_params(network),
            macs=macs.true,
            counted_macs=macs.counted,
            converted_macs=None if converted is None else converted[side],
            accuracy=None if score is None else score.accuracy,
            agreement=None if score is None else score.agreement,
            delivery=deliveries[side],
            latency={latency.threads: latency for latency in timings if latency.name == side},
        )
    return Comparison(sides[BEFORE], sides[AFTER])


def _converted_macs(teacher: nn.Module, student: nn.Module, example: Tensor) -> dict[str, int] | None:
    """Return the MACs of the converted convolutions in both networks, if the plan is for this teacher."""
    plan = plan_of(student)
    found = survey(teacher, example_inputs=example)
    if plan is None or [site.fqns for site in found.sites] != [decision.fqns for decision in plan.decisions]:
        return None
    cost, kept = (
        totals(plan, found),
        sum(site.macs or 0 for site, d in zip(found.sites, plan.decisions, strict=True) if d.op is None),
    )
    assert cost.macs_before is not None
    assert cost.macs_after is not None
    return {BEFORE: cost.macs_before - kept, AFTER: cost.macs_after - kept}


def _named(report: Report, file: Path) -> Report:
    def say(event: Progress) -> None:
        report(Progress(event.stage, event.done, event.total, event.figures, f"{file.name}: {event.message}"))

    return say
