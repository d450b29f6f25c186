"""The survey: every convolution of a model, with all facts, and how each was found."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convsurgeon.errors import SurveyError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import Pair
from convsurgeon.surgery._calls import Use, Watch
from convsurgeon.surgery._copies import ExampleInputs, call, expect_module, in_mode, shadow
from convsurgeon.surgery._examples import generated_inputs
from convsurgeon.surgery._expected import Expected
from convsurgeon.surgery._functional import Finding, Names, functional_sites, read_by_others
from convsurgeon.surgery._graph import GraphFacts, read_graphs
from convsurgeon.surgery._outputs import Leaf, describe_output
from convsurgeon.surgery._sites import Site, describe, shared_weights, walk

_STEM_CHANNELS = 4
_TWO_DIMENSIONAL = (nn.Conv2d, AbstractCheapConv)


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
    return _look(model, example_inputs, in_training=False)[0]


def look(model: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Survey, Expected | None]:
    """Return the survey, and what the model gives on the example input in both modes, so that none is run twice.

    The second is None without an example input, and where nothing looks as if it could be converted.
    """
    expect_module(model)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    standard = any(c.groups == 1 and c.in_channels > _STEM_CHANNELS and c.kernel_size != (1, 1) for c in convs)
    return _look(model, example_inputs, in_training=standard)


def _look(
    model: nn.Module, example_inputs: ExampleInputs | None, *, in_training: bool
) -> tuple[Survey, Expected | None]:
    expect_module(model)
    tied = shared_weights(model)
    registered = set(model.modules())
    modules = [describe(module, fqns, tied, registered=module in registered) for module, fqns in walk(model)]
    copied = shadow(model)
    run = _observe(copied, Names(copied), example_inputs) if example_inputs is not None else None
    expected = None
    if in_training and example_inputs is not None and run is not None:
        expected = Expected.of(copied, example_inputs, output=run.output)
        # what broke off may have left anything behind
        copied = in_mode(copied, training=False) if expected.not_trained is None else shadow(model)
    names = Names(copied)
    graphs = read_graphs(copied, names)
    # what a trial tells is who is called in which order; its sizes are not the caller's
    seen = run or (_try_out(model) if graphs.untraced else None)
    findings = [*graphs.findings, *(seen.findings if seen is not None else [])]
    if run is None:
        findings = [replace(finding, input_size=None) for finding in findings]
    reads = read_by_others(findings, names)
    unusual = run.unusual if run is not None else {}
    order = seen.order if seen is not None and seen.order else graphs.order
    first = order[0] if order else _first_in_module_order(model)
    sites = [_complete(_with_obstacles(site, reads, unusual), graphs, run, first) for site in modules]
    mine = {fqn for site in sites for fqn in site.fqns}
    functional = [site for site in functional_sites(findings, names) if not mine.intersection(site.fqns)]
    sites += [_complete(site, graphs, None, first) for site in functional]
    return Survey(type(model).__name__, tuple(sites), tuple(graphs.untraced), observed=run is not None), expected


def _try_out(model: nn.Module) -> _Run | None:
    """Return what a run on a generated image shows, where tracing failed and no input is given."""
    for image in generated_inputs(model):
        copied = shadow(model)
        with contextlib.suppress(SurveyError):  # then it takes no such image
            return _observe(copied, Names(copied), image)
    return None


@dataclass
class _Run:
    order: list[str]
    sizes: Mapping[str, tuple[Pair, ...]]
    findings: list[Finding]
    output: list[Leaf]
    unusual: Mapping[str, str]


def _observe(model: nn.Module, names: Names, example_inputs: ExampleInputs) -> _Run:
    order: list[str] = []
    sizes: dict[str, tuple[Pair, ...]] = {}
    unusual: dict[str, str] = {}

    def note(fqn: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(fqn)
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(module, nn.Conv2d) and (reason := _unusual_call(module, x, args[1:], kwargs)):
                unusual.setdefault(fqn, reason)
            if isinstance(module, _TWO_DIMENSIONAL) and isinstance(x, Tensor) and x.dim() >= 3:
                sizes[fqn] = (*sizes.get(fqn, ()), (int(x.shape[-2]), int(x.shape[-1])))

        return hook

    sites = list(walk(model))
    handles = [
        # before an op's own padding
        module.register_forward_pre_hook(note(fqns[0]), with_kwargs=True, prepend=True)
        for module, fqns in sites
        if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    ]
    inside = tuple(f"{fqns[0]}." for module, fqns in sites if isinstance(module, AbstractCheapConv))
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear) and not fqn.startswith(inside):
            handles.append(module.register_forward_pre_hook(note(fqn), with_kwargs=True))

    def note_functional(use: Use) -> None:
        kernel = names.first(use.tensor)
        if not names.is_own(use):
            order.append(kernel or f"{use.function}()")
            return
        assert use.owner is not None
        owner = names.modules.get(use.owner)
        if owner is not None and order[-1:] != [owner]:
            order.append(owner)  # its forward was called, not itself
        if kernel is not None and use.input_size is not None:
            sizes[kernel] = (*sizes.get(kernel, ()), use.input_size)

    known = {*names.modules, *(part for module, _ in sites if module not in names.modules for part in module.modules())}
    watch = Watch(names.kernels, known, on_convolution=note_functional)
    try:
        output = describe_output(call(model, example_inputs, watch))
    except Exception as error:
        raise SurveyError(
            f"{type(model).__name__} itself fails on the example input {describe_inputs(example_inputs)}: "
            f"{one_line(error)}; give an input that it takes (a copy is run, which must work like the model)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    findings = [names.resolve(use) for use in (*watch.convolutions, *watch.others) if not names.is_own(use)]
    return _Run(order, sizes, findings, output, unusual)


def _unusual_call(module: nn.Conv2d, x: Any, more: Sequence[Any], named: Mapping[str, Any]) -> str | None:
    """Return how a convolution of a class of its own is called as no `nn.Conv2d` can be, or None."""
    names = [*("" for _ in more), *(name for name in named if named[name] is not x)]
    if names:
        said = "".join(f" {name}=" for name in names[:1] if name)
        return f"it is called with more than an image{said and ':' + said}"
    channels = x.shape[-3] if isinstance(x, Tensor) and x.dim() >= 3 else module.in_channels
    if channels != module.in_channels:
        return f"it is called with {channels} channels, and its weight is made for {module.in_channels}"
    return None


def _with_obstacles(site: Site, reads: Mapping[str, str], unusual: Mapping[str, str]) -> Site:
    reason = next((reads[fqn] for fqn in _callers(site) if fqn in reads), None)
    reason = reason or next((unusual[fqn] for fqn in site.fqns if fqn in unusual), None)
    return site if reason is None or site.obstacle or site.op else replace(site, obstacle=reason)


def _complete(site: Site, graphs: GraphFacts, run: _Run | None, first: str | None) -> Site:
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


def describe_inputs(example_inputs: Any) -> str:
    """Return the shapes of an example input as a person would write them.

    >>> import torch
    >>> describe_inputs((torch.zeros(1, 3, 8, 8), {"mask": None}))
    '(1x3x8x8, {mask: NoneType})'
    """
    if isinstance(example_inputs, Tensor):
        return "x".join(str(size) for size in example_inputs.shape)
    if isinstance(example_inputs, Mapping):
        items = (f"{key}: {describe_inputs(value)}" for key, value in example_inputs.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(example_inputs, (tuple, list)):
        return "(" + ", ".join(describe_inputs(value) for value in example_inputs) + ")"
    return type(example_inputs).__name__
