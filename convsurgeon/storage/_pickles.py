"""Reading what `torch.save` wrote. The only caller of `torch.load`."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from convsurgeon.errors import ConvSurgeonError, ModelError, UntrustedFileError, one_line
from convsurgeon.storage._admission import Admission, refusal
from convsurgeon.storage._kinds import Kind
from convsurgeon.storage._stand_ins import Inert, StandInError

_ALLOWED_IS_GLOBAL = threading.Lock()
_FROM_A_SCRIPT = re.compile(r"get attribute '(\w+)' on <module '__main__'")


def read_trusted(path: Path) -> Any:
    """Unpickle a file with whatever code it brings: the user has said so.

    Raises:
        ModelError: for whatever that code raises.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        if scripted := _FROM_A_SCRIPT.search(str(error)):
            raise refusal(path, [f"__main__.{scripted[1]}"]) from error
        raise ModelError(f"{path} cannot be loaded: {one_line(error)}") from error


def read_safely(path: Path, kind: Kind, *, trust_modules: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """Unpickle a file without running code of its choosing.

    Returns what it holds, and the names it used that are not admitted, in whose places are inert
    objects. With any such name, only tensors and plain data of the result are of use.

    Raises:
        UntrustedFileError: if it cannot be read under the allow-list.
        ModelError: if it is damaged.
    """
    if kind is Kind.LEGACY:
        return _read_legacy(path), []
    admission, refused = Admission(path, trust_modules), []
    with _only_allowed([]):
        names = _names_in(path)
    allowed: list[tuple[Callable[..., object], str]] = []
    for name in names:
        stand_in = admission.admit(name)
        if stand_in is None:
            refused.append(name)
        allowed.append((stand_in or Inert, name))
    try:
        with _only_allowed(allowed):
            found = torch.load(path, map_location="cpu", weights_only=True)
        found = admission.stand_ins.reveal(found)
    except ConvSurgeonError:
        raise
    except Exception as error:
        raise _unreadable(path, error, refused) from error
    if isinstance(found, nn.Module) and not refused:
        _check_tree(path, found)
    return found, refused


def _check_tree(path: Path, root: nn.Module) -> None:
    """Refuse modules whose parts are no parts: later code relies on what `nn.Module` would have seen to."""
    kinds = {"_parameters": nn.Parameter, "_buffers": torch.Tensor, "_modules": nn.Module}
    todo, seen = [root], {root}
    while todo:
        module = todo.pop()
        for attribute, kind in kinds.items():
            parts = module.__dict__.get(attribute)
            if not isinstance(parts, dict) or not all(p is None or isinstance(p, kind) for p in parts.values()):
                raise ModelError(f"{path} is damaged: a {type(module).__name__} in it has no proper {attribute}")
        children = {child for child in module._modules.values() if child is not None} - seen
        seen |= children
        todo += children


def _unreadable(path: Path, error: Exception, refused: Sequence[str]) -> ConvSurgeonError:
    if refused:
        return refusal(path, refused)
    if isinstance(error, StandInError):
        return UntrustedFileError(
            f"{path} {error}, which no ordinary model does; only if you know who made it: --trust"
        )
    if isinstance(error, pickle.UnpicklingError):
        return UntrustedFileError(
            f"{path} is pickled in a way that cannot be read safely; save it again with torch.save, as it is "
            "by default, or, only if you know who made it: --trust"
        )
    return ModelError(f"{path} is damaged ({one_line(error)}); copy or save it again")


def _names_in(path: Path) -> list[str]:
    """Return the dotted names of all globals in the file that torch itself does not know as harmless."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception as error:
        raise _unreadable(path, error, []) from error


def _read_legacy(path: Path) -> Any:
    try:
        with _only_allowed([]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UntrustedFileError(
            f"{path} is in PyTorch's format from before 1.6 and holds more than weights, which cannot be "
            "read safely; save it again with torch.save, or, only if you know who made it: --trust"
        ) from error
    except Exception as error:
        raise _unreadable(path, error, []) from error


@contextmanager
def _only_allowed(allowed: list[tuple[Callable[..., object], str]]) -> Iterator[None]:
    """Let torch admit these stand-ins and nothing else; what the caller's program admitted is put back."""
    with _ALLOWED_IS_GLOBAL:
        before = get_safe_globals()
        clear_safe_globals()
        add_safe_globals(allowed)  # type: ignore[arg-type]
        try:
            yield
        finally:
            clear_safe_globals()
            add_safe_globals(before)
