"""Copies to look at, so that the caller's model is never touched."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from convsurgeon.errors import SurveyError, one_line
from convsurgeon.record import read_record, update_record
from convsurgeon.surgery._marks import copy_marks

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
_REGISTRIES = (OrderedDict, dict, set)  # of parameters, of hooks, of names
ExampleInputs = Tensor | tuple[Any, ...] | dict[str, Any]


def expect_module(model: Any) -> None:
    """Raise, with what to do, if what was given as a model is none.

    Raises:
        SurveyError: for a state dict, a class, or anything else.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, Mapping):
        raise SurveyError(
            f"a model is an nn.Module, got a {type(model).__name__}, which holds weights and no network; "
            "build the model and call its load_state_dict"
        )
    if isinstance(model, type):
        raise SurveyError(f"a model is an nn.Module, got the class {model.__name__} itself; give an instance of it")
    raise SurveyError(f"a model is an nn.Module, got {type(model).__name__}")


def shadow(model: nn.Module, *, as_it_is: bool = False) -> nn.Module:
    """Return a copy to trace, hook and run, in eval mode, or in the modes that the model is in.

    Some networks write to their weights in forward (max-norm constraints do), and lazy layers make them
    there, so it shares none. A parameter's memory is copied when one of the two is written to, and not
    before; buffers, which are small and often written to, at once.

    Raises:
        SurveyError: if the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    sharing = {id(parameter) for group in sharing_storage(model) for parameter in group}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and id(parameter) not in sharing and _may_be_copied_on_write(parameter):
            memo[id(parameter)] = nn.Parameter(parameter.detach()._lazy_clone(), parameter.requires_grad)
    copied = copy_module(model, memo)
    return copied if as_it_is else in_mode(copied, training=False)


def in_mode(module: M, *, training: bool) -> M:
    """Return a module in train or eval mode: a `train()` of its own may forget to return it, or draw at random."""
    with untouched_random_state():
        if training:
            module.train()
        else:
            module.eval()
    return module


def _may_be_copied_on_write(tensor: Tensor) -> bool:
    """Whether a lazy clone is safe: a write to one ends the process where torch has no allocator for the memory.

    That is so for what `torch.load` reads from a file, for mapped files, numpy's memory, and the like;
    memory shared between processes has none that can be copied either.
    """
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().resizable() and not tensor.is_shared()  # type: ignore[no-untyped-call]


def sharing_storage(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters that are several objects over one storage, as `Parameter(other.weight)` makes them."""
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and not parameter.is_meta
        if plain and parameter.numel():
            groups.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)
    return [group for group in groups.values() if len(group) > 1]


