"""What makes a function a law of ops, and what such laws share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import UnsupportedConvError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec
from convsurgeon.testing._cases import Op, accepts, input_size, make_donor
from convsurgeon.testing._checks import BrokenError, by, require

Law = Callable[[Op, ConvSpec, Any], None]

EXPENSIVE: set[str] = set()
"""The names of the laws that take seconds: those that export."""
SEED = 20190913


def op_law(check: Law) -> Law:
    """Make a function a law: give it its seed, and every failure the op, the law and the case in front."""

    @functools.wraps(check)
    def law(op: Op, spec: ConvSpec, options: Any = None) -> None:
        options = op.parse_options(options)
        if not accepts(op, spec, options):
            raise UnsupportedConvError(f"{op.__name__} refuses {spec} with {options}; give a case it accepts")
        where = f"{op.__name__} breaks {check.__name__} for {spec} with {options}"
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # the donor itself says so, on its first call
            warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
            torch.default_generator.manual_seed(SEED)
            try:
                check(op, spec, options)
            except BrokenError as error:
                raise AssertionError(f"{where}: {error}") from error
            except Exception as error:  # whatever a foreign op raises
                raise AssertionError(f"{where}: {one_line(error)}") from error

    return law


def expensive(law: Law) -> Law:
    """Mark a law as one that takes seconds."""
    EXPENSIVE.add(law.__name__)
    return law


def make_image(spec: ConvSpec, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return images that such a convolution takes."""
    return torch.randn(batch, spec.in_channels, *input_size(spec), dtype=dtype)


def dense_of(op: AbstractCheapConv, spec: ConvSpec) -> nn.Conv2d:
    """Return the dense convolution that an op says it equals."""
    kernel, bias = op.as_dense().detach(), op.bias
    conv = make_donor(spec, dtype=kernel.dtype)
    require(kernel.shape == conv.weight.shape, f"as_dense() is {by(kernel)}, the donor's {by(conv.weight)}")
    require((bias is None) == (conv.bias is None), f"bias is {bias}, the donor has bias={spec.bias}")
    with torch.no_grad():
        conv.weight.copy_(kernel)
        if conv.bias is not None and bias is not None:
            conv.bias.copy_(bias)
    return conv


def both(op: Op, spec: ConvSpec, options: Any) -> list[AbstractCheapConv]:
    """Return an op as it comes from `build` and one as it comes from `from_conv`."""
    return [op.build(spec, options, dtype=torch.float64), op.from_conv(make_donor(spec), options)]
