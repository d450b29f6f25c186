"""A student as name + plan + weights: one safetensors file, from which the architecture is built again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import ConvSurgeonError, ModelError, UntrustedFileError
from convsurgeon.record import read_record, update_record
from convsurgeon.storage._admission import is_under
from convsurgeon.storage._architectures import FactoryArchitecture, parse_name
from convsurgeon.storage._budget import Budget, refuse_absurd
from convsurgeon.storage._fitting import load_strictly
from convsurgeon.storage._layout import describe_layout, restore_layout, share_modules
from convsurgeon.storage._model_args import refuse_fetching
from convsurgeon.storage._safetensors import read_safetensors, write_safetensors
from convsurgeon.storage._texts import printable
from convsurgeon.storage._trees import check_record
from convsurgeon.storage._weights import only_weights
from convsurgeon.surgery import Plan, rebuild

_FORMAT, _VERSION = "convsurgeon-student", "2"
_READABLE = ("1", _VERSION)  # version 1 had no layout
_DAMAGED = "{path} is damaged: its record names no architecture; save the student again"


@dataclass(frozen=True)
class _Header:
    """What a student's file says beside its tensors."""

    record: dict[str, Any]
    name: str
    args: dict[str, Any]
    frozen: frozenset[str]
    layout: dict[str, Any] | None


def write_student(model: nn.Module, path: Path) -> None:
    """Write the tensors of a model that was built from a name, and its record.

    Raises:
        ModelError: if the model is another by now than the one that its name and its plan make.
    """
    layout = describe_layout(model)
    _check_that_it_is_what_its_name_says(model, layout, path)
    tensors = dict(model.state_dict())
    if strange := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ModelError(f"{strange[0]} of {type(model).__name__} is no tensor; save it as a pickled module (.pt)")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    record = read_record(model)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "record": json.dumps({key: record[key] for key in sorted(record)}),
        "frozen": json.dumps(frozen),
        "layout": json.dumps(layout),
    }
    write_safetensors(path, tensors, metadata)


def _check_that_it_is_what_its_name_says(model: nn.Module, layout: Mapping[str, Any], path: Path) -> None:
    """Build the architecture anew, and compare every module's class and description with the model's."""
    source = read_record(model)["source"]
    fresh = _rebuilt(model, source, layout, path)
    theirs = {fqn: _description(module) for fqn, module in fresh.named_modules(remove_duplicate=False)}
    mine = {fqn: _description(module) for fqn, module in model.named_modules(remove_duplicate=False)}
    for fqn in dict.fromkeys([*mine, *theirs]):
        if mine.get(fqn) != theirs.get(fqn):
            raise ModelError(
                f"the model is no longer what {source['name']} builds: {fqn or '(root)'} is {mine.get(fqn) or 'gone'}, "
                f"there {theirs.get(fqn) or 'nothing'}; save it as a pickled module (.pt)"
            )


def _rebuilt(model: nn.Module, source: Mapping[str, Any], layout: Mapping[str, Any], path: Path) -> nn.Module:
    architecture = parse_name(source["name"])
    if architecture is None:
        raise ModelError(f"{source['name']!r}, which this {type(model).__name__} remembers, is no architecture")
    plan = read_record(model).get("plan")
    for device in ("meta", "cpu"):  # without memory, if the architecture can be built so
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fresh = architecture.build(dict(source.get("args", {})))
                share_modules(path, fresh, layout)
                return fresh if plan is None else rebuild(fresh, Plan.from_dict(plan))
        except Exception:
            if device == "cpu":
                raise
    raise AssertionError("the last attempt returns or raises")


def _description(module: nn.Module) -> str:
    return f"{type(module).__qualname__}({module.extra_repr()})"


def read_student(path: Path, *, trust: bool, trust_modules: Sequence[str]) -> nn.Module:
    """Build the architecture that the file names, carry out its plan, and load its weights.

    Raises:
        UntrustedFileError: if the architecture is code that nobody has allowed.
        ModelError: if the file is damaged, of a later version, or holds only weights.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        raise only_weights(path)
    if (version := metadata.get("version")) not in _READABLE:
        raise ModelError(
            f"{path} has version {printable(version)} of the student format, and this convsurgeon "
            f"reads version {_VERSION}; install a newer one"
        )
    header = _parse(path, metadata)
    held = sum(tensor.nbytes for tensor in tensors.values())
    with Budget(path, held), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initial values, which are overwritten
        model = _build(path, header.name, header.args, trust=trust, trust_modules=trust_modules)
        if header.layout is not None:
            share_modules(path, model, header.layout)
        if "plan" in header.record:
            model = _carry_out(path, model, header.record["plan"])
    _take_dtypes(model, tensors)
    load_strictly(model, tensors, where=str(path))
    if header.layout is not None:
        restore_layout(path, model, header.layout)
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(parameter_name not in header.frozen)
    update_record(model, **header.record)
    return model


def _parse(path: Path, metadata: Mapping[str, str]) -> _Header:
    try:
        record = json.loads(metadata["record"])
        source = record["source"]
        name, args = source["name"], source.get("args", {})
        frozen = json.loads(metadata.get("frozen", "[]"))
        layout = json.loads(metadata["layout"]) if metadata["version"] != "1" else None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(_DAMAGED.format(path=path)) from error
    if not (isinstance(name, str) and isinstance(args, dict) and isinstance(frozen, list)):
        raise ModelError(_DAMAGED.format(path=path))
    if layout is not None and not (isinstance(layout, dict) and isinstance(layout.get("modules"), dict)):
        raise ModelError(f"{path} is damaged: it does not say how its tensors lie; save the student again")
    check_record(path, record)
    refuse_absurd(path, args)
    return _Header(record, name, args, frozenset(map(str, frozen)), layout)


def _build(path: Path, name: str, args: Mapping[str, Any], *, trust: bool, trust_modules: Sequence[str]) -> nn.Module:
    architecture = parse_name(name)
    if architecture is None:
        raise ModelError(f"{path} is damaged: {printable(repr(name))} in its record is no architecture")
    if isinstance(architecture, FactoryArchitecture):
        module = architecture.module
        if not trust and not any(is_under(module, prefix) for prefix in trust_modules):
            raise UntrustedFileError(
                f"{path} is built by {name}, which is code not yet allowed; "
                f"if you trust that code: --trust-module {module}, or --trust"
            )
    try:
        refuse_fetching(args)
        return architecture.build(args)
    except ConvSurgeonError as error:
        raise _in_file(path, error) from error


def _carry_out(path: Path, model: nn.Module, plan: Any) -> nn.Module:
    try:
        return rebuild(model, Plan.from_dict(plan))
    except ConvSurgeonError as error:
        raise _in_file(path, error) from error
    except Exception as error:  # a plan that fits in form, and has sizes that torch or an op cannot take
        raise ModelError(f"{path} is damaged: its plan cannot be carried out; save the student again") from error


def _take_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give each parameter and buffer the dtype it was saved with; what is not saved follows the others."""
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        model.to(floating.pop())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tensors and tensor.dtype != tensors[name].dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)


def _in_file(path: Path, error: ConvSurgeonError) -> ModelError:
    """Return an error about what a file says, which names the file."""
    said = str(error)
    return error if isinstance(error, ModelError) and str(path) in said else ModelError(f"{path}: {said}")
