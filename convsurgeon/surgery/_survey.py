"""The survey: every convolution of a model, with all facts, and how each was found."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from convsurgeon.errors import SurveyError
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.progress import be_silent
from convsurgeon.surgery._copies import ExampleInputs, in_mode, shadow
from convsurgeon.surgery._examples import at_least_two, generated_inputs
from convsurgeon.surgery._expected import Expected, not_trained
from convsurgeon.surgery._functional import Finding, Names, functional_sites, read_by_others
from convsurgeon.surgery._graph import GraphFacts, read_graphs
from convsurgeon.surgery._observation import Run, observe, written_kernels
from convsurgeon.surgery._outside import untouched_outside
from convsurgeon.surgery._sites import Site, describe, shared_weights, walk
from convsurgeon.surgery._switching import convolutions, replaced_convolutions, switch_modes
from convsurgeon.surgery._wrappers import module_of

_STEM_CHANNELS = 4


@dataclass(frozen=True)
class Survey:
    """Every convolution of a model: each module object once, in module order, then the functional ones.

    Args:
        model: the model's class name.
        sites: the convolutions.
        untraced: modules that `torch.fx` could not trace, with the reason. Their convolutions
            were found by the module walk all the same.
        observed: whether a run on an example input was observed, so that sizes and MACs are known.
    """

    model: str
    sites: tuple[Site, ...]
    untraced: tuple[tuple[str, str], ...]
    observed: bool

    @property
    def macs(self) -> int | None:
        """Multiply-adds of all 2-d convolutions and ops for one image, or None without a run."""
        return sum(site.macs or 0 for site in self.sites) if self.observed else None


def survey(model: nn.Module, *, example_inputs: ExampleInputs | None = None) -> Survey:
    """Find every convolution of a model, without touching it.

    Three routes: a walk over the modules finds them all; `torch.fx` on the largest regions that can
    be traced tells what surrounds them; one run on `example_inputs`, where given, tells sizes.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        SurveyError: if the model cannot be copied, or fails on the example input.
    """
    return look(model, example_inputs)[0]


def look(model: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Survey, Expected | None]:
    """Return the survey, and what the model gives on the example input in both modes, so that none is run twice.

    The second is None without an example input, and where nothing looks as if it could be converted.
    """
    model = module_of(model, report=be_silent)
    with untouched_outside(model):
        return _look(model, example_inputs)


def _look(model: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Survey, Expected | None]:
    tied = shared_weights(model)
    registered = set(model.modules())
    modules = [describe(module, fqns, tied, registered=module in registered) for module, fqns in walk(model)]
    copied = shadow(model, as_it_is=True)
    switched = switch_modes(copied)
    seen = _Seen() if example_inputs is None else _see(model, copied, example_inputs, modules)
    if seen.expected is not None:
        # what broke off may have left anything behind
        copied = in_mode(copied, training=False) if seen.expected.not_trained is None else shadow(model)
    names = Names(copied)
    graphs = read_graphs(copied, names)
    run = seen.run
    # what a trial tells is who is called in which order; its sizes are not the caller's
    trial = run or (_try_out(model) if graphs.untraced else None)
    findings = [*graphs.findings, *(trial.findings if trial is not None else [])]
    if run is None:
        findings = [replace(finding, input_size=None) for finding in findings]
    findings += _of_training_only(seen.in_training, findings)
    touched = seen.written | switched
    obstacles = read_by_others(findings, names), seen.unusual, touched
    order = trial.order if trial is not None and trial.order else graphs.order
    first = order[0] if order else _first_in_module_order(model)
    sites = [_complete(_with_obstacles(site, *obstacles), graphs, run, first) for site in modules]
    mine = {fqn for site in sites for fqn in site.fqns}
    functional = [site for site in functional_sites(findings, names) if not mine.intersection(site.fqns)]
    sites += [_complete(_with_obstacles(site, {}, {}, touched), graphs, None, first) for site in functional]
    found = Survey(type(model).__name__, tuple(sites), tuple(graphs.untraced), observed=run is not None)
    return found, seen.expected


@dataclass
class _Seen:
    """What the runs on the example input showed, in eval mode and, where anything can be converted, in train mode.

    Args:
        written: kernels that were written to, or replaced with their module, with the reason to keep them.
    """

    run: Run | None = None
    in_training: Run | None = None
    expected: Expected | None = None
    written: dict[str, str] = field(default_factory=dict)

    @property
    def unusual(self) -> dict[str, str]:
        """Convolutions that were called as no `nn.Conv2d` can be, in either mode."""
        runs = [run.unusual for run in (self.in_training, self.run) if run is not None]
        return {fqn: reason for unusual in runs for fqn, reason in unusual.items()}


def _see(model: nn.Module, copied: nn.Module, example_inputs: ExampleInputs, modules: Sequence[Site]) -> _Seen:
    before = convolutions(copied)
    seen = _Seen(observe(copied, Names(copied), example_inputs))
    assert seen.run is not None
    written = dict.fromkeys(written_kernels(model, copied), "its kernel is written to when the model runs")
    written |= replaced_convolutions(before, copied, when="when the model runs")
    specs = [site.spec for site in modules if site.spec is not None and site.obstacle is None]
    if any(spec.groups == 1 and spec.in_channels > _STEM_CHANNELS and not spec.is_pointwise for spec in specs):
        why_not = None
        try:
            seen.in_training = observe(in_mode(copied, training=True), Names(copied), at_least_two(example_inputs))
        except SurveyError as error:
            why_not = not_trained(error.__cause__ or error)
        output = seen.in_training.output if seen.in_training is not None else None
        seen.expected = Expected(seen.run.output, output, why_not)
        reason = "its kernel is written to when the model runs in train mode"
        in_training = replaced_convolutions(before, copied, when="when the model runs in train mode")
        written = dict.fromkeys(written_kernels(model, copied), reason) | in_training | written
    seen.written = written
    return seen


def _of_training_only(run: Run | None, findings: Sequence[Finding]) -> list[Finding]:
    """Return what only a run in train mode has shown; it counts in no cost."""

    def key(finding: Finding) -> tuple[Any, bool]:
        return finding.kernel or (finding.owner, finding.function, finding.where), finding.is_convolution

    known = {key(finding) for finding in findings}
    new = [] if run is None else run.findings
    return [replace(finding, input_size=None) for finding in new if key(finding) not in known]


def _try_out(model: nn.Module) -> Run | None:
    """Return what a run on a generated image shows, where tracing failed and no input is given."""
    for image in generated_inputs(model):
        copied = shadow(model)
        with contextlib.suppress(SurveyError):  # then it takes no such image
            return observe(copied, Names(copied), image)
    return None


def _with_obstacles(
    site: Site, reads: Mapping[str, str], unusual: Mapping[str, str], written: Mapping[str, str]
) -> Site:
    reason = next((reads[fqn] for fqn in _callers(site) if fqn in reads), None)
    reason = reason or next((unusual[fqn] for fqn in site.fqns if fqn in unusual), None)
    # a weight may have other names inside, where it is parametrized
    inside = tuple(f"{fqn}.".lstrip(".") for fqn in site.fqns)
    touched = [why for name, why in written.items() if name in site.fqns or name.startswith(inside)]
    reason = reason or next(iter(touched), None)
    return site if reason is None or site.obstacle or site.op else replace(site, obstacle=reason)


def _complete(site: Site, graphs: GraphFacts, run: Run | None, first: str | None) -> Site:
    """Add what graphs and run tell; a functional site knows that already, but for what it comes before."""
    routes = list(site.routes)
    facts: dict[str, Any] = {}
    fqns = _callers(site)
    for fqn in fqns:
        if fqn in graphs.facts:
            routes.append("fx")
            facts |= dict(graphs.facts[fqn])
            break
    if run is not None:
        facts["calls"] = sum(run.order.count(fqn) for fqn in fqns)
        by_name = tuple(size for fqn in site.fqns for size in run.sizes.get(fqn, ()))
        by_kernel = tuple(size for fqn in site.fqns for size in run.sizes.get(f"{fqn}.weight".lstrip("."), ()))
        facts["input_sizes"] = by_name or by_kernel
        routes += ["observed"] if facts["calls"] else []
    narrow = site.spec is not None and site.spec.in_channels <= _STEM_CHANNELS
    facts["stem"] = narrow and (facts.get("stem", False) or first in fqns)
    return replace(site, routes=tuple(dict.fromkeys(routes)), **facts)


def _callers(site: Site) -> tuple[str, ...]:
    """Return the names under which a site is called: one inside a module's forward, where that module is."""
    return (*site.fqns, *(fqn.removesuffix("weight").rstrip(".") for fqn in site.fqns if fqn.endswith("weight")))


def _first_in_module_order(model: nn.Module) -> str | None:
    for fqn, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear, AbstractCheapConv)):
            return str(fqn)
    return None
