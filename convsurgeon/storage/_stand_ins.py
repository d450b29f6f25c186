"""What a pickle gets instead of the classes and functions it names, until it has been read.

While torch's restricted unpickler runs, there is nothing real for a file to call: an admitted class
is a *shell* that can be created empty and given a state once, an admitted function or class is a
*held* object that cannot be called. Afterwards `reveal` puts the real ones in place.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn


class StandInError(Exception):
    """A pickle did with a stand-in what ordinary pickles never do."""


class _Uncallable(type):
    """The metaclass of shells: NEWOBJ still creates them, REDUCE does not, nothing changes them."""

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise StandInError(f"calls {cls.__module__}.{cls.__qualname__} instead of restoring an instance")

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise StandInError(f"changes the class {cls.__module__}.{cls.__qualname__}")


class Held:
    """A function that may be named and kept, and is not called while a file is read."""

    def __init__(self, name: str, real: Any) -> None:
        self.name, self.real = name, real

    def __call__(self, *args: object) -> NoReturn:
        raise StandInError(f"calls {self.name}")


class Inert:
    """What a refused name becomes: it takes anything, does nothing, and never leaves this package."""

    def __new__(cls, *args: object) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class HeldPartial:
    """A `functools.partial` that is not one yet."""

    def __init__(self, func: object) -> None:
        self.func = func
        self.args: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}

    def __setstate__(self, state: tuple[Any, tuple[Any, ...], dict[str, Any], object]) -> None:
        self.func, self.args, self.keywords, _ = state


class HeldChoice(Held):
    """A member of an enumeration, named by its value: `Format("NCHW")`."""

    def __call__(self, *args: object) -> Held:  # type: ignore[override]
        try:
            (value,) = args
            if not isinstance(value, str):
                raise ValueError(f"a {type(value).__name__}")
            return Held(self.name, self.real(value))
        except ValueError as error:
            raise StandInError(f"calls {self.name}") from error


class HeldLookup(Held):
    """`getattr`, for a short list of names of one object (so `torch.relu` is pickled), and for nested classes."""

    def __init__(self, owner: Held, names: frozenset[str]) -> None:
        super().__init__("builtins.getattr", getattr)
        self.owner, self.names = owner, names
        self.nested: dict[tuple[type, str], type] = {}
        """Stand-ins of classes inside of classes, by the outer one and the inner one's name."""

    def __call__(self, *args: object) -> object:  # type: ignore[override]
        owner, name = args if len(args) == 2 else (None, None)
        if owner is Inert:
            return Inert
        if owner is self.owner and isinstance(name, str) and name in self.names:
            return Held(f"torch.{name}", getattr(self.owner.real, name))
        if isinstance(owner, type) and isinstance(name, str) and (owner, name) in self.nested:
            return self.nested[owner, name]
        raise StandInError("looks up an attribute with builtins.getattr")


class StandIns:
    """The shells of one file, and the way back from them."""

    def __init__(self) -> None:
        self._reals: dict[type, type] = {}
        self._created: dict[int, tuple[object, type]] = {}
        self._states: dict[int, dict[str, Any]] = {}
        self._seen: dict[int, tuple[object, object]] = {}

    def shell(self, real: type) -> type:
        """Return a class that stands for `real`: created without arguments, given a state once."""
        created, states = self._created, self._states

        def create(cls: type, *args: object) -> object:
            if args:
                raise StandInError(f"creates {real.__module__}.{real.__qualname__} with arguments")
            shell: object = object.__new__(cls)
            created[id(shell)] = (shell, real)
            return shell

        def set_state(shell: object, state: Any) -> None:
            if id(shell) in states or not _is_plain_state(state):
                raise StandInError(f"gives {real.__module__}.{real.__qualname__} a state that is no module's")
            states[id(shell)] = state

        body = {"__new__": create, "__setstate__": set_state, "__module__": real.__module__}
        shell = _Uncallable(real.__qualname__, (), body)
        self._reals[shell] = real
        return shell

    def reveal(self, root: Any) -> Any:
        """Turn every shell into an instance of its class, and everything held into the real thing."""
        for key, (shell, real) in self._created.items():
            if key not in self._states and issubclass(real, nn.Module):
                raise StandInError(f"creates {real.__module__}.{real.__qualname__} without its state")
            state = self._revealed(self._states.get(key, {}))
            if issubclass(real, nn.RNNBase) and not _names_weights(state):
                raise StandInError(f"gives {real.__module__}.{real.__qualname__} a state that is no module's")
            # nn.Module's own __setattr__ would look at attributes that are not there yet
            object.__setattr__(shell, "__class__", real)
            if hasattr(real, "__setstate__"):
                real.__setstate__(shell, state)
            else:
                shell.__dict__.update(state)
        return self._revealed(root)

    def _revealed(self, value: Any) -> Any:
        if isinstance(value, Held):
            return value.real
        if isinstance(value, type):
            return self._reals.get(value, value)
        if type(value) not in (dict, OrderedDict, list, tuple, set, HeldPartial):
            return value
        if id(value) not in self._seen:
            # what is changed in place is entered first: it may hold itself
            self._seen[id(value)] = (value, value)
            self._seen[id(value)] = (value, self._revealed_container(value))
        return self._seen[id(value)][1]

    def _revealed_container(self, value: Any) -> Any:
        if isinstance(value, HeldPartial):
            return self._revealed_partial(value)
        if isinstance(value, dict):
            for key, item in value.items():
                value[key] = self._revealed(item)
            return value
        items = [self._revealed(item) for item in value]
        if isinstance(value, tuple):
            return tuple(items)
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(items)
        return value

    def _revealed_partial(self, value: HeldPartial) -> functools.partial[Any]:
        func: Callable[..., Any] = self._revealed(value.func)
        if not (isinstance(value.func, HeldPartial | Held) or value.func in self._reals):
            raise StandInError("makes a functools.partial of something that is no admitted class or function")
        return functools.partial(func, *self._revealed(value.args), **self._revealed(value.keywords))


def _is_plain_state(state: object) -> bool:
    """An instance's `__dict__`: attribute names, none of them special."""
    return type(state) is dict and all(isinstance(key, str) and not key.startswith("__") for key in state)


def _names_weights(state: dict[str, Any]) -> bool:
    """Whether a recurrent layer has the names of its weights, which it would make itself: as many as it is told."""
    layers = state.get("all_weights", state.get("_all_weights"))
    return isinstance(layers, list) and all(
        isinstance(names, list) and names and all(isinstance(name, str) for name in names) for names in layers
    )
