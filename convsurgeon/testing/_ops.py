"""All laws of ops together."""

from __future__ import annotations

from collections.abc import Iterable

from convsurgeon.testing import _op_travel, _op_values, _op_writes
from convsurgeon.testing._cases import Case, Op, sample_cases
from convsurgeon.testing._checks import find_laws
from convsurgeon.testing._op_law import EXPENSIVE, Law


def laws(*, expensive: bool | None = None) -> dict[str, Law]:
    """Return the laws by name: all of them, only the expensive, or (False) only the cheap."""
    found: dict[str, Law] = find_laws("law_", _op_values, _op_writes, _op_travel)
    return {name: law for name, law in found.items() if expensive in (None, name in EXPENSIVE)}


def check_op(op: Op, *, cases: Iterable[Case] | None = None, expensive: bool = True) -> None:
    """Run all laws on the given cases, by default on six generated ones; needs no hypothesis.

    Args:
        op: the class to check; it need not be registered.
        cases: pairs of a geometry and options that the op accepts.
        expensive: whether to export, too, which takes seconds; done for the first two cases only.

    Raises:
        AssertionError: naming the op, the law, the case and what was found.
        UnsupportedConvError: if the op refuses one of the given cases.
    """
    tried = sample_cases(op) if cases is None else list(cases)
    if not tried:
        raise AssertionError(f"{op.__name__}: no case was given, so no law was checked")
    for name, law in laws(expensive=None if expensive else False).items():
        for spec, options in tried[:2] if name in EXPENSIVE else tried:
            law(op, spec, options)
