"""The weights in a file: which there are, and which its library would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from convsurgeon.errors import ModelError, WeightsError
from convsurgeon.storage._admission import Refused, name_flags, refusal
from convsurgeon.storage._kinds import Kind, identify
from convsurgeon.storage._pickles import read_safely, read_trusted
from convsurgeon.storage._programs import read_program
from convsurgeon.storage._safetensors import read_safetensors
from convsurgeon.storage._state_dicts import Entry, choose_entry, list_entries
from convsurgeon.storage._texts import printable


@dataclass(frozen=True)
class Weights:
    """What a file has to offer: places with weights in the order of preference, and those that were not read.

    Args:
        others: keys of places that are not tried, since a name there says nothing.
    """

    path: Path
    entries: tuple[Entry, ...]
    unread: tuple[Entry, ...] = ()
    refused: Mapping[str, str | None] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def where(self, entry: Entry) -> str:
        """Return the file's name, with the place in it where there are several."""
        alone = len(self.entries) + len(self.unread) + len(self.others) == 1
        return str(self.path) if alone or not entry.key else f"{self.path} ({printable(entry.key)})"

    def say_taken(self, taken: Entry, misfit: str | None, *, fitting: Sequence[Entry]) -> str | None:
        """Say which of several was taken, and how to take another that fits; None where there was no choice."""
        rest = [entry for entry in (*self.entries, *self.unread) if entry is not taken]
        if not rest:
            return None
        if self.unread and self.unread[0].rank < taken.rank:
            misfit = misfit or f"{self.unread[0].key} is of a class not yet allowed: {name_flags(self.refused)}"
        choice = [entry for entry in rest if entry in fitting or entry in self.unread]
        if misfit is None and not choice:
            keys = " and ".join(printable(entry.key) for entry in (taken, *rest))
            return f"{self.path} holds {keys}; {printable(taken.key)} was loaded, the only one that fits"
        return say_choice(self.path, taken, rest if misfit else choice, because=misfit)


def read_weights(path: Path, *, trust: bool, trust_modules: Sequence[str], key: str | None = None) -> Weights:
    """Find the weights in a file, however they are nested; those of a whole module or exported program count too.

    Args:
        key: where they are, if the user says it.

    Raises:
        UntrustedFileError: for a pickled module whose class nobody has allowed.
        WeightsError: if there is no state dict in it.
        OptionError: if there is none under `key`.
        ModelError: if it is no file of that kind.
    """
    found, refused = _read(path, trust=trust, trust_modules=trust_modules)
    entries = list_entries(found) if key is None else choose_entry(path, found, key)
    # what refused objects have become is of no use, and neither is a module that may hold one
    unread = [entry for entry in entries if entry.is_unread or (refused and isinstance(entry.value, nn.Module))]
    readable = [entry for entry in entries if entry not in unread]
    known = [entry for entry in readable if entry.is_known]
    if refused and not (known or (readable and not any(entry.is_known for entry in unread))):
        raise refusal(path, refused)
    if not readable:
        raise WeightsError(
            f"{path} holds {describe(found)}, and no state dict; save model.state_dict() with torch.save"
        )
    others = [entry.key for entry in readable if known and entry not in known]
    return Weights(
        path,
        entries=tuple(known or readable),
        unread=tuple(entry for entry in unread if entry.is_known),
        refused=refused,
        others=tuple(others),
    )


def _read(path: Path, *, trust: bool, trust_modules: Sequence[str]) -> tuple[Any, Refused]:
    kind = identify(path)
    if kind is Kind.SAFETENSORS:
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") == "convsurgeon-student" and '"plan"' in metadata.get("record", ""):
            raise WeightsError(
                f"{path} is a whole student, not only weights; give it by itself: convsurgeon ... {path}"
            )
        return tensors, {}
    if kind is Kind.PROGRAM:
        return dict(read_program(path, trust=trust).state_dict()), {}
    return (read_trusted(path), {}) if trust else read_safely(path, kind, trust_modules=trust_modules)


def describe(found: Any) -> str:
    """Say what a file held: its type, and a dict's keys."""
    if isinstance(found, dict):
        keys = ", ".join(printable(str(key)[:40]) for key in list(found)[:5] if type(key) in (str, int))
        return f"a {type(found).__name__} with the keys {keys}" if keys else f"an empty {type(found).__name__}"
    return f"a {type(found).__name__}"


def say_choice(path: Path, taken: Entry, rest: Sequence[Entry], *, because: str | None = None) -> str:
    """Say that a file holds several networks, which was taken, and what takes the others."""
    keys = [printable(entry.key) for entry in sorted([taken, *rest], key=lambda entry: entry.rank)]
    line = f"{path} holds {', '.join(keys[:-1])} and {keys[-1]}; {printable(taken.key)} was loaded"
    if because:
        return f"{line}, since {because}"
    what = "the other" if len(rest) == 1 else "another"
    return f"{line}; --weights-key {printable(rest[0].key)} takes {what}"


def only_weights(path: Path) -> ModelError:
    """Return the error for a state dict where a model was expected."""
    return ModelError(
        f"{path} holds only weights, no architecture; name the one they are of, such as mynet:Net or "
        f"torchvision:resnet18: convsurgeon convert mynet:Net --weights {path}"
    )
