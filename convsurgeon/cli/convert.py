"""`convsurgeon convert`: swap the convolutions of a model for a cheap one."""

from __future__ import annotations

import json as json_module
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsurgeon.cli import _arguments as arguments
from convsurgeon.cli._arguments import DEFAULT_OP
from convsurgeon.cli._drawing import Drawing, big, console, emit, fewer, say, tell
from convsurgeon.errors import OptionError, OutputError, SurveyError
from convsurgeon.progress import Progress

if TYPE_CHECKING:
    from convsurgeon.surgery import Plan, Survey


def run(
    model: arguments.Model,
    to: arguments.ToOrDefault = None,
    keep: arguments.Keep = None,
    only: arguments.Only = None,
    mapping: arguments.Map = None,
    pointwise: arguments.Pointwise = None,
    option: arguments.Option = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Carry out this plan instead.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Where the student goes.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Calibrate with these images, a folder or a data set's name; no labels needed."
        ),
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(metavar="N", min=10, help="How many images to use; 2048 if nothing is said.")
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What the model answers: scores, values, probabilities or multilabel; found out if nothing is said.",
        ),
    ] = None,
    polish: Annotated[
        bool | None,
        typer.Option("--polish/--no-polish", help="End the calibration with a short run of training, or not."),
    ] = None,
    polish_minutes: Annotated[
        float | None, typer.Option(help="How long that run may take; 30 if nothing is said.")
    ] = None,
    data_root: arguments.DataRoot = None,
    size: arguments.Size = None,
    mean: arguments.Mean = None,
    std: arguments.Std = None,
    color: arguments.Color = None,
    crop: arguments.Crop = None,
    interpolation: arguments.Interpolation = None,
    seed: arguments.Seed = 0,
    threads: arguments.Threads = None,
    input_shape: arguments.InputShape = None,
    weights: arguments.Weights = None,
    weights_key: arguments.WeightsKey = None,
    weights_prefix: arguments.WeightsPrefix = None,
    model_arg: arguments.ModelArg = None,
    trust: arguments.Trust = False,
    trust_module: arguments.TrustModule = None,
    force: arguments.Force = False,
    json: arguments.Json = False,
) -> None:
    """Replace standard convolutions by cheap ones, started from the dense weights, and write the student."""
    from convsurgeon.cli._calibrating import CalibrationRequest, draw, shape_of
    from convsurgeon.cli._data import PreprocessingFlags
    from convsurgeon.cli._models import check_ops, example_for, load_model, read_plan, selectors, set_threads
    from convsurgeon.storage import default_output, refuse_to_save
    from convsurgeon.surgery import plan as make_plan

    if plan is not None and any((to, keep, only, mapping, pointwise, option)):
        raise OptionError(
            "--plan is carried out as it is; leave out --to, --keep, --only, --map, --pointwise and --option"
        )
    flags = PreprocessingFlags(size, mean, std, color, crop, interpolation)
    calibration = CalibrationRequest(
        calibrate, calibration_images, answers, polish, polish_minutes, data_root, flags, seed
    )
    calibration.check()
    if dry_run and calibrate is not None:
        raise OptionError("--dry-run writes nothing and calibrates nothing; leave out --calibrate")
    set_threads(threads)
    ready = read_plan(plan) if plan is not None else None
    check_ops(to, pointwise)
    network = load_model(
        model, weights=weights, weights_key=weights_key, weights_prefix=weights_prefix, model_arg=model_arg,
        trust=trust, trust_module=trust_module,
    )  # fmt: skip
    images = calibration.load(network, source=model) if calibrate is not None else None
    if images is not None:
        calibration.refuse(network, images)
    example = example_for(network, input_shape)
    if example is None and images is not None:
        example = example_for(network, shape_of(images))
    found = _survey(network, example, shape=None if images is None or input_shape else shape_of(images))
    choice = selectors(keep, only, mapping, pointwise, option)
    the_plan = ready or make_plan(network, to or DEFAULT_OP, found=found, **choice)
    files = _Files.beside(output or default_output(network, model, the_plan.tag))
    if not dry_run:
        sources = {"model": model, "file of weights": weights, "plan that was given": plan}
        files.check(sources, calibrated=images is not None, force=force)
    student, checked = _rewrite(network, the_plan, example)
    the_plan = _as_carried_out(the_plan, student)
    if example is None:
        say("note: no input shape is known, so there are no sizes and no MACs; say --input-shape 1,3,224,224 for them")
    if not dry_run:
        refuse_to_save(student, files.student, force=force)
    calibrated = None if images is None else calibration.run(network, student, images)
    report = None
    if calibrated is not None and images is not None:
        student, report = calibrated.student, calibration.report(calibrated, model)
        calibration.remember(student, images)
    written = {} if dry_run else files.write(student, the_plan, report, example=example, force=force)
    costs = _costs(network, student, the_plan, found)
    if json:
        extra = {} if report is None else {"calibration": report}
        emit({"model": found.model, "plan": the_plan.to_dict(), **costs, "checked": checked, **extra, **written})
        return
    _draw(the_plan, found, costs)
    for line in checked:
        tell(f"checked: {line}")
    if calibrated is not None:
        draw(calibrated)
    for what, path in written.items():
        tell(f"{what.replace('_', ' ')}: {path}")


