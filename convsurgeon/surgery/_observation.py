"""What a run shows: which convolutions are called, in which order and with what, and who else touches a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsurgeon.errors import SurveyError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import Pair
from convsurgeon.surgery._calls import Use, Watch
from convsurgeon.surgery._copies import ExampleInputs, call
from convsurgeon.surgery._examples import describe_inputs
from convsurgeon.surgery._functional import Finding, Names
from convsurgeon.surgery._outputs import Leaf, describe_output
from convsurgeon.surgery._sites import walk


@dataclass
class Run:
    """What one run showed.

    Args:
        order: convolutions, linear layers and functional convolutions in call order.
        sizes: heights and widths of inputs, call by call.
        findings: functional convolutions, and other reads of kernels.
        output: what came out.
        unusual: convolutions that were called as no `nn.Conv2d` can be, with how.
    """

    order: list[str]
    sizes: Mapping[str, tuple[Pair, ...]]
    findings: list[Finding]
    output: list[Leaf]
    unusual: Mapping[str, str]


def observe(model: nn.Module, names: Names, example_inputs: ExampleInputs) -> Run:
    """Run a model, in the mode it is in, and note who is called with what.

    Raises:
        SurveyError: if it fails.
    """
    order: list[str] = []
    sizes: dict[str, tuple[Pair, ...]] = {}
    unusual: dict[str, str] = {}

    def note(fqn: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(fqn)
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(module, nn.Conv2d) and (reason := _unusual_call(module, x, args[1:], kwargs)):
                unusual.setdefault(fqn, reason)
            if isinstance(module, (nn.Conv2d, AbstractCheapConv)) and isinstance(x, Tensor) and x.dim() >= 3:
                sizes[fqn] = (*sizes.get(fqn, ()), (int(x.shape[-2]), int(x.shape[-1])))

        return hook

    sites = list(walk(model))
    handles = [
        # before an op's own padding
        module.register_forward_pre_hook(note(fqns[0]), with_kwargs=True, prepend=True)
        for module, fqns in sites
        if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    ]
    inside = tuple(f"{fqns[0]}." for module, fqns in sites if isinstance(module, AbstractCheapConv))
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear) and not fqn.startswith(inside):
            handles.append(module.register_forward_pre_hook(note(fqn), with_kwargs=True))

    def note_functional(use: Use) -> None:
        kernel = names.first(use.tensor)
        if not names.is_own(use):
            order.append(kernel or f"{use.function}()")
            return
        assert use.owner is not None
        owner = names.modules.get(use.owner)
        if owner is not None and order[-1:] != [owner]:
            order.append(owner)  # its forward was called, not itself
        if kernel is not None and use.input_size is not None:
            sizes[kernel] = (*sizes.get(kernel, ()), use.input_size)

    known = {*names.modules, *(part for module, _ in sites if module not in names.modules for part in module.modules())}
    watch = Watch(names.kernels, known, on_convolution=note_functional)
    try:
        output = describe_output(call(model, example_inputs, watch))
    except Exception as error:
        raise SurveyError(
            f"{type(model).__name__} itself fails on the example input {describe_inputs(example_inputs)}: "
            f"{one_line(error)}; give an input that it takes (a copy is run, which must work like the model)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    findings = [names.resolve(use) for use in (*watch.convolutions, *watch.others) if not names.is_own(use)]
    return Run(order, sizes, findings, output, unusual)


def _unusual_call(module: nn.Conv2d, x: Any, more: Sequence[Any], named: Mapping[str, Any]) -> str | None:
    """Return how a convolution of a class of its own is called as no `nn.Conv2d` can be, or None."""
    names = [*("" for _ in more), *(name for name in named if named[name] is not x)]
    if names:
        said = "".join(f" {name}=" for name in names[:1] if name)
        return f"it is called with more than an image{said and ':' + said}"
    channels = x.shape[-3] if isinstance(x, Tensor) and x.dim() >= 3 else module.in_channels
    if channels != module.in_channels:
        return f"it is called with {channels} channels, and its weight is made for {module.in_channels}"
    return None


def written_kernels(model: nn.Module, copied: nn.Module) -> set[str]:
    """Return the names of the kernels that a copy has written to since it was made, as max-norm constraints do."""
    before, now = Names(model), Names(copied)
    found = set()
    for name, key in before.by_name.items():
        mine, other = now.kernels.get(now.by_name.get(name, -1)), before.kernels[key]
        if mine is not None and not is_lazy(other) and not mine.is_meta and not _is_untouched(mine, other):
            found.add(name)
    return found


def _is_untouched(tensor: Tensor, original: Tensor) -> bool:
    if torch._C._is_cow_tensor(tensor):  # type: ignore[attr-defined]  # nobody has written
        return True
    if tensor.shape != original.shape:
        return False
    return torch.equal(tensor, original) or torch.equal(tensor.nan_to_num(), original.nan_to_num())
