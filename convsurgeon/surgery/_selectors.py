"""Which op each convolution is offered, as the caller's selectors say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from convsurgeon import ops
from convsurgeon.errors import OptionError, SelectorError, did_you_mean
from convsurgeon.spec import ConvSpec
from convsurgeon.surgery._sites import Site

FilterFn = Callable[[nn.Module, str], bool]
NO_OP = "none"
"""What `to` is where only what `pointwise` and `mapping` name shall be converted."""
_POINTWISE = ConvSpec(64, 64, (1, 1))


@dataclass(frozen=True)
class Selectors:
    """The caller's wishes, checked: patterns are globs over all names of a convolution."""

    keep: tuple[str, ...]
    only: tuple[str, ...]
    mapping: tuple[tuple[str, str], ...]
    to: str
    pointwise: str | None
    options: Mapping[str, Any]

    @classmethod
    def parse(
        cls,
        to: str,
        *,
        keep: str | Sequence[str],
        only: str | Sequence[str],
        mapping: Mapping[str, str] | None,
        pointwise: str | None,
        options: Any,
    ) -> Selectors:
        """Check names and options.

        Raises:
            UnknownNameError: for an op that does not exist.
            OptionError: for an option that does not exist, or is not addressed to one of several ops.
            SelectorError: for patterns that are no text, for an op that cannot replace 1x1 convolutions and
                shall, and where no op is named at all.
        """
        if not isinstance(to, str):
            raise SelectorError(f"to must be the name of an op, as 'depthwise', or a Plan, got {to!r}")
        if not isinstance(mapping or {}, Mapping):
            raise SelectorError(f"mapping must map patterns to ops, as {{'layer4.*': 'shift'}}, got {mapping!r}")
        pairs = tuple((mapping or {}).items())
        named = [to, *(op for _, op in pairs), pointwise]
        used = [name for name in dict.fromkeys(named) if name is not None and name != NO_OP]
        if not used:
            raise SelectorError("--to none converts nothing by itself; say --pointwise OP or --map PATTERN=OP, too")
        addressed = _address(options, used)
        if pointwise is not None:
            _check_pointwise(pointwise)
        return cls(_patterns("keep", keep), _patterns("only", only), pairs, to, pointwise, addressed)

    def check_against(self, sites: Iterable[Site]) -> None:
        """Raise a `SelectorError` for the first pattern that matches no convolution."""
        fqns = [fqn for site in sites for fqn in site.fqns]
        wanted = [("--keep", pattern) for pattern in self.keep]
        wanted += [("--only", pattern) for pattern in self.only]
        wanted += [("--map", pattern) for pattern, _ in self.mapping]
        for flag, pattern in wanted:
            if not any(fnmatchcase(fqn, pattern) for fqn in fqns):
                inside = any(fqn.startswith(f"{pattern}.") for fqn in fqns)
                hint = f" Did you mean '{pattern}.*'?" if inside else did_you_mean(pattern, fqns)
                raise SelectorError(f"{flag} {pattern!r} matched no convolution.{hint}")

    def kept_by(self, site: Site) -> str | None:
        """Return why the selectors leave a convolution alone, or None."""
        if pattern := _first_match(site, self.keep):
            return f"kept by --keep {pattern!r}"
        if self.only and not _first_match(site, self.only):
            return "not selected by --only " + " ".join(repr(pattern) for pattern in self.only)
        return None

    def pointwise_to(self, site: Site) -> str | None:
        """Return the op that was asked for 1x1 convolutions, where it is one without groups, or None."""
        wanted = site.spec is not None and site.spec.is_pointwise and site.spec.groups == 1
        return self.pointwise if wanted else None

    def mapped_to(self, site: Site) -> str | None:
        """Return the op of the last mapping pattern that matches, or None."""
        found = [op for pattern, op in self.mapping if _first_match(site, (pattern,))]
        return found[-1] if found else None


def _check_pointwise(name: str) -> None:
    """Raise a `SelectorError` if an op cannot replace 1x1 convolutions, naming those that can."""
    reasons = {}
    for each in ops.names():
        op = ops.get(each)
        reasons[each] = op.why_not(_POINTWISE, op.fit_options(_POINTWISE, op.parse_options()))
    if reason := reasons[name]:
        able = ", ".join(each for each, obstacle in reasons.items() if obstacle is None)
        raise SelectorError(f"--pointwise {name!r}: it {reason}. Ops for 1x1 convolutions: {able}.")


def _patterns(what: str, value: str | Sequence[str]) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(pattern, str) for pattern in found):
        raise SelectorError(f"{what} must be a pattern, as 'layer4.*', or a list of them, got {value!r}")
    return tuple(found)


def _first_match(site: Site, patterns: tuple[str, ...]) -> str | None:
    return next((p for p in patterns if any(fnmatchcase(fqn, p) for fqn in site.fqns)), None)


def _address(options: Any, used: list[str]) -> dict[str, Any]:
    """Give every op its own checked options: `groups=8` for a single op, `group.groups=8` for several."""
    classes = {name: ops.get(name) for name in used}
    if options is not None and not isinstance(options, Mapping):
        owners = [name for name, op in classes.items() if isinstance(options, op.Options)]
        if len(owners) != 1:
            raise OptionError(f"options {options!r} belong to none of the ops in use: {', '.join(used)}")
        return {name: op.parse_options(options if name in owners else None) for name, op in classes.items()}
    addressed: dict[str, dict[str, Any]] = {name: {} for name in used}
    for key, value in (options or {}).items():
        owner, _, option = key.rpartition(".")
        if not owner and len(used) > 1:
            likely = [name for name, op in classes.items() if key in vars(op.parse_options())] or used
            raise OptionError(
                f"option {key!r} is ambiguous among {', '.join(used)}; say which op it is for: {likely[0]}.{key}"
            )
        if owner and owner not in addressed:
            raise OptionError(f"option {key!r} is for op {owner!r}, which is not in use: {', '.join(used)}")
        addressed[owner or used[0]][option] = value
    return {name: op.parse_options(addressed[name]) for name, op in classes.items()}
