"""One model through the whole surgery: what a worker does, and the rows it sends."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from convsurgeon import surgery
from convsurgeon.errors import GuardError, NothingToConvertError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec

from . import zoo
from .rows import REASON_LENGTH, Row

Emit = Callable[[str, Any], None]
FEW_CHANNELS = 4
# how the shape guard begins to say why it compared the outputs in eval mode only
UNTRAINED = "train mode was not compared: "


@dataclass
class Case:
    """A built model with all that its rows share."""

    entry: zoo.Entry
    model: nn.Module
    facts: Row
    example: zoo.Example | None = None
    no_example: str = ""
    found: surgery.Survey | None = None


def work(entry: zoo.Entry, ops: Sequence[str], *, device: str, emit: Emit) -> None:
    """Do what `examine` does, with cheap random weights: torch's own initialisers are replaced in this process."""
    zoo.cheap_random_weights()
    examine(entry, ops, device=device, emit=emit)


def warm_up(ops: Sequence[str]) -> None:
    """Do a tiny model once, so that all code is imported before workers are forked, and none of it later."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    for op in ops:
        surgery.rewrite(net, op, example_inputs=torch.zeros(1, 3, 8, 8))


def examine(entry: zoo.Entry, ops: Sequence[str], *, device: str, emit: Emit) -> None:
    """Build a model once, survey it once, and convert it with each op; sends one row per op, whatever happens.

    Args:
        device: `cpu`, or `meta` for structure and shapes alone.
        emit: called with ("stage", what begins) and ("row", the row).
    """
    started = time.perf_counter()
    facts: Row = {"package": entry.package, "name": entry.name, "family": entry.family}
    facts["mode"] = "meta" if device == "meta" else "real"
    try:
        case = _prepare(entry, facts, device=device, emit=emit)
    except Exception as error:
        shared = round(time.perf_counter() - started, 2)
        for op in ops:
            emit("row", {**facts, "op": op, **failure(error), "shared_seconds": shared, "seconds": 0.0})
        return
    facts["shared_seconds"] = round(time.perf_counter() - started, 2)
    for op in ops:
        emit("stage", f"{op}: plan")
        begun = time.perf_counter()
        try:
            row = _convert(case, op, emit=emit)
        except Exception as error:
            row = failure(error)
        emit("row", {**facts, "op": op, **row, "seconds": round(time.perf_counter() - begun, 2)})


def failure(error: BaseException) -> Row:
    """Return what a row says of an exception: its class, one line, and the last place in the code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return {"preserved": "no", "error": f"{one_line(error)}{place}"}


def standard_convs(model: nn.Module) -> tuple[int, int]:
    """Count the standard convolutions by a walk of our own: exact Conv2d modules, and those of a subclass.

    Standard is one group, a kernel larger than 1x1, and more than a few input channels: others are stems, or
    make a map of attention from one or two.
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    large = [conv for conv in convs if conv.groups == 1 and tuple(conv.kernel_size) != (1, 1)]
    kinds = Counter(type(conv) is nn.Conv2d for conv in large if conv.in_channels > FEW_CHANNELS)
    return kinds[True], kinds[False]


def _prepare(entry: zoo.Entry, facts: Row, *, device: str, emit: Emit) -> Case:
    emit("stage", "build")
    model = zoo.build(entry, device=device)
    case = Case(entry, model, facts)
    facts["params"] = sum(parameter.numel() for parameter in model.parameters())
    if not any(standard_convs(model)):
        emit("stage", "survey")
        case.found = surgery.survey(model)
        if _nothing(case.found):
            case.no_example = "nothing to convert"
            _note_survey(case)
            return case
    emit("stage", "input")
    tries = zoo.examples(entry, model, device=device)
    if smaller := zoo.build_smaller(entry, model, device=device):
        case.model, tries = smaller[0], iter([smaller[1]])
    del model
    case.example, case.no_example = find_example(case.model, tries)
    emit("stage", "survey")
    case.found = surgery.survey(case.model, example_inputs=case.example.inputs if case.example else None)
    _note_survey(case)
    return case


def _note_survey(case: Case) -> None:
    found = case.found
    assert found is not None
    exact, derived = standard_convs(case.model)
    case.facts |= {
        "input": case.example.label if case.example else None,
        "found": len(found.sites),
        "standard": exact,
        "standard_subclass": derived,
        "routes": dict(Counter(route for site in found.sites for route in site.routes)),
        "untraced": [[fqn, reason[:REASON_LENGTH]] for fqn, reason in found.untraced],
    }


def _nothing(found: surgery.Survey) -> bool:
    try:
        surgery.plan(found)
    except NothingToConvertError:
        return True
    return False


def find_example(model: nn.Module, tries: Iterable[zoo.Example]) -> tuple[zoo.Example | None, str]:
    """Return the first input that the model takes, or why there is none."""
    problem = "no input to try"
    for example in tries:
        try:
            with torch.no_grad():
                inputs = example.inputs
                model(*inputs) if isinstance(inputs, tuple) else model(inputs)
            return example, ""
        except Exception as error:  # whatever a foreign forward raises
            problem = f"{example.label}: {one_line(error)}"
    return None, f"it took none of the inputs tried, the last was {problem}"


def _convert(case: Case, op: str, *, emit: Emit) -> Row:
    assert case.found is not None
    try:
        the_plan = surgery.plan(case.found, op)
    except NothingToConvertError as error:
        return {
            "converted": 0,
            **_reasons_without_plan(case.found, op),
            "preserved": "not run",
            "note": one_line(error),
        }
    row: Row = {"converted": len(the_plan.converted), **_reasons(the_plan.decisions)}
    emit("stage", f"{op}: rewrite")
    compared: list[str] = []
    inputs = case.example.inputs if case.example else None
    try:
        student = surgery.rewrite(
            case.model, the_plan, example_inputs=inputs, report=lambda event: compared.append(event.message)
        )
    except GuardError as error:
        return {**row, "preserved": "no", "note": one_line(error)}
    except Exception as error:
        return {**row, **failure(error)}
    swapped = sum(isinstance(module, AbstractCheapConv) for module in student.modules())
    if swapped != row["converted"]:
        told = f"the plan converts {row['converted']} convolutions and the student has {swapped} ops"
        return {**row, "preserved": "no", "error": told}
    if case.example is None:
        return {**row, "preserved": "not run", "note": case.no_example}
    untrained = "".join(compared).partition(UNTRAINED)[2].partition("; left out")[0]
    return {**row, "preserved": "yes", "untrained": untrained}


def _reasons_without_plan(found: surgery.Survey, op: str) -> Row:
    """Return the reasons where a plan was refused: of a plan with one more site, which can be converted."""
    spec = ConvSpec.from_conv(nn.Conv2d(64, 64, 3, device="meta"))
    extra = surgery.Site(("one more",), nn.Conv2d.__name__, spec)
    decisions = surgery.plan(replace(found, sites=(*found.sites, extra)), op).decisions
    return _reasons(decisions[:-1])


def _reasons(decisions: Sequence[surgery.Decision]) -> Row:
    kept = [decision for decision in decisions if decision.op is None]
    return {
        "kept": dict(Counter(decision.label for decision in kept).most_common()),
        "without_reason": sum(not decision.reason.strip() or not decision.label for decision in decisions),
    }