def _rewrite(network: Any, the_plan: Plan, example: Any) -> tuple[Any, list[str]]:
    """Return the student, drawing the progress, and what was compared."""
    from convsurgeon.surgery import rewrite

    checked: list[str] = []
    with Drawing() as drawing:

        def follow(event: Progress) -> None:
            if event.stage == "rewrite":
                checked.append(event.message)
            else:
                drawing(event)

        return rewrite(network, the_plan, example_inputs=example, report=follow), checked


def _as_carried_out(the_plan: Plan, student: Any) -> Plan:
    """Return the plan with the options that the ops have come to: one that was given may ask for a share of energy."""
    from convsurgeon.surgery import plan_of

    carried_out = plan_of(student)
    assert carried_out is not None
    done = {decision.fqns: decision for decision in carried_out.converted}
    decisions = (decision if decision.op is None else done[decision.fqns] for decision in the_plan.decisions)
    return replace(the_plan, decisions=tuple(decisions))


@dataclass(frozen=True)
class _Files:
    """What a conversion writes: all of it, or nothing."""

    student: Path
    plan: Path
    calibration: Path

    @classmethod
    def beside(cls, student: Path) -> _Files:
        """Return the files of a student of that name."""
        return cls(student, *(student.parent / f"{student.stem}.{kind}.json" for kind in ("plan", "calibration")))

    def check(self, sources: dict[str, Any], *, calibrated: bool, force: bool) -> None:
        """Raise an `OutputError` where something would be lost."""
        from convsurgeon.files import refuse_to_overwrite

        # a report of another student must not stay beside this one
        there = calibrated or os.path.exists(self.calibration)
        for what, source in sources.items():
            both_there = source is not None and os.path.exists(source) and os.path.exists(self.student)
            if both_there and self.student.samefile(source):
                raise OutputError(
                    f"{self.student} is the {what} itself; choose another name with -o, so that none is lost"
                )
        for path in (self.student, self.plan, *([self.calibration] if there else [])):
            refuse_to_overwrite(path, force=force)

    def write(
        self, student: Any, the_plan: Plan, report: dict[str, Any] | None, *, example: Any, force: bool
    ) -> dict[str, str]:
        """Write student, plan and, where there is one, the report of the calibration; return their names."""
        from convsurgeon.files import write_atomically
        from convsurgeon.storage import save

        def write_plan(temporary: Path) -> None:
            temporary.write_text(the_plan.to_json(), encoding="utf-8")
            save(student, self.student, force=force, example_inputs=example)

        written = {"student": str(self.student), "plan_file": str(self.plan)}
        if report is None:
            write_atomically(self.plan, write_plan)
            if self.calibration.is_file():
                self.calibration.unlink()
                say(f"note: {self.calibration} was the report of another student, and is removed")
            return written

        def write_all(temporary: Path) -> None:
            temporary.write_text(json_module.dumps(report, indent=2) + "\n", encoding="utf-8")
            write_atomically(self.plan, write_plan)

        write_atomically(self.calibration, write_all)
        return {**written, "calibration_file": str(self.calibration)}


def _survey(network: Any, example: Any, *, shape: str | None) -> Survey:
    """Survey a network; where the images of a calibration gave the example its shape, a failure says so."""
    from convsurgeon.surgery import survey

    try:
        return survey(network, example_inputs=example)
    except SurveyError as error:
        if shape is None:
            raise
        raise SurveyError(f"{error}; the images of --calibrate are {shape}: --size and --color change them") from error


def _costs(network: Any, student: Any, the_plan: Plan, found: Survey) -> dict[str, Any]:
    from convsurgeon.surgery import cost_of, count_params, totals

    decisions = {decision.fqns: decision for decision in the_plan.decisions}
    pairs = [(site, decisions[site.fqns]) for site in found.sites if site.fqns in decisions]
    return {
        "params": {"before": count_params(network), "after": count_params(student)},
        "convolutions": asdict(totals(the_plan, found)),
        "sites": {decision.fqn: asdict(cost_of(site, decision, found)) for site, decision in pairs},
    }


def _draw(the_plan: Plan, found: Survey, costs: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{found.model}: {len(the_plan.converted)} converted, {len(the_plan.kept)} kept")
    table.add_column("name", overflow="fold")
    table.add_column("geometry")
    table.add_column("becomes")
    table.add_column("parameters", justify="right")
    if found.observed:
        table.add_column("MACs", justify="right")
    table.add_column("because")
    for decision in the_plan.decisions:
        cost = costs["sites"].get(decision.fqn)
        figures = []
        if cost is None or decision.spec is None:
            figures = ["–", *(["–"] if found.observed else [])]
        else:
            figures.append(_change(cost["params_before"], cost["params_after"]))
            figures += [_change(cost["macs_before"], cost["macs_after"])] if found.observed else []
        becomes = decision.op or "kept"
        geometry = str(decision.spec) if decision.spec else "–"
        table.add_row("\n= ".join(decision.fqns), geometry, becomes, *figures, decision.reason)
    console().print(table)
    params, convolutions = costs["params"], costs["convolutions"]
    line = f"parameters {_change(params['before'], params['after'])} ({fewer(params['before'], params['after'])} fewer)"
    if convolutions["macs_before"] is not None:
        macs = convolutions["macs_before"], convolutions["macs_after"]
        line += f"; MACs of convolutions {_change(*macs)} ({fewer(*macs)} fewer)"
        if convolutions["counted_macs_after"] != convolutions["macs_after"]:
            line += f", {big(convolutions['counted_macs_after'])} with the one-hot taps that a counter sees"
    tell(line)


def _change(before: int, after: int) -> str:
    return big(before) if before == after else f"{big(before)} → {big(after)}"
