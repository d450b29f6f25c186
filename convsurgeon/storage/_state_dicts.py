"""Where a checkpoint keeps its weights: state dicts and whole modules under the names that libraries use.

Averaged weights come before raw ones, as in what loads these files: timm takes `state_dict_ema` and
`model_ema` first, Ultralytics `ema`, Real-ESRGAN `params_ema`, DINO `teacher`. MMEngine writes the average
under `state_dict` and the raw weights under `ema_state_dict`, so there it is the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convsurgeon.errors import ModelError, OptionError, did_you_mean
from convsurgeon.storage._stand_ins import Inert
from convsurgeon.storage._texts import printable
from convsurgeon.storage._trees import check_tree

AVERAGED = (
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "model_state_dict_ema", "ema_model"),
    *("model_ema_state_dict", "ema_model_state_dict", "ema_weights", "net_ema", "ema_net", "g_ema", "teacher"),
)
RAW = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params"),
    *("model_weights", "net_state_dict", "student", "current_model_state"),
)
_AVERAGE = re.compile(r"(^|_)(ema|swa|averaged?|shadow)(_|$)")
_DEPTH = 2
_MOST_SHOWN = 8
_MOST_PARTS = 100_000  # a module that is shared counts for each of its names

StateDict = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Entry:
    """One place in a checkpoint that holds weights.

    Args:
        key: where it lies, dotted; empty for the whole file.
        value: a state dict, a whole module, or an `Inert` that stands for an object of a class not allowed.
        rank: what its library would take first has the least.
    """

    key: str
    value: Any
    rank: tuple[int, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether it lies where libraries put a network's weights."""
        return self.rank < (2,)

    @property
    def is_averaged(self) -> bool:
        """Whether its name says that these weights are averages over the steps of a training run."""
        return self.rank[:1] == (0,)

    @property
    def is_unread(self) -> bool:
        """Whether it is of a class that nobody has allowed."""
        return isinstance(self.value, Inert)

    def state_dict(self, path: Path) -> StateDict:
        """Return the weights, as `nn.Module.state_dict` would give them.

        Raises:
            ModelError: if they are a module's whose parts are none.
        """
        return read_tensors(path, self.value) if isinstance(self.value, nn.Module) else dict(self.value)


def list_entries(found: Any) -> list[Entry]:
    """Return all places with weights in what a file held, down to two levels, in the order of preference."""
    turned = isinstance(found, dict) and "message_hub" in found  # MMEngine
    entries = [Entry(".".join(keys), value, _rank(keys, turned=turned)) for keys, value in _walk(found, (), set())]
    return sorted(entries, key=lambda entry: entry.rank)


def choose_entry(path: Path, found: Any, key: str) -> list[Entry]:
    """Return what lies under the key that the user gave, in the order of preference.

    Raises:
        OptionError: if there is no such key, or no weights under it.
    """
    try:
        value = _look_up(found, key)
    except KeyError:
        known = _list_keys(found)
        shown = ", ".join(map(printable, known[:_MOST_SHOWN])) + (", ..." if len(known) > _MOST_SHOWN else "")
        raise OptionError(
            f"--weights-key {printable(key)}: {path} has no such key.{did_you_mean(key, known)} "
            f"It has: {shown or 'none, it holds the weights themselves; leave out --weights-key'}"
        ) from None
    entries = [Entry(f"{key}.{entry.key}".rstrip("."), entry.value, entry.rank) for entry in list_entries(value)]
    if not entries:
        where = ", ".join(printable(entry.key) for entry in list_entries(found)) or "nowhere"
        raise OptionError(
            f"--weights-key {printable(key)}: {path} has a {type(value).__name__} there, no state dict; "
            f"weights are under: {where}"
        )
    return entries


def read_tensors(path: Path, module: nn.Module) -> StateDict:
    """Return the state dict of a module out of a file without calling anything of it: hooks can be what a file likes.

    Raises:
        ModelError: if its parts are none, or it holds itself.
    """
    check_tree(path, module)
    found: StateDict = {}
    for count, (prefix, part) in enumerate(_paths(module, "")):
        if count > _MOST_PARTS:
            raise ModelError(f"{path} is damaged: its modules hold one another too often")
        skipped = part.__dict__.get("_non_persistent_buffers_set", ())
        tensors = {
            **part._parameters,
            **{name: tensor for name, tensor in part._buffers.items() if name not in skipped},
        }
        found |= {f"{prefix}{name}": tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    return found


def _paths(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    for name, part in module._modules.items():
        if part is not None:
            yield from _paths(part, f"{prefix}{name}.")


def _walk(found: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every place with weights once, what is known first: a file can hold one object under many names."""
    if id(found) in seen:
        return
    seen.add(id(found))
    if isinstance(found, nn.Module | Inert) or is_state_dict(found):
        yield keys, found
    elif isinstance(found, dict) and len(keys) < _DEPTH:
        names = sorted((key for key in found if type(key) is str), key=lambda key: _rank((key,)))
        for name in names:
            yield from _walk(found[name], (*keys, name), seen)


def is_state_dict(found: Any) -> bool:
    """Whether something is a dict of names and tensors, and has any."""
    return (
        isinstance(found, dict)
        and bool(found)
        and all(type(key) is str and isinstance(value, Tensor) for key, value in found.items())
    )


def _rank(keys: Sequence[str], *, turned: bool = False) -> tuple[int, ...]:
    """Return 0 and the place in the list for averages, 1 and so on for raw weights, 2 for whatever else."""
    averaged = [_place(key) for key in keys if key in AVERAGED or _AVERAGE.search(key.lower())]
    if any(key not in RAW and key not in AVERAGED and not _AVERAGE.search(key.lower()) for key in keys):
        return (2,)
    if averaged and not turned:
        return (0, *averaged)
    return (1, *(len(RAW) if key not in RAW else RAW.index(key) for key in keys))


def _place(key: str) -> int:
    return AVERAGED.index(key) if key in AVERAGED else len(AVERAGED)


def _look_up(found: Any, key: str) -> Any:
    """Return what lies under a dotted key, whose parts can have dots themselves."""
    if not isinstance(found, dict):
        raise KeyError(key)
    names = {str(name): value for name, value in found.items() if type(name) in (str, int)}
    if key in names:
        return names[key]
    for name, value in names.items():
        if isinstance(value, dict) and key.startswith(f"{name}."):
            try:
                return _look_up(value, key[len(f"{name}.") :])
            except KeyError:
                continue
    raise KeyError(key)


def _list_keys(found: Any) -> list[str]:
    """Return the keys with weights first, then all of the first level."""
    names = [] if not isinstance(found, dict) or is_state_dict(found) else [name for name in found if type(name) is str]
    return list(dict.fromkeys([*(entry.key for entry in list_entries(found) if entry.key), *names]))
