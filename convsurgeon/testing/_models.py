"""All laws of whole models together."""

from __future__ import annotations

from typing import Any

from torch import nn

from convsurgeon.testing import _model_form, _model_runs
from convsurgeon.testing._checks import find_laws
from convsurgeon.testing._model_law import ModelCase, ModelLaw


def model_laws() -> dict[str, ModelLaw]:
    """Return the laws of whole models by name."""
    return find_laws("model_law_", _model_form, _model_runs)


def check_model(model: nn.Module, to: str = "depthwise", *, example_inputs: Any, **selectors: Any) -> None:
    """Rewrite a model, and run all laws of whole models on what comes of it; needs no hypothesis.

    Args:
        model: any model; it is left as it is.
        to: the op that convolutions become.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        selectors: what else `rewrite` is told: `keep`, `only`, `mapping`, `options`, `filter_fn`.

    Raises:
        AssertionError: naming the model, the law and what was found, in one sentence.
        ConvSurgeonError: what `rewrite` itself raises, such as `NothingToConvertError`.
    """
    case = ModelCase(model, to, example_inputs=example_inputs, **selectors)
    for law in model_laws().values():
        law(case)
