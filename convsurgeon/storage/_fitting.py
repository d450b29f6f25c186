"""A state dict beside the one that a model has: the prefix under which it lies, and what does not fit."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convsurgeon.errors import WeightsError, one_line
from convsurgeon.storage._state_dicts import StateDict
from convsurgeon.storage._texts import printable

_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)")
_COUNTER = "num_batches_tracked"  # which files from before 2018 do not have
_MOST_COMPARED = 2000  # names, of which the nearest is looked for
_SHOWN = 3


@dataclass(frozen=True)
class Gaps:
    """How a state dict differs from the one that a model has; false if it does not."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[tuple[str, torch.Size, torch.Size], ...] = ()
    """Name, size in the file, size in the model."""
    nearest: tuple[str, ...] = ()
    """Sentences about names on one side that are like one on the other."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.resized)

    @property
    def only_classes(self) -> bool:
        """Whether all names are there, and only the first axis of some tensors is another."""
        return not self.missing and all(
            len(file) == len(model) > 0 and file[1:] == model[1:] for _, file, model in self.resized
        )

    def __str__(self) -> str:
        sizes = [
            f"{name}: {_size(file)} in the file, {_size(model)} in the model" for name, file, model in self.resized
        ]
        parts = {"missing": self.missing, "unexpected": self.unexpected, "of another size": sizes}
        said = ", ".join(f"{len(names)} {what} ({enumerate_names(names)})" for what, names in parts.items() if names)
        return "; ".join([said, *self.nearest])


class Fitting:
    """What a state dict out of a file has for the parameters and buffers of a model.

    Args:
        model: says which names and sizes there must be.
        state: the names and tensors of the file.
    """

    def __init__(self, model: nn.Module, state: StateDict) -> None:
        self.own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
        self.state = state
        self._needed = [name for name in self.own if not name.endswith(_COUNTER)]
        self._counts = self._count_prefixes()
        if self._counts and not self.find_complete() and any(map(_OLD_DENSENET.fullmatch, state)):
            self.state = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
            self._counts = self._count_prefixes()

    def find_complete(self) -> list[str]:
        """Return the prefixes under which every parameter and buffer of the model has an entry, whatever its size."""
        needed = len(self._needed)
        found = [prefix for prefix, count in self._counts.items() if count >= needed]
        return sorted(prefix for prefix in found if not self.compare(prefix).missing) if needed else [""]

    def guess_prefix(self) -> str:
        """Return the prefix under which most of the model's names are."""
        best = max(self._counts.values(), default=0)
        return min((prefix for prefix, count in self._counts.items() if count == best), key=len, default="")

    def compare(self, prefix: str) -> Gaps:
        """Return what is not there under a prefix, and what is of another size. Further entries are not looked at."""
        pairs = [(name, self.state.get(prefix + name), tensor) for name, tensor in self.own.items()]
        return Gaps(
            missing=tuple(name for name, theirs, _ in pairs if theirs is None and not name.endswith(_COUNTER)),
            resized=tuple(
                (name, theirs.shape, mine.shape)
                for name, theirs, mine in pairs
                if theirs is not None and theirs.shape != mine.shape
            ),
        )

    def find_leftovers(self, prefix: str, *, others: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the names of the file that are under a prefix, none of the model's, and under none of the others."""
        inside = tuple(other for other in others if other != prefix and other.startswith(prefix))
        return tuple(
            key
            for key in self.state
            if key.startswith(prefix) and key[len(prefix) :] not in self.own and not key.startswith(inside)
        )

    def explain(self, prefix: str) -> Gaps:
        """Return all that does not fit under a prefix, with the nearest names on the other side."""
        gaps = self.compare(prefix)
        unexpected = self.find_leftovers(prefix)
        near: list[str] = []
        for name in gaps.missing[:_SHOWN]:
            if found := _nearest(prefix + name, self.own[name], self._pool(prefix)):
                near.append(f"nearest to {printable(name)} in the file: {printable(found)}")
        if not gaps.missing:
            for key in unexpected[:_SHOWN]:
                if found := _nearest(key[len(prefix) :], self.state[key], self.own):
                    near.append(f"nearest to {printable(key)} in the model: {printable(found)}")
        return Gaps(gaps.missing, unexpected, gaps.resized, tuple(near[:_SHOWN]))

    def take(self, prefix: str) -> StateDict:
        """Return the entries under a prefix, by the names that they have in the model."""
        own = {name: tensor for name, tensor in self.own.items() if name.endswith(_COUNTER)}
        return own | {name: self.state[prefix + name] for name in self.own if prefix + name in self.state}

    def say_taken(self, prefix: str, where: str) -> str:
        """Say which entries were taken under a prefix and which were not."""
        taken = sum(prefix + name in self.state for name in self.own)
        others = [key for key in self.state if not (key.startswith(prefix) and key[len(prefix) :] in self.own)]
        said = f"took {printable(repr(prefix))} of {where}: "
        if not others:
            return f"{said}all {taken} entries"
        kinds = list(dict.fromkeys(f"{head}{dot and '.*'}" for head, dot, _ in (key.partition(".") for key in others)))
        verb, noun = ("is", "") if len(others) == 1 else ("are", f" {len(others)}")
        return f"{said}{taken} of {len(self.state)} entries; the other{noun} {verb} {enumerate_names(kinds)}"

    def _count_prefixes(self) -> Counter[str]:
        """Count, for each prefix, how many of the model's names stand behind it."""
        needed = set(self._needed)
        deepest = max((name.count(".") for name in needed), default=0)
        counts: Counter[str] = Counter()
        for key in self.state:
            parts = key.rsplit(".", deepest + 1)
            for start in range(len(parts)):
                if ".".join(parts[start:]) in needed:
                    counts[".".join([*parts[:start], ""])] += 1
        return counts

    def _pool(self, prefix: str) -> Mapping[str, Tensor]:
        return {key: value for key, value in self.state.items() if key.removeprefix(prefix) not in self.own}


def load_strictly(model: nn.Module, state: StateDict, *, where: str) -> None:
    """Copy every tensor into the model, whose names and sizes must be the same.

    Raises:
        WeightsError: counting and naming the entries that do not fit.
    """
    fitting = Fitting(model, state)
    if gaps := fitting.explain(""):
        raise WeightsError(f"{where} does not fit {type(model).__name__}: {gaps}")
    copy_into(model, fitting.take(""), where=where)


def copy_into(model: nn.Module, tensors: StateDict, *, where: str) -> None:
    """Load tensors that are known to fit.

    Raises:
        WeightsError: if the model's own code says that they do not.
    """
    try:
        model.load_state_dict(tensors, strict=True)
    except Exception as error:  # a module's own hooks
        raise WeightsError(f"{where} does not fit {type(model).__name__}: {printable(one_line(error))}") from error


def enumerate_names(names: Sequence[str], *, last: str = ", ") -> str:
    """Return the first few names, and dots where there are more.

    >>> enumerate_names(["a", "b", "c"], last=" and "), enumerate_names(["a", "b", "c", "d"])
    ('a, b and c', 'a, b, c, ...')
    """
    shown = [printable(name) for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        return f"{', '.join(shown)}, ..."
    return last.join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def _nearest(name: str, tensor: Tensor, pool: Mapping[str, Tensor]) -> str | None:
    """Return the name that is most like another, of the same last part and size if there are such, or None.

    A head of another number of classes is of the same size for that.
    """
    leaf = name.rpartition(".")[2]
    named = {key: value for key, value in pool.items() if key.rpartition(".")[2] == leaf}
    alike = [key for key, value in named.items() if value.shape == tensor.shape]
    alike = alike or [key for key, value in named.items() if value.shape[1:] == tensor.shape[1:] and value.dim()]
    names, cutoff = (alike, 0.0) if alike else (list(pool), 0.6)
    near = difflib.get_close_matches(name, names[:_MOST_COMPARED], n=1, cutoff=cutoff)
    return near[0] if near else None


def _size(shape: torch.Size) -> str:
    return "x".join(str(length) for length in shape) or "scalar"


def guess_classes(gaps: Gaps, default: int | None) -> Iterator[int]:
    """Yield likely numbers of classes, at most four: heads have one output per class, or a multiple."""
    guesses = [file[0] for _, file, _ in gaps.resized]
    if default:
        guesses += [file[0] * default // model[0] for _, file, model in gaps.resized if model[0]]
    yield from [guess for guess in dict.fromkeys(sorted(guesses)) if guess > 0][:4]
