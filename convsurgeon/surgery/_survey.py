"""The survey: every convolution of a model, with all facts, and how each was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convsurgeon.errors import SurveyError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import Pair
from convsurgeon.surgery._copies import ExampleInputs, call, shadow
from convsurgeon.surgery._graph import GraphFacts, read_graphs
from convsurgeon.surgery._sites import Site, describe, shared_weights, walk

_STEM_CHANNELS = 4
_TWO_DIMENSIONAL = (nn.Conv2d, AbstractCheapConv)


@dataclass(frozen=True)
class Survey:
    """Every convolution a model owns, once per module object, in module order.

    Args:
        model: the model's class name.
        sites: the convolutions.
        untraced: modules that `torch.fx` could not trace, with the reason. Their convolutions
            were found by the module walk all the same.
        functional: functional convolutions that the graphs show, by the module that calls them. They are
            left as they are, and are not counted.
        observed: whether a run on an example input was observed, so that sizes and MACs are known.
    """

    model: str
    sites: tuple[Site, ...]
    untraced: tuple[tuple[str, str], ...]
    functional: tuple[str, ...]
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
    tied = shared_weights(model)
    found = [(module, describe(module, fqns, tied)) for module, fqns in walk(model)]
    graphs = read_graphs(shadow(model)) if found else GraphFacts()
    run = _observe(shadow(model), example_inputs) if example_inputs is not None else None
    order = run.order if run is not None and run.order else graphs.order
    first = order[0] if order else _first_in_module_order(model)
    sites = tuple(_complete(site, graphs, run, first) for _, site in found)
    return Survey(
        type(model).__name__, sites, tuple(graphs.untraced), tuple(graphs.functional), observed=run is not None
    )


@dataclass
class _Run:
    order: list[str]
    sizes: Mapping[str, tuple[Pair, ...]]


def _observe(model: nn.Module, example_inputs: ExampleInputs) -> _Run:
    order: list[str] = []
    sizes: dict[str, tuple[Pair, ...]] = {}

    def note(fqn: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(fqn)
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(module, _TWO_DIMENSIONAL) and isinstance(x, Tensor) and x.dim() >= 3:
                sizes[fqn] = (*sizes.get(fqn, ()), (int(x.shape[-2]), int(x.shape[-1])))

        return hook

    for module, fqns in walk(model):
        module.register_forward_pre_hook(note(fqns[0]), with_kwargs=True)
    inside = tuple(f"{fqns[0]}." for module, fqns in walk(model) if isinstance(module, AbstractCheapConv))
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear) and not fqn.startswith(inside):
            module.register_forward_pre_hook(note(fqn), with_kwargs=True)
    try:
        call(model, example_inputs)
    except Exception as error:
        raise SurveyError(
            f"{type(model).__name__} itself fails on the example input {describe_inputs(example_inputs)}: "
            f"{one_line(error)}; give an input that it takes"
        ) from error
    return _Run(order, sizes)


def _complete(site: Site, graphs: GraphFacts, run: _Run | None, first: str | None) -> Site:
    routes, facts = ["module"], {}
    for fqn in site.fqns:
        if fqn in graphs.facts:
            routes.append("fx")
            facts = dict(graphs.facts[fqn])
            break
    if run is not None:
        facts["calls"] = sum(run.order.count(fqn) for fqn in site.fqns)
        facts["input_sizes"] = tuple(size for fqn in site.fqns for size in run.sizes.get(fqn, ()))
        routes += ["observed"] if facts["calls"] else []
    narrow = site.spec is not None and site.spec.in_channels <= _STEM_CHANNELS
    return replace(site, routes=tuple(routes), stem=narrow and first in site.fqns, **facts)


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
