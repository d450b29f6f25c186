"""Wrappers, such as `nn.DataParallel`, which hand their inputs on to a network, and networks without layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from convsurgeon.errors import ConvSurgeonError
from convsurgeon.progress import Progress, Report
from convsurgeon.surgery._copies import expect_module

# by their names, so that nothing is imported to look; classes that derive from one of them are wrappers, too
_ATTRIBUTES = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "timm.utils.model_ema.ModelEma": "ema",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}


def unwrap(model: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the network inside of all wrappers, and the attributes that lead there, the outermost first.

    >>> unwrap(nn.DataParallel(nn.ReLU()))
    (ReLU(), ('module',))
    """
    path: list[str] = []
    while (name := _attribute(model)) is not None:
        path.append(name)
        model = getattr(model, name)
    return model, tuple(path)


def network_inside(model: Any, *, role: str, stage: str, report: Report) -> nn.Module:
    """Return the network inside of all wrappers, and say so in one line, where there are any.

    Args:
        role: what the model is called, such as `the teacher`.
        stage: what is going on, as `Progress` names it.

    Raises:
        SurveyError: if it is no module.
    """
    network, path = unwrap(model)
    expect_module(network)
    if path:
        wrapper = type(model).__name__
        message = f"{role} is wrapped in {wrapper}: the {type(network).__name__} inside is used, not the wrapper"
        report(Progress(stage, message=message))
    assert isinstance(network, nn.Module)
    return network


def module_of(model: Any, *, report: Report) -> nn.Module:
    """Return a model to look at and to rewrite: as it is, unless its wrapper is no module, as timm's `ModelEma`.

    Raises:
        SurveyError: if there is no module.
    """
    if not isinstance(model, nn.Module) and _attribute(model) is not None:
        return network_inside(model, role="the model", stage="rewrite", report=report)
    expect_module(model)
    assert isinstance(model, nn.Module)
    return model


def why_no_layers(model: nn.Module) -> str | None:
    """Return why the layers of a network cannot be exchanged or trained, and what to give instead, or None."""
    network, _ = unwrap(model)
    name = type(network).__name__
    if isinstance(network, torch.jit.ScriptModule):
        return f"{name} is TorchScript, whose layers are compiled; give the network that it was scripted or traced from"
    if isinstance(network, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in network.graph.nodes
    ):
        return (
            f"{name} is a graph of aten operators, as torch.export.export(...).module() gives, and has no layers; give "
            "the network that was exported, or cs.load('net.pt2') after torch.export.save(program, 'net.pt2')"
        )
    return None


def refuse_without_layers(model: nn.Module, *, role: str, error: type[ConvSurgeonError]) -> None:
    """Raise the given error for a network without layers."""
    if reason := why_no_layers(model):
        raise error(f"{role}: {reason}")


def _attribute(model: Any) -> str | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__)
    found = next((_ATTRIBUTES[name] for name in names if name in _ATTRIBUTES), None)
    if found is None and not isinstance(model, nn.Module) and isinstance(getattr(model, "ema", None), nn.Module):
        return "ema"  # as detection code bases have an average
    return found