def copy_module(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return `copy.deepcopy(model, memo)`, with one clear line where that fails.

    Results of computations that hang on a module, such as a pruned weight, are copied without their history;
    attributes of parameters, such as `weight.no_decay`, are kept, which deepcopy loses.

    Raises:
        SurveyError: if the model cannot be copied.
    """
    memo = {} if memo is None else memo
    for group in sharing_storage(model):
        storage = group[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
        for parameter in group:
            # deepcopy would give each a storage of its own
            view = (
                parameter.new_empty(0)
                .detach()
                .set_(storage, parameter.storage_offset(), parameter.size(), parameter.stride())
            )
            memo.setdefault(id(parameter), nn.Parameter(view, parameter.requires_grad))
    # what stands in the memo already is replaced, with all that is inside
    gone = {part for module in model.modules() if id(module) in memo for part in module.modules()}
    copied = [module for module in model.modules() if module not in gone]
    for module in copied:
        _copy_parts(module, memo)
    with untouched_random_state():  # a __deepcopy__ of the model's own may build itself anew
        for module in copied:
            for parameter in module.parameters(recurse=False):
                if vars(parameter):
                    copy_marks(parameter, memo)
        result = copy_value(model, memo, owner=type(model).__name__)
    update_record(result, **{**read_record(model), **read_record(result)})  # a GraphModule leaves it behind
    _refuse_to_share(model, result)
    _refuse_ids(model, result)
    return result


def _refuse_to_share(model: nn.Module, copied: nn.Module) -> None:
    """Raise if a copy holds a module or a parameter of the model itself: whatever is done to one is done to both."""
    mine = {id(part): fqn for fqn, part in (*model.named_modules(), *model.named_parameters())}
    for _, part in (*copied.named_modules(), *copied.named_parameters()):
        if id(part) in mine:
            what = mine[id(part)] or "(root)"
            raise SurveyError(
                f"{type(model).__name__} cannot be copied: the copy shares {what} with it, as a __deepcopy__ that "
                "returns what it should copy makes it; let it copy its submodules and parameters"
            )


def _refuse_ids(model: nn.Module, copied: nn.Module) -> None:
    """Raise if a copy still looks things up by the `id()` of the model's parts: its own have others."""
    mine = {id(part): fqn for fqn, part in (*model.named_modules(), *model.named_parameters())}
    for fqn, module in copied.named_modules():
        for name, value in vars(module).items():
            ids = [key for key in value if type(key) is int and key in mine] if isinstance(value, (dict, set)) else ()
            for key in ids:
                raise SurveyError(
                    f"{type(model).__name__} cannot be copied: {f'{fqn}.{name}'.lstrip('.')} holds the id() of "
                    f"{mine[key] or '(root)'}, and a copy has other ids; use the module itself as key, or its name"
                )


def _copy_parts(module: nn.Module, memo: dict[Any, Any]) -> None:
    """Copy into a memo what deepcopy is slow at, or bad at: plain tensors, empty registries, results with a history."""
    for parameter in module._parameters.values():
        if type(parameter) is nn.Parameter and parameter.layout is torch.strided and id(parameter) not in memo:
            copied = parameter.detach().clone()
            memo[id(parameter)] = nn.Parameter(copied, parameter.requires_grad)
            if parameter.numel() * parameter.element_size() == parameter.untyped_storage().nbytes():
                # a plain attribute may be a view of it
                memo.setdefault("torch", {})[parameter.untyped_storage()._cdata] = copied.untyped_storage()
    for value in (*module._buffers.values(), *vars(module).values()):
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
            elif id(value) not in memo and _is_plain(value):
                _copy_storage(value, memo)
        elif type(value) in _REGISTRIES and not value:
            # every module has ten or more
            memo.setdefault(id(value), type(value)())


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is no more than a whole storage, read in its own order."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_meta or vars(tensor))
        and tensor.is_contiguous()
        and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    )


def _copy_storage(tensor: Tensor, memo: dict[Any, Any]) -> None:
    """Copy a plain tensor, and leave word where deepcopy looks: another tensor may be a view of the same storage."""
    storages = memo.setdefault("torch", {})
    key = tensor.untyped_storage()._cdata
    if key not in storages:
        memo[id(tensor)] = tensor.clone()
        storages[key] = memo[id(tensor)].untyped_storage()


def copy_value(value: T, memo: dict[int, Any], *, owner: str) -> T:
    """Return `copy.deepcopy(value, memo)`, with one clear line where that fails.

    Raises:
        SurveyError: if it cannot be copied.
    """
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        if isinstance(value, nn.Module) and any(map(is_lazy, (*value.parameters(), *value.buffers()))):
            raise SurveyError(f"{owner} has lazy layers, which have no weights yet; run it once first") from error
        raise SurveyError(
            f"{owner} cannot be copied ({one_line(error)}); "
            "a student is a copy, so give the model a __deepcopy__ or remove what cannot be copied"
        ) from error


def call(
    model: nn.Module, example_inputs: ExampleInputs, watch: contextlib.AbstractContextManager[Any] | None = None
) -> Any:
    """Run a model on a copy of a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Args:
        watch: what is entered round the run.
    """
    inputs = pytree.tree_map_only(Tensor, torch.clone, example_inputs)
    # a compiled model would compile the watch, too
    eager: Any = (
        torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    )
    with torch.no_grad(), untouched_random_state(), eager, watch or contextlib.nullcontext():
        if isinstance(inputs, tuple):
            output = model(*inputs)
        else:
            output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        # a generator has done nothing yet
        return list(output) if isinstance(output, Iterator) else output


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Put the global random states of torch, numpy and Python back: a forward may draw from them."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(cuda)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
