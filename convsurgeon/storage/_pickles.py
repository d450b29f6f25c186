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
from convsurgeon.storage._admission import Admission, Refused, refusal, why_refused
from convsurgeon.storage._archives import DamageError, read_archive
from convsurgeon.storage._kinds import Kind
from convsurgeon.storage._stand_ins import Inert, StandInError
from convsurgeon.storage._storages import Uses, proofread_archive, proofread_legacy
from convsurgeon.storage._texts import printable
from convsurgeon.storage._trees import check_tree

_MOST_EXPLAINED = 50
Allowed = list[tuple[Callable[..., object], str]]

_ALLOWED_IS_GLOBAL = threading.Lock()
_FROM_A_SCRIPT = re.compile(r"get attribute '(\w+)' on <module '(?:[\w.]+\.)?__main__'")


def read_trusted(path: Path) -> Any:
    """Unpickle a file with whatever code it brings: the user has said so.

    Raises:
        ModelError: for whatever that code raises.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        if scripted := _FROM_A_SCRIPT.search(str(error)):
            raise refusal(path, {f"__main__.{scripted[1]}": None}) from error
        raise ModelError(f"{path} cannot be loaded: {one_line(error)}") from error


def read_safely(path: Path, kind: Kind, *, trust_modules: Sequence[str] = ()) -> tuple[Any, Refused]:
    """Unpickle a file without running code of its choosing.

    Returns what it holds, and the names it used that are not admitted, with reasons; in their places are inert
    objects. With any such name, only tensors and plain data of the result are of use.

    Raises:
        UntrustedFileError: if it cannot be read under the allow-list.
        ModelError: if it is damaged.
    """
    if kind is Kind.LEGACY:
        return _read_legacy(path), {}
    admission = Admission(path, trust_modules)
    names, uses = _proofread(path)
    allowed, refused = _admit(admission, names, uses)
    try:
        with _only_allowed(allowed):
            found = torch.load(path, map_location="cpu", weights_only=True)
        found = admission.stand_ins.reveal(found)
    except ConvSurgeonError:
        raise
    except Exception as error:
        raise _unreadable(path, error, refused) from error
    if isinstance(found, nn.Module) and not refused:
        check_tree(path, found)
    return found, refused


def _proofread(path: Path) -> tuple[list[str], Uses]:
    """Return the dotted names of all globals that torch does not know as harmless, and what is done with them."""
    try:
        archive = read_archive(path)
        with _only_allowed([]):
            names = sorted(get_unsafe_globals_in_checkpoint(path))
        return names, proofread_archive(archive, frozenset(names))
    except Exception as error:  # whatever zipfile and torch make of damaged bytes
        raise _unreadable(path, error, {}) from error


def _admit(admission: Admission, names: Sequence[str], uses: Uses) -> tuple[Allowed, Refused]:
    """Return the stand-ins of all names for torch, and the names that are refused."""
    allowed: Allowed = []
    refused: Refused = {}
    for name in names:
        stand_in = admission.admit(name)
        if stand_in is None:
            # a file could name modules by the thousand, and some are looked up in their source
            refused[name] = why_refused(name, uses.calls.get(name)) if len(refused) < _MOST_EXPLAINED else ""
        allowed.append((stand_in or Inert, name))
    for owner, attribute in uses.lookups:
        if (nested := admission.admit_nested(owner, attribute)) and callable(nested):
            allowed.append((nested, f"{owner}.{attribute}"))
    return allowed, refused


def _unreadable(path: Path, error: Exception, refused: Refused) -> ConvSurgeonError:
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
    said = str(error) if isinstance(error, DamageError) else one_line(error)
    return ModelError(f"{path} is damaged ({printable(said)}); copy or save it again")


def _read_legacy(path: Path) -> Any:
    try:
        proofread_legacy(path)
        with _only_allowed([]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, StandInError) as error:
        raise UntrustedFileError(
            f"{path} is in PyTorch's format from before 1.6 and holds more than weights, which cannot be "
            "read safely; save it again with torch.save, or, only if you know who made it: --trust"
        ) from error
    except Exception as error:
        raise _unreadable(path, error, {}) from error


@contextmanager
def _only_allowed(allowed: Allowed) -> Iterator[None]:
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
