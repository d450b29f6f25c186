"""`load`: an architecture's name or a file becomes a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from convsurgeon.errors import ModelError, OptionError
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.record import has_damaged_record, read_record, update_record
from convsurgeon.storage._admission import Refused, refusal
from convsurgeon.storage._architectures import Architecture, parse_name
from convsurgeon.storage._building import build_with
from convsurgeon.storage._kinds import Kind, identify
from convsurgeon.storage._model_args import refuse_fetching
from convsurgeon.storage._pickles import read_safely, read_trusted
from convsurgeon.storage._programs import read_program
from convsurgeon.storage._students import read_student
from convsurgeon.storage._weights import read_weights
from convsurgeon.storage._whole_modules import choose_module

DEFAULT = "DEFAULT"


def load(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    trust: bool = False,
    trust_modules: Sequence[str] = (),
    weights_key: str | None = None,
    weights_prefix: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    report: Report = be_silent,
) -> nn.Module:
    """Return the model that a name or a file stands for, on the CPU.

    A file that exists wins over the reading as a name. A pickled module keeps its mode, and an exported
    program that of its export; a network built from a name is as its library builds it.

    Of a checkpoint that has several sets of weights, those are taken that the library which writes such
    files would take, the average before the raw ones, and `report` is told so. A state dict may lie under a
    prefix, such as `model.`, beside entries of losses, metrics or a second network.

    Args:
        source: `torchvision:NAME`, `timm:NAME`, `package.module:factory`, a pickled module, an
            exported program (`.pt2`), or a student that `save` wrote.
        weights: for a name, a file of weights, or `"DEFAULT"` for those of the library. Without,
            they are random, and `report` is told so.
        trust: run whatever code a file brings.
        trust_modules: modules, with all below them, whose `nn.Module` classes a file may use, and enumerations,
            plain objects and functions as values.
        weights_key: which entry of a checkpoint to take, dotted where it is nested (`"callbacks.EMA.state"`).
        weights_prefix: what stands before the network's own names in the weights (`"model."`).
        model_args: what the architecture is built with, such as `{"num_classes": 10}`.

    Raises:
        UnknownNameError: if there is no architecture of that name.
        OptionError: for arguments that do not go with the source.
        UntrustedFileError: if the file would run code that nobody has allowed.
        WeightsError: if the weights do not fit.
        ModelError: if the file is something else than a model.
    """
    if isinstance(trust_modules, str):
        trust_modules = (trust_modules,)
    refuse_fetching(model_args or {})
    architecture = None if isinstance(source, Path) or os.path.exists(source) else parse_name(source)
    if architecture is not None:
        args = dict(model_args or {})
        return _load_name(
            architecture, weights, args=args, key=weights_key, prefix=weights_prefix,
            trust=trust, trust_modules=trust_modules, report=report,
        )  # fmt: skip
    path = Path(source)
    given = {"--weights": weights, "--model-arg": model_args or None, "--weights-prefix": weights_prefix}
    if misplaced := [flag for flag, value in given.items() if value is not None]:
        raise OptionError(
            f"{misplaced[0]} goes with an architecture such as torchvision:resnet18, not with the file {path}"
        )
    return _load_file(path, key=weights_key, trust=trust, trust_modules=trust_modules, report=report)


def _load_name(
    architecture: Architecture,
    weights: str | Path | None,
    *,
    args: dict[str, Any],
    key: str | None,
    prefix: str | None,
    trust: bool,
    trust_modules: Sequence[str],
    report: Report,
) -> nn.Module:
    source = architecture.source
    if weights in (None, DEFAULT) and (key is not None or prefix is not None):
        flag = "--weights-key" if key is not None else "--weights-prefix"
        raise OptionError(f"{flag} is about a file of weights; give one: --weights FILE")
    if weights is None:
        model = architecture.build(args)
        report(Progress("load", message=f"{source} has random weights: no --weights was given"))
    elif weights == DEFAULT:
        if not architecture.has_default_weights:
            raise OptionError(f"{source} has no default weights; give a file: --weights FILE")
        model = architecture.build(args, pretrained=True)
    else:
        path = Path(weights)
        found = read_weights(path, trust=trust, trust_modules=trust_modules, key=key)
        built = build_with(architecture, args, found, prefix=prefix)
        remarks = list(built.remarks)
        if built.args != args:
            remarks.append(f"{source} was built with the {built.args['num_classes']} classes of {path}")
        for remark in remarks:
            report(Progress("load", message=remark))
        model, args = built.model, built.args
    facts = architecture.input_facts(model, args)
    if weights not in (None, DEFAULT) and "preprocessing" in facts:
        facts["preprocessing_of"] = source.partition(":")[0]
    update_record(model, source=_as_record(source, args), **facts)
    return model


def _as_record(source: str, args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record's `source`, or None where the arguments are Python objects that no file can name."""
    try:
        return {"name": source, "args": json.loads(json.dumps(args))}
    except (TypeError, ValueError):
        return None


def _load_file(path: Path, *, key: str | None, trust: bool, trust_modules: Sequence[str], report: Report) -> nn.Module:
    kind = identify(path)
    if key is not None and kind in (Kind.PROGRAM, Kind.SAFETENSORS):
        raise OptionError(f"--weights-key is about a checkpoint that holds several networks; {path} is {kind.value}")
    if kind is Kind.PROGRAM:
        return read_program(path, trust=trust, report=report)
    if kind is Kind.SAFETENSORS:
        return read_student(path, trust=trust, trust_modules=trust_modules)
    refused: Refused = {}
    if trust:
        found = read_trusted(path)
    else:
        found, refused = read_safely(path, kind, trust_modules=trust_modules)
    if not isinstance(found, nn.Module) or key is not None:
        whole = choose_module(path, found, refused, key=key)
        report(Progress("load", message=whole.remark))
        found = whole.module
    if refused:
        raise refusal(path, refused)
    if "source" not in _checked_record(path, found):
        update_record(found, source={"file": path.name})
    return found


def _checked_record(path: Path, model: nn.Module) -> dict[str, Any]:
    """Return the record that came with a pickle, which must be plain data like any other."""
    try:
        if has_damaged_record(model):
            raise TypeError("no dict")
        record = read_record(model)
        json.dumps(record)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} carries a record that is no plain data; save the model again") from error
    return record
