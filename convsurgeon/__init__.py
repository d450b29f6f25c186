"""Swap the convolutions of a trained CNN for cheap ones, distil, and export proven ONNX."""

import importlib
from typing import TYPE_CHECKING, Any

from convsurgeon import errors

if TYPE_CHECKING:
    from convsurgeon import ops as ops
    from convsurgeon.calibration import calibrate as calibrate
    from convsurgeon.delivery import Delivery as Delivery
    from convsurgeon.delivery import export as export
    from convsurgeon.distillation import DistillResult as DistillResult
    from convsurgeon.distillation import distill as distill
    from convsurgeon.evaluation import Evaluation as Evaluation
    from convsurgeon.evaluation import evaluate as evaluate
    from convsurgeon.spec import ConvSpec as ConvSpec
    from convsurgeon.storage import load as load
    from convsurgeon.storage import save as save
    from convsurgeon.surgery import Decision as Decision
    from convsurgeon.surgery import Plan as Plan
    from convsurgeon.surgery import Site as Site
    from convsurgeon.surgery import Survey as Survey
    from convsurgeon.surgery import plan as plan
    from convsurgeon.surgery import plan_of as plan_of
    from convsurgeon.surgery import rewrite as rewrite
    from convsurgeon.surgery import survey as survey

__version__ = "0.1.0"

# where each public name lives; imported on first use, so that `convsurgeon --help` needs no torch
_HOMES = {
    "ConvSpec": "spec",
    "Decision": "surgery",
    "Delivery": "delivery",
    "DistillResult": "distillation",
    "Evaluation": "evaluation",
    "Plan": "surgery",
    "Site": "surgery",
    "Survey": "surgery",
    "calibrate": "calibration",
    "distill": "distillation",
    "evaluate": "evaluation",
    "export": "delivery",
    "load": "storage",
    "plan": "surgery",
    "plan_of": "surgery",
    "rewrite": "surgery",
    "save": "storage",
    "survey": "surgery",
}

__all__ = ["__version__", "errors", "ops", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("convsurgeon.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(f"convsurgeon.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
