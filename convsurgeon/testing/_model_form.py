"""The laws of what a student is: a copy in which nothing differs but the convolutions that were named."""

from __future__ import annotations

import contextlib
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from convsurgeon import ops
from convsurgeon.errors import ConvSurgeonError
from convsurgeon.ops import AbstractCheapConv, SamePadding
from convsurgeon.surgery import in_mode, rewrite
from convsurgeon.testing._checks import require
from convsurgeon.testing._holdings import Witness, holdings, hooks_of, plain_attributes, same
from convsurgeon.testing._model_law import ModelCase, donors, model_law, owns, taken_along
from convsurgeon.testing._runs import copy_of, run

# padding may be another by name for the same; the rest went into the kernel
_OF_A_CONVOLUTION = {"padding", "padding_mode", "_reversed_padding_repeated_twice"}
_OF_A_CONVOLUTION |= {"weight", "bias", "forward", "_conv_forward"}
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype)


@model_law
def model_law_caller_untouched(case: ModelCase) -> None:
    """Model, inputs and global state are as before, bit by bit, also where `rewrite` raises."""
    witness = Witness(case.model, inputs=case.example_inputs)
    try:
        student = case.rewrite()
    finally:
        witness.check("rewrite")
    vars(case).setdefault("student", student)  # saves the other laws a rewrite
    failing: list[dict[str, Any]] = [
        {**case.selectors, "keep": "no convolution has this name", "example_inputs": case.example_inputs},
        {**case.selectors, "example_inputs": (object(),) * 3},
    ]
    for arguments in failing:
        try:
            with contextlib.suppress(ConvSurgeonError):
                rewrite(case.model, case.to, **arguments)
        finally:
            witness.check("a rewrite that raises")


@model_law
def model_law_names(case: ModelCase) -> None:
    """Classes and names stay: an op stands under every name of what it replaced, all else is where it was."""
    theirs = dict(case.student.named_modules(remove_duplicate=False))
    for decision in case.plan.converted:
        assert decision.op is not None
        for fqn in decision.fqns:
            require(fqn in theirs, f"{fqn} is missing in the student")
            found = type(theirs[fqn])
            require(found is ops.get(decision.op), f"{fqn} is a {found.__name__}, the plan says {decision.op}")
    for fqn, module in case.copy.named_modules(remove_duplicate=False):
        if not case.is_converted(fqn):
            where = fqn or "the root"
            require(fqn in theirs, f"{where} is missing in the student")
            same_class = type(theirs[fqn]) is type(module) or _are_twins(theirs[fqn], module)
            require(same_class, f"{where} is a {type(theirs[fqn]).__name__}, the model's a {type(module).__name__}")
    mine = {fqn for fqn, _ in case.model.named_modules(remove_duplicate=False)}
    added = [fqn for fqn in theirs if fqn not in mine and not case.is_converted(fqn)]
    require(not added, f"the student has {', '.join(added)}, the model has not")


def _are_twins(a: nn.Module, b: nn.Module) -> bool:
    """Whether both are graph modules: each has a class of its own."""
    return isinstance(a, fx.GraphModule) and isinstance(b, fx.GraphModule) and repr(type(a)) == repr(type(b))


@model_law
def model_law_untouched_bits(case: ModelCase) -> None:
    """What is not converted has the same state, bit by bit and in the same order."""
    mine, theirs = ({k: v for k, v in _state(m) if not case.is_converted(k)} for m in (case.model, case.student))
    require(list(mine) == list(theirs), f"the state besides the ops has {sorted(theirs)}, expected {sorted(mine)}")
    for name, value in mine.items():
        require(same(value, theirs[name]), f"{name} has other values than the model's")


