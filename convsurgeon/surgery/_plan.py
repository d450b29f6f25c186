"""The plan: one decision and one reason for every convolution, as plain data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from convsurgeon import ops
from convsurgeon.errors import NothingToConvertError, PlanError, SurveyError, UnsupportedConvError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.progress import be_silent
from convsurgeon.spec import ConvSpec
from convsurgeon.surgery._copies import ExampleInputs
from convsurgeon.surgery._functional import dense_kernel
from convsurgeon.surgery._parsing import expect_keys, finite, is_text, parse_plain, parse_spec, shown, text_of
from convsurgeon.surgery._selectors import NO_OP, FilterFn, Selectors
from convsurgeon.surgery._sites import Site, find_module
from convsurgeon.surgery._survey import Survey, survey
from convsurgeon.surgery._wrappers import module_of, why_no_layers

_FORMAT, _VERSION = "convsurgeon-plan", 1
# an input so large that borders do not matter: costs are compared by geometry and stride alone
_NOMINAL_SIZE = 1024
_CONVERTED, _REFUSED, _NOT_STANDARD = "converted", " refused", "not standard"
# the labels of what is kept by default only, and by no limit of the op's
_OVERRIDABLE = ("stem", "no gain")


@dataclass(frozen=True)
class Decision:
    """What happens to one convolution, and why.

    Args:
        fqns: all its names.
        spec: its geometry, or None for what is no 2-d convolution.
        op: the op that replaces it, or None where it is kept.
        options: the op's options, as fitted to this convolution.
        label: the reason in a word or two, for counting: `stem`, `1x1`, `grouped`.
        reason: the reason as a sentence.
    """

    fqns: tuple[str, ...]
    spec: ConvSpec | None
    op: str | None
    label: str
    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fqn(self) -> str:
        """The first name; a root that is itself the convolution is called `(root)`."""
        return self.fqns[0] or "(root)"


@dataclass(frozen=True)
class Plan:
    """A decision for every convolution of a model: printable, editable, and JSON both ways."""

    model: str
    decisions: tuple[Decision, ...]

    @property
    def converted(self) -> tuple[Decision, ...]:
        """The decisions that replace a convolution."""
        return tuple(decision for decision in self.decisions if decision.op is not None)

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The decisions that leave a convolution alone."""
        return tuple(decision for decision in self.decisions if decision.op is None)

    @property
    def tag(self) -> str:
        """What was done, in a word for a file name: `shift`, or `depthwise-group` where ops are mixed."""
        return "-".join(sorted({decision.op for decision in self.converted if decision.op is not None}))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data, with its format version."""
        decisions = []
        for decision in self.decisions:
            data = asdict(decision)
            spec = decision.spec.to_dict() if decision.spec else None
            decisions.append({**data, "fqns": list(decision.fqns), "spec": spec})
        return {"format": _FORMAT, "version": _VERSION, "model": self.model, "decisions": decisions}

    def to_json(self) -> str:
        """Return the plan as JSON text, the same bytes for the same plan."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Rebuild a plan from plain data.

        Raises:
            PlanError: for another format or version, missing or malformed fields, or doubled sites.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise PlanError(f'this is no plan: expected a JSON object with "format": "{_FORMAT}"')
        if type(version := data.get("version")) is not int or version != _VERSION:
            newer = "; install a newer convsurgeon" if isinstance(version, int) and version > _VERSION else ""
            raise PlanError(f"plan version {shown(version)} is not known here; expected {_VERSION}{newer}")
        try:
            expect_keys(data, ("format", "version", "model", "decisions"), what="a plan")
            if not isinstance(data["decisions"], list):
                raise ValueError(f"decisions must be a list, got {shown(data['decisions'])}")
            plan = cls(text_of(data, "model"), tuple(_decision(item) for item in data["decisions"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            said = str(error) if type(error) is ValueError else one_line(error)
            raise PlanError(f"malformed plan: {said}") from error
        doubled = [fqn for fqn, n in Counter(f for d in plan.decisions for f in d.fqns).items() if n > 1]
        if doubled:
            raise PlanError(f"the plan decides twice about {doubled[0]!r}; keep one decision for each")
        return plan

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Rebuild a plan from JSON text.

        Raises:
            PlanError: for text that is no JSON, or no plan.
        """
        try:
            data = json.loads(text, parse_float=finite, parse_constant=finite)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"this is no plan: not JSON ({one_line(error)})") from error
        return cls.from_dict(data)


def plan(
    model: nn.Module | Survey,
    to: str = "depthwise",
    *,
    keep: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
    pointwise: str | None = None,
    options: Any = None,
    filter_fn: FilterFn | None = None,
    example_inputs: ExampleInputs | None = None,
    found: Survey | None = None,
) -> Plan:
    """Decide about every convolution of a model, without touching it.

    By default these are kept: convolutions that are cheap already (grouped, depthwise, 1x1), the
    stem, those where the op would cost more MACs than the dense one, and those that the op or this
    package cannot replace. Every decision carries its reason.

    Args:
        to: the op that convolutions become; `"none"` converts what `pointwise` and `mapping` name, and no other.
        keep: glob patterns over fqns to leave alone; wins over everything.
        only: glob patterns; all others are left alone.
        mapping: glob pattern to op; overrides the default keeps, and the last match wins.
        pointwise: the op that 1x1 convolutions without groups become, which are kept otherwise: `"lowrank"`.
        options: the op's options, `{"groups": 8}`; `{"group.groups": 8}` where several ops are used.
        filter_fn: called with each convolution and its fqn; False keeps it.
        example_inputs: an input to run once, for call order and sizes.
        found: what `survey` found in the model, if that is known already.

    Raises:
        NothingToConvertError: if no convolution would be converted, counting the reasons.
        SelectorError: for a pattern that matches nothing, and for a `pointwise` that cannot replace 1x1 ones.
        UnknownNameError: for an op that does not exist.
        OptionError: for an option that does not exist or cannot take the value.
    """
    if isinstance(model, Survey):
        if filter_fn is not None:
            raise SurveyError("filter_fn needs the model, not its survey: call plan(model, filter_fn=...)")
        found = model
    else:
        model = module_of(model, report=be_silent)
        found = found or survey(model, example_inputs=example_inputs)
    return decide(
        found,
        model,
        to,
        keep=keep,
        only=only,
        mapping=mapping,
        pointwise=pointwise,
        options=options,
        filter_fn=filter_fn,
    )


def decide(
    found: Survey,
    model: nn.Module | Survey,
    to: str,
    *,
    keep: str | Sequence[str],
    only: str | Sequence[str],
    mapping: Mapping[str, str] | None,
    pointwise: str | None,
    options: Any,
    filter_fn: FilterFn | None,
) -> Plan:
    """Return the plan for a survey; the arguments are those of `plan`."""
    selectors = Selectors.parse(to, keep=keep, only=only, mapping=mapping, pointwise=pointwise, options=options)
    if found.sites:
        selectors.check_against(found.sites)
    decisions = []
    for site in found.sites:
        passed = filter_fn is None or filter_fn(find_module(model, site), site.fqn)  # type: ignore[arg-type]
        decisions.append(_decide(site, selectors, model) if passed else _keep(site, "filtered", "filter_fn said no"))
    result = Plan(found.model, tuple(decisions))
    if not result.converted:
        reason = None if isinstance(model, Survey) else why_no_layers(model)
        raise NothingToConvertError(f"nothing to convert: {reason}" if reason else _nothing(result, selectors))
    return result


def _decide(site: Site, selectors: Selectors, model: nn.Module | Survey) -> Decision:
    if reason := selectors.kept_by(site):
        return _keep(site, "kept by selector", reason)
    if fixed := _impossible(site):
        return _keep(site, *fixed)
    assert site.spec is not None
    mapped, pointwise = selectors.mapped_to(site), selectors.pointwise_to(site)
    if mapped is None and (kept := _default_keep(site, but_pointwise=pointwise is not None)):
        return _keep(site, *kept)
    name = mapped or pointwise or selectors.to
    if name == NO_OP:
        return _keep(site, "kept by selector", "kept by --to none")
    op, wished = ops.get(name), selectors.options[name]
    kernel = None
    if op.depends_on_weight(wished):
        if isinstance(model, Survey):
            raise SurveyError(f"{name}: a share of energy needs the model, not its survey: call plan(model, ...)")
        kernel = dense_kernel(model, site.fqns[0])
    try:
        options = op.fit_options(site.spec, wished, kernel)
    except UnsupportedConvError as error:
        raise UnsupportedConvError(f"{site.fqn}: {error}") from error
    if reason := op.why_not(site.spec, options):
        return _keep(site, f"{name}{_REFUSED}", f"{name}: {reason}")
    ratio = mac_ratio(site.spec, op, options)
    if ratio < 1 and mapped is None:
        return _keep(site, "no gain", f"{name} would cost {1 / ratio:.2f}x the MACs of the dense convolution")
    reason = "; ".join([_converted_reason(ratio, wished, options), *([site.note] if site.note else [])])
    return Decision(site.fqns, site.spec, name, _CONVERTED, reason, asdict(options))


def default_keep(site: Site) -> str | None:
    """Return why a convolution is kept whatever the op, unless it is mapped, or None."""
    kept = _impossible(site) or _default_keep(site)
    return kept[1] if kept else None


def _impossible(site: Site) -> tuple[str, str] | None:
    if site.op is not None:
        return "converted already", f"it is a cheap convolution already: {site.op}"
    if site.obstacle is not None or site.spec is None:
        return _NOT_STANDARD, site.obstacle or "it is not a Conv2d"
    return None


def _default_keep(site: Site, *, but_pointwise: bool = False) -> tuple[str, str] | None:
    assert site.spec is not None
    if site.spec.is_depthwise:
        return "depthwise", "it is cheap already: depthwise"
    if site.spec.groups > 1:
        return "grouped", f"it is cheap already: grouped (groups={site.spec.groups})"
    if site.spec.is_pointwise and not but_pointwise:
        return "1x1", "it is cheap already: 1x1"
    if site.stem:
        return "stem", f"it is the stem: the first layer, with {site.spec.in_channels} input channels"
    return None


def mac_ratio(spec: ConvSpec, op: type[AbstractCheapConv], options: Any) -> float:
    """Return how many times fewer MACs an op needs than the dense convolution, borders aside."""
    height, width = (_NOMINAL_SIZE * step for step in spec.stride)
    return spec.macs(height, width) / op.macs(*spec.unpadded(height, width), options)


def _converted_reason(ratio: float, wished: Any, options: Any) -> str:
    change = [
        _change(key, asked, value) for key, value in asdict(options).items() if (asked := asdict(wished)[key]) != value
    ]
    verb = f"{ratio:.1f}x fewer MACs" if ratio >= 1 else f"{1 / ratio:.1f}x more MACs, as mapped"
    return "; ".join([verb, *change])


def with_fitted_options(decision: Decision, op: AbstractCheapConv) -> Decision:
    """Return a decision with the options that its op has come to, and a reason that says so where they are others."""
    wished, fitted = op.parse_options(decision.options), op.parse_options(op.options)
    if fitted == wished:
        return decision
    reason = _converted_reason(mac_ratio(op.spec, type(op), fitted), wished, fitted)
    return replace(decision, options=asdict(fitted), reason=reason)


def _change(key: str, asked: Any, value: Any) -> str:
    if isinstance(asked, int):
        return f"{key}={value}, since {asked} does not fit"
    return f"{key}={value}" if asked is None else f"{key}={value} for {asked}"


def _keep(site: Site, label: str, reason: str) -> Decision:
    return Decision(site.fqns, site.spec, None, label, reason)


def _nothing(result: Plan, selectors: Selectors) -> str:
    if not result.decisions:
        return f"{result.model} has no convolution; there is nothing to convert"
    counts = Counter(decision.label for decision in result.decisions)
    reasons = ", ".join(
        f"{count} {'is' if count == 1 else 'are'} {label}{_one_refusal(result, label)}"
        for label, count in counts.most_common()
    )
    mapped = any(decision.label in _OVERRIDABLE for decision in result.decisions)
    wanted = list(selectors.options)
    hint = f"; --map 'PATTERN={wanted[0]}' converts what is kept by default only" if mapped else ""
    return (
        f"nothing to convert: 0 of {len(result.decisions)} convolutions of {result.model} can become "
        f"{' or '.join(map(repr, wanted))}: "
        f"{reasons}; `convsurgeon inspect` shows each{hint}"
    )


def _one_refusal(result: Plan, label: str) -> str:
    """Return the reason in brackets, where it is the same for all that an op refused, or that are not standard."""
    if label == _NOT_STANDARD:
        reasons = {decision.reason for decision in result.decisions if decision.label == label}
        first = next(decision for decision in result.decisions if decision.label == label)
        return f" ({first.reason})" if len(reasons) == 1 else f" (such as {first.fqn}: {first.reason})"
    reasons = {decision.reason.split(": ", 1)[-1] for decision in result.decisions if decision.label == label}
    return f" ({reasons.pop()})" if label.endswith(_REFUSED) and len(reasons) == 1 else ""


def _decision(item: Any) -> Decision:
    if not isinstance(item, Mapping):
        raise ValueError(f"a decision must be an object, got {shown(item)}")
    expect_keys(item, tuple(entry.name for entry in fields(Decision)), what="a decision")
    fqns, op, options = item["fqns"], item["op"], item["options"]
    if not isinstance(fqns, list) or not fqns or not all(is_text(fqn) for fqn in fqns):
        raise ValueError(f"fqns must be a list of names, got {shown(fqns)}")
    if op is not None and (not is_text(op) or item["spec"] is None):
        raise ValueError(f"op must be a name, with a spec, or null, got {shown(op)}")
    label, reason = text_of(item, "label"), text_of(item, "reason")
    if (op is not None) != (label == _CONVERTED):  # somebody has set or taken away the op, and left the rest
        label, reason = (_CONVERTED if op is not None else "kept by the plan"), "as the plan was edited to say"
    return Decision(
        fqns=tuple(fqns),
        spec=parse_spec(item["spec"]) if item["spec"] is not None else None,
        op=op,
        label=label,
        reason=reason,
        options=parse_plain(options),
    )
