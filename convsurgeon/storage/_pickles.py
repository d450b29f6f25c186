"""Reading what `torch.save` wrote. The only caller of `torch.load`."""

from __future__ import annotations

import pickle
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


def read_trusted(path: Path) -> Any:
    """Unpickle a file with whatever code it brings: the user has said so.

    Raises:
        ModelError: for whatever that code raises.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        if "__main__" in str(error):
            raise refusal(path, [f"__main__.{getattr(error, 'name', None) or 'Net'}"]) from error
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
    if isinstance(found, nn.Module) and any(admission.stand_ins.unfinished(part) for part in found.modules()):
        raise UntrustedFileError(f"{path} holds a module without its state; save the model again")
    return found, refused


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