def _state(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the state dict, and the buffers that are not in it."""
    entries = {**model.state_dict(keep_vars=True), **dict(model.named_buffers(remove_duplicate=False))}
    return [(name, value) for name, value in entries.items() if not nn.parameter.is_lazy(value)]


@model_law
def model_law_sharing(case: ModelCase) -> None:
    """One object under several names stays one, also in lists and dicts; tied weights stay tied."""
    mine, theirs = _groups(case.model), _groups(case.student)
    values = dict(holdings(case.model))
    group_of = {path: index for index, paths in enumerate(theirs) for path in paths}
    for paths in mine:
        there = [path for path in paths if path in group_of]
        gone = [path for path in paths if path not in group_of]
        split = {group_of[path] for path in there}
        require(len(split) <= 1, f"{' and '.join(there)} are one object in the model and {len(split)} in the student")
        sites = {decision.fqns for path in gone for decision in case.plan.converted if _is_of(path, decision.fqns)}
        # a parametrization without parameters went into every kernel, and nothing is lost
        free = isinstance(values[paths[0]], nn.Module) and not any(True for _ in values[paths[0]].parameters())
        untied = gone and (there or len(sites) > 1) and not (free and sites)
        left = " and ".join(there) or "none"
        require(not untied, f"{' and '.join(paths)} are one object, and the student has {left}")
    group_of = {path: index for index, paths in enumerate(mine) for path in paths}
    for paths in theirs:
        there = [path for path in paths if path in group_of]
        merged = {group_of[path] for path in there}
        require(len(merged) <= 1, f"{' and '.join(there)} are one object in the student only")


def _groups(model: nn.Module) -> list[list[str]]:
    """Return the names of every module and tensor that a model holds."""
    names: dict[int, list[str]] = {}
    for path, value in holdings(model):
        if isinstance(value, (nn.Module, Tensor)):
            names.setdefault(id(value), []).append(path)
    return list(names.values())


def _is_of(path: str, fqns: tuple[str, ...]) -> bool:
    return any(fqn == "" or path == fqn or path.startswith(f"{fqn}.") for fqn in fqns)


@model_law
def model_law_apart(case: ModelCase) -> None:
    """The student shares no module, no memory and no bound method with the model."""
    modules = {id(value) for _, value in holdings(case.model) if isinstance(value, nn.Module)}
    memory = {_address(value) for _, value in holdings(case.model)} - {0}
    for path, value in holdings(case.student):
        owner = value.__self__ if isinstance(value, MethodType) else value
        require(id(owner) not in modules, f"{path} of the student leads to a module of the model")
        require(_address(value) not in memory, f"{path} of the student shares memory with the model")
    watch = _Uses({id(value): path for path, value in holdings(case.model) if isinstance(value, Tensor)})
    with torch.no_grad(), watch:
        run(in_mode(copy_of(case.student), training=False), case.example_inputs)
    require(not watch.seen, f"the student computes with {', '.join(sorted(watch.seen))} of the model, not with its own")


class _Uses(TorchFunctionMode):
    """Notes which of some tensors are used: a closure, or a weak reference, leads a copy back to the original."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.seen = names, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        values = pytree.tree_leaves((args, kwargs))
        self.seen |= {self.names[id(value)] for value in values if id(value) in self.names}
        return func(*args, **(kwargs or {}))


def _address(value: Any) -> int:
    if not isinstance(value, Tensor) or nn.parameter.is_lazy(value) or value.is_meta:
        return 0
    return value.untyped_storage().data_ptr()


@model_law
def model_law_modes(case: ModelCase) -> None:
    """Every module is in the mode of the model's, and every part of an op in that of what it replaced."""
    for fqn, module, copied in case.untouched():
        mode = copied.training
        require(mode == module.training, f"{fqn or 'the root'} has training={mode}, the model's {module.training}")
    for fqn, _, owner, op in case.converted():
        wrong = [name or "the op" for name, part in op.named_modules() if part.training != owner.training]
        require(not wrong, f"{fqn}: {', '.join(wrong)} has training={not owner.training}, unlike what it replaced")


@model_law
def model_law_frozen(case: ModelCase) -> None:
    """Frozen stays frozen and trained stays trained; the bias of an op follows the bias it replaced."""
    mine = dict(case.model.named_parameters(remove_duplicate=False))
    for name, parameter in case.student.named_parameters(remove_duplicate=False):
        if name in mine and not case.is_converted(name):
            flag = parameter.requires_grad
            require(flag == mine[name].requires_grad, f"{name} has requires_grad={flag}, unlike the model's")
    for fqn, _, owner, op in case.converted():
        besides = taken_along(fqn, owner, op)
        weights = [p for p in donors(fqn, owner) if p is not getattr(owner, "bias", None)]
        replaced = [p for p in weights if all(p is not other for other in besides.values())]
        expected = {"weight": any(p.requires_grad for p in replaced)}
        bias = owner._parameters.get("bias") if not owns(fqn, owner) else None
        expected["bias"] = bias.requires_grad if bias is not None else expected["weight"]
        expected |= {name: tensor.requires_grad for name, tensor in besides.items()}
        for name, parameter in op.named_parameters():
            kind = name if name in besides else "bias" if parameter is op.bias else "weight"
            message = f"{fqn}.{name} has requires_grad={parameter.requires_grad}, unlike the {kind} it replaced"
            require(parameter.requires_grad == expected[kind], message)


@model_law
def model_law_tensors(case: ModelCase) -> None:
    """Dtype, device and memory format are those of the model, tensor by tensor, and of the kernel that was replaced."""
    theirs = dict(_state(case.student))
    for name, value in _state(case.copy):
        if not case.is_converted(name) and isinstance(value, Tensor):
            mine, other = ((t.dtype, t.device, t.stride(), type(t)) for t in (value, theirs[name]))
            require(mine == other, f"{name} is {other}, the model's {mine}")
    for fqn, _, owner, op in case.converted():
        # of a copy: a parametrized weight is computed, and some write to their buffers then
        kernel = getattr(copy_of(owner), fqn.rpartition(".")[2] if owns(fqn, owner) else "weight")
        last = kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
        memory_format = torch.channels_last if last else torch.contiguous_format
        for name, value in op.state_dict().items():
            if name in taken_along(fqn, owner, op):
                continue
            dtype = value.dtype if value.is_floating_point() else kernel.dtype
            require(dtype == kernel.dtype, f"{fqn}.{name} is {dtype}, the kernel it replaced {kernel.dtype}")
            require(value.device == kernel.device, f"{fqn}.{name} is on {value.device}, the kernel on {kernel.device}")
            fits = value.dim() != 4 or value.is_contiguous(memory_format=memory_format)
            require(fits, f"{fqn}.{name} is not in {memory_format}, the kernel it replaced is")


@model_law
def model_law_hooks(case: ModelCase) -> None:
    """Hooks are kept in their order; those that only wrote the weight are gone with it."""
    expected = dict(case.copy.named_modules(remove_duplicate=False))
    for fqn, _, copied in case.untouched():
        _require_hooks(fqn or "the root", hooks_of(copied), hooks_of(expected[fqn]))
    for fqn, _, owner, op in case.converted():
        if not owns(fqn, owner):
            kinds = [kind for kind in hooks_of(owner) if "forward" in kind or "backward" in kind]
            kept = {kind: [h for h in hooks_of(owner)[kind] if not _writes_weights(h)] for kind in kinds}
            found = {kind: [h for h in hooks_of(op)[kind] if not isinstance(h, SamePadding)] for kind in kinds}
            _require_hooks(fqn, found, kept)


def _require_hooks(where: str, found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    for kind, hooks in expected.items():
        mine, theirs = ([_name_of(hook) for hook in some] for some in (hooks, found[kind]))
        require(mine == theirs, f"{where} has the {kind} {theirs}, the model's {mine}")


def _name_of(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _writes_weights(hook: Any) -> bool:
    """Whether it is one of torch's own, as pruning and the old weight norm leave them."""
    return type(hook).__module__.startswith("torch.nn.utils.")


@model_law
def model_law_attributes(case: ModelCase) -> None:
    """What was hung on a module besides weights is there, with equal values."""
    expected = dict(case.copy.named_modules(remove_duplicate=False))
    pairs = [(fqn, expected[fqn], copied, set[str]()) for fqn, _, copied in case.untouched()]
    pairs += [(fqn, owner, op, _OF_A_CONVOLUTION) for fqn, _, owner, op in case.converted() if not owns(fqn, owner)]
    for fqn, module, copied, others in pairs:
        theirs = dict(plain_attributes(copied))
        for name, value in plain_attributes(module):
            if name.partition("[")[0] in others or name.startswith("convsurgeon_record"):
                continue
            where = f"{fqn}.{name}".lstrip(".")
            require(name in theirs, f"{where} is missing in the student")
            equal = not isinstance(value, _PLAIN) or same(theirs[name], value)
            require(equal, f"{where} is {theirs[name]!r}, the model's {value!r}")
            has, had = type(theirs[name]), type(value)
            is_op = isinstance(theirs[name], AbstractCheapConv)
            require(has is had or is_op, f"{where} is a {has.__name__}, the model's a {had.__name__}")


@model_law
def model_law_reasons(case: ModelCase) -> None:
    """Every convolution has one decision, with a sentence that says why."""
    decided = [fqn for decision in case.plan.decisions for fqn in decision.fqns]
    require(len(set(decided)) == len(decided), f"the plan decides twice: {decided}")
    sites = {site.fqns for site in case.survey.sites}
    decisions = {decision.fqns for decision in case.plan.decisions}
    require(sites == decisions, f"the plan decides about {sorted(decisions)}, the survey found {sorted(sites)}")
    ops_held = [module for module in case.model.modules() if isinstance(module, AbstractCheapConv)]
    inside = {part for op in ops_held for part in op.modules()}
    names: dict[nn.Module, list[str]] = {}
    for path, value in holdings(case.model):
        if isinstance(value, _ConvNd) and value not in inside:
            names.setdefault(value, []).append(path)
    for paths in names.values():
        known = any(name in decided for path in paths for name in (path, f"{path}.weight".lstrip(".")))
        require(known, f"no decision about {' = '.join(paths)}")
    for decision in case.plan.decisions:
        said = decision.reason.strip()
        require(said != "" and len(said.splitlines()) == 1, f"{decision.fqn}: the reason is {decision.reason!r}")
        require(decision.label.strip() != "", f"{decision.fqn}: the label is {decision.label!r}")
