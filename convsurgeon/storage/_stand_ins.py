"""What a pickle gets instead of the classes and functions it names, until it has been read.

While torch's restricted unpickler runs, there is nothing real for a file to call: an admitted class
is a *shell* that can be created empty and given a state once, an admitted function or class is a
*held* object that cannot be called. Afterwards `reveal` puts the real ones in place.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from convsurgeon.storage._values import Form, find_member, form_of, has_own_hash


class StandInError(Exception):
    """A pickle did with a stand-in what ordinary pickles never do."""


_UNFINISHED = object()


class _Uncallable(type):
    """The metaclass of shells: NEWOBJ still creates them, REDUCE does not, nothing changes them."""

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise StandInError(f"calls {cls.__module__}.{cls.__qualname__} instead of restoring an instance")

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise StandInError(f"changes the class {cls.__module__}.{cls.__qualname__}")


class _Namespace(_Uncallable):
    """The metaclass of shells of namespaces, which pickles call without arguments and then give a state."""

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        if args or kwargs:
            super().__call__(*args, **kwargs)
        return cls.__new__(cls)  # type: ignore[call-overload]  # mypy takes it for a metaclass's


class Held:
    """A function that may be named and kept, and is not called while a file is read."""

    def __init__(self, name: str, real: Any) -> None:
        self.name, self.real = name, real

    def __call__(self, *args: object) -> NoReturn:
        raise StandInError(f"calls {self.name}")


class HeldValue(Held):
    """A function or a member of an enumeration of a package that the user trusts: kept, and wrapped by nothing."""


class HeldEnum(HeldValue):
    """An enumeration of such a package. Calling it looks a member up, and runs nothing of it."""

    def __call__(self, *args: object) -> HeldValue:  # type: ignore[override]
        member = find_member(self.real, args[0]) if len(args) == 1 else None
        if member is None:
            raise StandInError(f"has a value that {self.name} does not have")
        return HeldValue(self.name, member)

    def member(self, name: str) -> HeldValue | None:
        """Return the member of that name."""
        found = type.__getattribute__(self.real, "_member_map_").get(name)
        return None if found is None else HeldValue(f"{self.name}.{name}", found)


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
        self.nested: dict[tuple[object, str], object] = {}
        """Stand-ins of what is inside of classes, by the outer one and the inner one's name."""

    def __call__(self, *args: object) -> object:  # type: ignore[override]
        owner, name = args if len(args) == 2 else (None, None)
        if owner is Inert:
            return Inert
        if owner is self.owner and isinstance(name, str) and name in self.names:
            return Held(f"torch.{name}", getattr(self.owner.real, name))
        if isinstance(owner, type | Held) and isinstance(name, str) and (owner, name) in self.nested:
            return self.nested[owner, name]
        raise StandInError("looks up an attribute with builtins.getattr")


_CONTAINERS = (dict, OrderedDict, list, tuple, set, HeldPartial, torch.Tensor, nn.Parameter)


