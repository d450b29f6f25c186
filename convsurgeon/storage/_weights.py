"""Weights into an architecture: find the state dict, infer the number of classes, load strictly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import ConvSurgeonError, ModelError, WeightsError, one_line
from convsurgeon.storage._admission import refusal
from convsurgeon.storage._architectures import Architecture
from convsurgeon.storage._kinds import Kind, identify
from convsurgeon.storage._pickles import read_safely, read_trusted
from convsurgeon.storage._programs import read_program
from convsurgeon.storage._safetensors import read_safetensors
from convsurgeon.storage._texts import printable

_NESTED_UNDER = ("state_dict", "model", "model_state_dict", "ema")
_WRAPPERS = ("module.", "_orig_mod.")
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)")

StateDict = dict[str, Tensor]


def read_weights(path: Path, *, trust: bool, trust_modules: Sequence[str]) -> StateDict:
    """Read the state dict out of a file, however it is nested; that of a pickled module or exported program counts too.

    Raises:
        UntrustedFileError: for a pickled module whose class nobody has allowed.
        WeightsError: if there is no state dict in it.
        ModelError: if it is no file of that kind.
    """
    kind = identify(path)
    if kind is Kind.SAFETENSORS:
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") == "convsurgeon-student" and '"plan"' in metadata.get("record", ""):
            raise WeightsError(
                f"{path} is a whole student, not only weights; give it by itself: convsurgeon ... {path}"
            )
        return tensors
    if kind is Kind.PROGRAM:
        return dict(read_program(path, trust=trust).state_dict())
    refused: list[str] = []
    if trust:
        found = read_trusted(path)
    else:
        found, refused = read_safely(path, kind, trust_modules=trust_modules)
    state = find_state_dict(found, modules=not refused)
    if state is None and refused:
        raise refusal(path, refused)
    if state is None:
        raise WeightsError(
            f"{path} holds {describe(found)}, and no state dict under {', '.join(_NESTED_UNDER)}; "
            "save model.state_dict() with torch.save"
        )
    if empty := next((name for name, value in state.items() if value.is_meta), None):
        raise WeightsError(f"{path} holds no numbers for {printable(empty)}, which is on the meta device")
    return state


def find_state_dict(found: Any, *, modules: bool = True, depth: int = 2) -> StateDict | None:
    """Return the state dict in what a file held, up to `depth` levels down, or None."""
    if modules and isinstance(found, nn.Module):
        found = found.state_dict()
    if not isinstance(found, Mapping) or not found:
        return None
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        return dict(found)
    if depth == 0:
        return None
    nested = (find_state_dict(found.get(key), modules=modules, depth=depth - 1) for key in _NESTED_UNDER)
    return next((state for state in nested if state is not None), None)


def describe(found: Any) -> str:
    """Say what a file held: its type, and a dict's keys."""
    if isinstance(found, Mapping):
        keys = ", ".join(printable(str(key)[:40]) for key in list(found)[:5])
        return f"a {type(found).__name__} with the keys {keys}" if keys else f"an empty {type(found).__name__}"
    return f"a {type(found).__name__}"


def build_with(
    architecture: Architecture, args: Mapping[str, Any], state: StateDict, *, where: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network, with as many classes as the weights have, and load them strictly.

    Returns the network and the arguments it was built with.

    Raises:
        WeightsError: counting and naming the entries that do not fit.
    """
    used = dict(args)
    model = architecture.build(used)
    gaps, state = _compare(model, state)
    if gaps.only_sizes and "num_classes" not in used and architecture.takes_num_classes():
        for count in _guess_classes(gaps, architecture.count_classes(model)):
            try:
                candidate = architecture.build({**used, "num_classes": count})
            except ConvSurgeonError:  # a guess that this network cannot take
                continue
            if not _compare(candidate, state)[0]:
                model, used, gaps = candidate, {**used, "num_classes": count}, Gaps()
                break
    if gaps:
        raise WeightsError(f"{where} does not fit {architecture.source}: {gaps}")
    load_strictly(model, state, where=where)
    return model, used


def load_strictly(model: nn.Module, state: StateDict, *, where: Path) -> None:
    """Copy every tensor into the model, whose names and sizes must be the same.

    Raises:
        WeightsError: counting and naming the entries that do not fit.
    """
    gaps, state = _compare(model, state)
    if gaps:
        raise WeightsError(f"{where} does not fit {type(model).__name__}: {gaps}")
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:  # a module's own hooks
        raise WeightsError(f"{where} does not fit {type(model).__name__}: {printable(one_line(error))}") from error


@dataclass(frozen=True)
class Gaps:
    """How a state dict differs from the one that a model has; false if it does not."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[tuple[str, torch.Size, torch.Size], ...] = ()
    """Name, size in the file, size in the model."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.resized)

    @property
    def only_sizes(self) -> bool:
        """Whether all names agree, and only the first axis of some tensors does not."""
        return (
            bool(self.resized)
            and not (self.missing or self.unexpected)
            and all(len(file) == len(model) > 0 and file[1:] == model[1:] for _, file, model in self.resized)
        )

    def __str__(self) -> str:
        sizes = [
            f"{name}: {_size(file)} in the file, {_size(model)} in the model" for name, file, model in self.resized
        ]
        parts = {"missing": self.missing, "unexpected": self.unexpected, "of another size": sizes}
        return ", ".join(
            f"{len(names)} {what} ({', '.join(map(printable, names[:3]))}{', ...' if len(names) > 3 else ''})"
            for what, names in parts.items()
            if names
        )


def _compare(model: nn.Module, state: StateDict) -> tuple[Gaps, StateDict]:
    """Return what does not fit, and the state dict under the names it has in the model.

    Wrappers' prefixes go, and so do the names of densenets and the missing batch counters in
    files from before 2018, which torchvision's own files still have.
    """
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    state = _renamed(_unwrapped(state, own), own)
    state |= {key: own[key] for key in own.keys() - state.keys() if key.endswith("num_batches_tracked")}
    return Gaps(
        missing=tuple(key for key in own if key not in state),
        unexpected=tuple(key for key in state if key not in own),
        resized=tuple(
            (key, state[key].shape, own[key].shape)
            for key in own
            if key in state and state[key].shape != own[key].shape
        ),
    ), state


def _unwrapped(state: StateDict, own: Mapping[str, Tensor]) -> StateDict:
    for prefix in _WRAPPERS * 2:
        if all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _renamed(state: StateDict, own: Mapping[str, Tensor]) -> StateDict:
    names = {key: _OLD_DENSENET.sub(r"\1\2", key) for key in state if key not in own}
    return {names[key] if names.get(key) in own else key: value for key, value in state.items()}


def _guess_classes(gaps: Gaps, default: int | None) -> Iterator[int]:
    """Yield likely numbers of classes, at most four: heads have one output per class, or a multiple."""
    guesses = [file[0] for _, file, _ in gaps.resized]
    if default:
        guesses += [file[0] * default // model[0] for _, file, model in gaps.resized if model[0]]
    yield from [guess for guess in dict.fromkeys(sorted(guesses)) if guess > 0][:4]


def _size(shape: torch.Size) -> str:
    return "x".join(str(length) for length in shape) or "scalar"


def only_weights(path: Path) -> ModelError:
    """Return the error for a state dict where a model was expected."""
    return ModelError(
        f"{path} holds only weights, no architecture; name the one they are of, such as mynet:Net or "
        f"torchvision:resnet18: convsurgeon convert mynet:Net --weights {path}"
    )
