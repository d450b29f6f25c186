"""Convolutions to try an op on: drawn by hypothesis, or from a seed."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from convsurgeon.errors import ConvSurgeonError, OptionError
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec, Pair

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Op = type[AbstractCheapConv]
Case = tuple[ConvSpec, Any]
Choose = Callable[[Sequence[Any]], Any]
_SMALL: dict[type, tuple[Any, ...]] = {bool: (False, True), int: (1, 2, 3, 4, 6), float: (0.25, 0.5, 1.0)}


def sample_cases(op: Op, *, count: int = 6, seed: int = 0) -> list[Case]:
    """Return generated cases that the op accepts, the same ones for the same seed.

    Raises:
        AssertionError: if the op refuses nearly everything.
    """
    choose = random.Random(seed).choice
    drawn = (_draw_case(op, choose) for _ in range(200 * count))
    found = [case for case, _ in zip(filter(lambda case: accepts(op, *case), drawn), range(count), strict=False)]
    if len(found) < count:
        raise AssertionError(f"{op.__name__} accepts {len(found)} of {200 * count} generated convolutions")
    return found


def accepts(op: Op, spec: ConvSpec, options: Any = None) -> bool:
    """Whether the op can replace such a convolution."""
    return op.why_not(spec, op.fit_options(spec, op.parse_options(options))) is None


def specs() -> SearchStrategy[ConvSpec]:
    """Return a hypothesis strategy for dense convolutions of every kind that `nn.Conv2d` offers."""
    return strategy(_draw_spec)


def cases(op: Op) -> SearchStrategy[Case]:
    """Return a hypothesis strategy for pairs of a geometry and options that the op accepts."""
    return strategy(lambda choose: _draw_case(op, choose)).filter(lambda case: accepts(op, *case))


def make_donor(spec: ConvSpec, *, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    """Return a convolution of that geometry with random weights."""
    return nn.Conv2d(**dataclasses.asdict(spec), dtype=dtype)


def input_size(spec: ConvSpec) -> Pair:
    """Return an input size that the padding mode allows and where every tap meets the image somewhere."""
    height, width = (
        d * (k - 1) + 1 + s + max(pad)
        for d, k, s, pad in zip(spec.dilation, spec.kernel_size, spec.stride, spec.pads, strict=True)
    )
    return height, width + 1


def strategy(draw_one: Callable[[Choose], Any]) -> SearchStrategy[Any]:
    """Turn a function that chooses from sequences into a hypothesis strategy.

    Raises:
        ConvSurgeonError: where hypothesis is not installed.
    """
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ConvSurgeonError(
            "convsurgeon.testing: strategies need hypothesis (pip install hypothesis); check_op needs none"
        ) from error

    @strategies.composite
    def draw_all(draw: Any) -> Any:
        return draw_one(lambda values: draw(strategies.sampled_from(values)))

    return draw_all()


def _draw_spec(choose: Choose) -> ConvSpec:
    # hypothesis shrinks towards the front of each sequence
    padding: Pair | str = choose(("numbers", "numbers", "same", "valid"))
    stride = (1, 1) if padding == "same" else (choose((1, 2, 3)), choose((1, 2, 3)))
    if padding == "numbers":
        padding = (choose((0, 1, 2, 3)), choose((0, 1, 2, 3)))
    return ConvSpec(
        in_channels=choose((4, 8, 6, 1, 2, 3, 5, 7, 9, 10, 11, 12)),
        out_channels=choose((4, 8, 6, 1, 2, 3, 5, 7, 9, 10, 11, 12)),
        kernel_size=(choose((3, 2, 1, 4, 5)), choose((3, 2, 1, 4, 5))),
        stride=stride,
        padding=padding,
        dilation=(choose((1, 2)), choose((1, 2))),
        bias=choose((True, False)),
        padding_mode=choose(("zeros", "reflect", "replicate", "circular")),
    )


def _draw_case(op: Op, choose: Choose) -> Case:
    hints = typing.get_type_hints(op.Options)
    defaults = dataclasses.asdict(op.parse_options())
    chosen = {name: choose(_candidates(op, name, hints[name], default)) for name, default in defaults.items()}
    return _draw_spec(choose), op.parse_options(chosen)


def _candidates(op: Op, name: str, hint: Any, default: Any) -> list[Any]:
    """Return the values to try for an option: all choices, both truths, small numbers, shares, or the default."""
    if typing.get_origin(hint) is typing.Literal:
        return [value for value in typing.get_args(hint) if _takes(op, name, value)]
    values = [default]
    for kind in typing.get_args(hint) or (hint,):  # of a rank, int | float | str
        values += _SMALL.get(kind, ())
    return [value for value in values if _takes(op, name, value)]


def _takes(op: Op, name: str, value: Any) -> bool:
    try:
        op.parse_options({name: value})
    except OptionError:
        return False
    return True
