"""Weights into an architecture: under which prefix they lie, of how many classes they are, and loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from convsurgeon.errors import ConvSurgeonError, WeightsError, did_you_mean
from convsurgeon.storage._architectures import Architecture
from convsurgeon.storage._fitting import Fitting, copy_into, enumerate_names, guess_classes
from convsurgeon.storage._state_dicts import Entry
from convsurgeon.storage._texts import printable
from convsurgeon.storage._weights import Weights

_MOST_REBUILT = 8  # prefixes, for each of which networks of other numbers of classes are built


@dataclass(frozen=True)
class Built:
    """A network with its weights, what it was built with, and what there is to say about it."""

    model: nn.Module
    args: dict[str, Any]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Fit:
    """A network, and the prefix under which a state dict has all that it needs."""

    model: nn.Module
    args: dict[str, Any]
    fitting: Fitting
    prefix: str


def build_with(
    architecture: Architecture, args: Mapping[str, Any], weights: Weights, *, prefix: str | None = None
) -> Built:
    """Build the network, with as many classes as the weights have, and load them strictly.

    Args:
        prefix: what stands before the network's own names in the file, if the user says it.

    Raises:
        WeightsError: counting and naming the entries that do not fit, or naming several prefixes that do.
    """
    prefix = f"{prefix.rstrip('.')}." if prefix else prefix
    model = architecture.build(dict(args))
    fits: list[tuple[Entry, _Fit]] = []
    misfits: list[str] = []
    for entry in weights.entries:
        start = _Fit(model, dict(args), Fitting(model, entry.state_dict(weights.path)), "")
        fit = _fit(architecture, start, prefix, where=weights.where(entry))
        if isinstance(fit, str):
            misfits.append(fit)
            continue
        fits.append((entry, fit))
        if entry.is_known:  # then the first is the one that its library would take
            break
    if len(fits) > 1:
        keys = [entry.key for entry, _ in fits]
        raise WeightsError(
            f"{weights.path} holds {enumerate_names(keys, last=' and ')}, which all fit {architecture.source}; "
            f"say which: --weights-key {printable(keys[0])}"
        )
    if not fits:
        others = [*(entry.key for entry in weights.entries[1:]), *weights.others]
        more = f"; it also has {printable(others[0])}: --weights-key {printable(others[0])}" if others else ""
        where = weights.where(weights.entries[0])
        raise WeightsError(f"{where} does not fit {architecture.source}: {misfits[0]}{more}")
    entry, fit = fits[0]
    misfit = f"{weights.entries[0].key} does not fit: {misfits[0]}" if entry.is_known and misfits else None
    return _load(fit, weights, entry, misfit=misfit, said=bool(fit.prefix) or prefix is not None)


def _load(fit: _Fit, weights: Weights, entry: Entry, *, misfit: str | None, said: bool) -> Built:
    """Load what fits, and say what was taken; of the prefix, where there is something to say."""
    where = weights.where(entry)
    tensors = fit.fitting.take(fit.prefix)
    if empty := next((name for name, value in tensors.items() if value.is_meta), None):
        raise WeightsError(f"{where} holds no numbers for {printable(empty)}, which is on the meta device")
    copy_into(fit.model, tensors, where=where)
    others = [each for each in weights.entries if Fitting(fit.model, each.state_dict(weights.path)).find_complete()]
    remarks = [
        weights.say_taken(entry, misfit, fitting=others),
        fit.fitting.say_taken(fit.prefix, where) if said else None,
    ]
    return Built(fit.model, fit.args, tuple(filter(None, remarks)))


def _fit(architecture: Architecture, start: _Fit, prefix: str | None, *, where: str) -> _Fit | str:
    """Return the one way in which a state dict fits, or the reason why there is none.

    Raises:
        WeightsError: if there are several.
    """
    fitting = start.fitting
    if prefix and not any(key.startswith(prefix) for key in fitting.state):
        return _say_none_under(prefix, fitting)
    complete = fitting.find_complete()
    tried = complete if prefix is None else [prefix]
    rebuilds = len(tried) <= _MOST_REBUILT
    fits = [fit for each in tried if (fit := _fill(architecture, start, each, rebuilds=rebuilds))]
    if len(fits) > 1:
        found = enumerate_names([repr(fit.prefix) for fit in fits], last=" and ")
        raise WeightsError(
            f"{where} has all that {architecture.source} needs under each of {found}; "
            f"say which: --weights-prefix {printable(fits[-1].prefix)}"
        )
    if not fits:
        where_most = fitting.guess_prefix() if prefix is None else prefix
        said = _explain(fitting, where_most)
        if fitting.compare(where_most).only_classes and not architecture.takes_num_classes():
            name = f"the name that {architecture.source} has for it"
            said += f"; another number of classes is said by --model-arg NAME=N, with {name}"
        return said
    (fit,) = fits
    if fit.fitting.find_leftovers(fit.prefix, others=complete):
        return _explain(fit.fitting, fit.prefix)
    return fit


def _fill(architecture: Architecture, start: _Fit, prefix: str, *, rebuilds: bool) -> _Fit | None:
    """Return what a state dict fills under a prefix, with another number of classes if need be, or None."""
    gaps = start.fitting.compare(prefix)
    if not gaps:
        return _Fit(start.model, start.args, start.fitting, prefix)
    if not (rebuilds and gaps.only_classes) or "num_classes" in start.args or not architecture.takes_num_classes():
        return None
    for count in guess_classes(gaps, architecture.count_classes(start.model)):
        args = {**start.args, "num_classes": count}
        try:
            model = architecture.build(args)
        except ConvSurgeonError:  # a guess that this network cannot take
            continue
        fitting = Fitting(model, start.fitting.state)
        if not fitting.compare(prefix):
            return _Fit(model, args, fitting, prefix)
    return None


def _explain(fitting: Fitting, prefix: str) -> str:
    gaps = fitting.explain(prefix)
    return f"under {printable(repr(prefix))}, {gaps}" if prefix else str(gaps)


def _say_none_under(prefix: str, fitting: Fitting) -> str:
    known = list(dict.fromkeys([*fitting.find_complete(), *(key.partition(".")[0] + "." for key in fitting.state)]))
    named = [name for name in known if name]
    return (
        f"nothing in it is under {printable(repr(prefix))}.{printable(did_you_mean(prefix, named))} "
        f"Its prefixes: {enumerate_names(named)}"
    )