class StandIns:
    """The shells of one file, and the way back from them."""

    def __init__(self) -> None:
        self._reals: dict[type, type] = {}
        self._values: set[type] = set()
        """The shells of classes whose objects are values, not modules."""
        self._created: dict[int, tuple[object, type]] = {}
        self._states: dict[int, dict[str, Any]] = {}
        self._items: dict[int, tuple[object, ...]] = {}
        """What named tuples are made of."""
        self._seen: dict[int, tuple[object, object]] = {}

    def shell(self, real: type) -> type:
        """Return a class that stands for a module class: created without arguments, given a state once."""
        return self._make_shell(real, _Uncallable, takes_items=False)

    def value_shell(self, real: type) -> type:
        """Return a class that stands for one whose objects are values; a named tuple's is created with its items."""
        form = form_of(real)
        shell = self._make_shell(real, _Namespace if form is Form.NAMESPACE else _Uncallable, form is Form.TUPLE)
        self._values.add(shell)
        return shell

    def _make_shell(self, real: type, metaclass: type, takes_items: bool) -> type:
        created, states, items = self._created, self._states, self._items

        def create(cls: type, *args: object) -> object:
            if args and not takes_items:
                raise StandInError(f"creates {real.__module__}.{real.__qualname__} with arguments")
            shell: object = object.__new__(cls)
            created[id(shell)] = (shell, real)
            items[id(shell)] = args
            return shell

        def set_state(shell: object, state: Any) -> None:
            if id(shell) in states or takes_items or not _is_plain_state(state):
                raise StandInError(f"gives {real.__module__}.{real.__qualname__} a state that no instance has")
            states[id(shell)] = state

        body = {"__new__": create, "__setstate__": set_state, "__module__": real.__module__}
        shell: type = metaclass(real.__qualname__, (), body)
        self._reals[shell] = real
        return shell

    def reveal(self, root: Any) -> Any:
        """Turn every shell into an instance of its class, and everything held into the real thing."""
        for shell, real in list(self._created.values()):
            if type(shell) in self._values:
                self._revealed(shell)
            else:
                self._reveal_module(shell, real)
        return self._revealed(root)

    def _reveal_module(self, shell: object, real: type) -> None:
        if id(shell) not in self._states and issubclass(real, nn.Module):
            raise StandInError(f"creates {real.__module__}.{real.__qualname__} without its state")
        state = self._revealed(self._states.get(id(shell), {}))
        if issubclass(real, nn.RNNBase) and not _names_weights(state):
            raise StandInError(f"gives {real.__module__}.{real.__qualname__} a state that is no module's")
        # nn.Module's own __setattr__ would look at attributes that are not there yet
        object.__setattr__(shell, "__class__", real)
        if hasattr(real, "__setstate__"):
            real.__setstate__(shell, state)
        else:
            shell.__dict__.update(state)

    def _reveal_value(self, shell: object) -> object:
        """Return the object that a shell stands for, made without its class being asked."""
        real: Any = self._reals[type(shell)]
        form, state = form_of(real), self._states.get(id(shell), {})
        if form is Form.TUPLE:
            items = self._items[id(shell)]
            if len(items) != len(real._fields):
                raise StandInError(f"creates {real.__module__}.{real.__qualname__} of another length")
            self._seen[id(shell)] = (shell, _UNFINISHED)
            named: object = tuple.__new__(real, [self._revealed(item) for item in items])
            return named
        made: object = types.SimpleNamespace.__new__(real) if form is Form.NAMESPACE else object.__new__(real)
        self._seen[id(shell)] = (shell, made)
        object.__getattribute__(made, "__dict__").update(self._revealed(state))
        return made

    def _revealed(self, value: Any) -> Any:
        if isinstance(value, Held):
            return value.real
        if isinstance(value, type):
            return self._reals.get(value, value)
        if type(value) not in _CONTAINERS and type(value) not in self._values:
            return value
        if id(value) not in self._seen:
            # what is changed in place is entered first: it may hold itself
            self._seen[id(value)] = (value, value)
            self._seen[id(value)] = (value, self._revealed_container(value))
        if self._seen[id(value)][1] is _UNFINISHED:
            raise StandInError("has a named tuple that holds itself")
        return self._seen[id(value)][1]

    def _revealed_container(self, value: Any) -> Any:
        if type(value) in self._values:
            return self._reveal_value(value)
        if isinstance(value, HeldPartial):
            return self._revealed_partial(value)
        if isinstance(value, torch.Tensor):  # people hang attributes on parameters
            value.__dict__.update({name: self._revealed(item) for name, item in value.__dict__.items()})
            return value
        if isinstance(value, dict):
            items = [(self._revealed_key(key), self._revealed(item)) for key, item in value.items()]
            value.clear()
            value.update(items)
            return value
        if isinstance(value, set):
            keys = [self._revealed_key(item) for item in value]
            value.clear()
            value.update(keys)
            return value
        items = [self._revealed(item) for item in value]
        if isinstance(value, tuple):
            return tuple(items)
        value[:] = items
        return value

    def _revealed_key(self, key: Any) -> Any:
        """Return what is to be a key or in a set; an object with a hash of its own would run code."""
        if isinstance(key, tuple):
            return tuple(self._revealed_key(item) for item in key)
        if type(key) in self._values or (isinstance(key, Held) and _hashes_by_itself(key.real)):
            raise StandInError("uses an object of a class of its own as a key")
        return self._revealed(key)

    def _revealed_partial(self, value: HeldPartial) -> functools.partial[Any]:
        func: Callable[..., Any] = self._revealed(value.func)
        held = isinstance(value.func, HeldPartial | Held) and not isinstance(value.func, HeldValue)
        if not held and (value.func not in self._reals or value.func in self._values):
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


def _hashes_by_itself(real: object) -> bool:
    return isinstance(real, enum.Enum) and has_own_hash(real)
