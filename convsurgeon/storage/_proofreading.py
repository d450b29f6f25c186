"""A pickle is read here before torch reads it, and nothing is built: names stay names, tensors sizes.

Torch's restricted unpickler sees to it that a file calls only what it may. This reading sees to the
rest: that what it calls has ordinary arguments, that no tensor is larger than its storage and no
storage larger than the file, that nothing is used as a key whose hash would take forever. What is
accepted here takes memory and time in proportion to the file.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Container, Mapping
from typing import Any, NoReturn

from torch._utils import IMPORT_MAPPING, NAME_MAPPING  # what torch's own unpickler goes by

from convsurgeon.storage._archives import DamageError
from convsurgeon.storage._calls import Extent, Known, Made, Name, Storage, Table, is_key
from convsurgeon.storage._stand_ins import StandInError

# torch looks through all admitted names at every step, and no network comes near
_MOST_NAMES = 1000
_LONGEST_NAME = 500
_PROTOCOL = 2

Buffer = Any
"""Bytes, or a memory map of them: what can be sliced and searched."""


class Proofreader:
    """Reads pickles that stand one behind the other, as torch's unpickler would.

    Args:
        data: the bytes.
        foreign: the names that torch does not know; what they may do, their stand-ins decide.
        storage: makes a storage of the persistent id that a file gives it.
        limit: bytes that all tensors together may seem to have, as their sizes say.
    """

    def __init__(
        self,
        data: Buffer,
        *,
        foreign: Container[str],
        storage: Callable[[tuple[Any, ...]], Storage],
        limit: int,
    ) -> None:
        self.position = 0
        self.lookups: dict[tuple[str, str], None] = {}
        """Which attributes of which named things are looked up, in order."""
        self.calls: dict[str, int] = {}
        """With how many plain arguments a foreign thing is called at most; -1 if there are others."""
        self._data, self._size = data, len(data)
        self._foreign, self._storage = foreign, storage
        self._known = Known(Extent(limit))
        self._names: set[str] = set()
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """Return what the next pickle holds, with plain data as it is.

        Raises:
            DamageError: for what no pickle of torch's can be.
            StandInError: for calls and sizes that ordinary files do not have.
            pickle.UnpicklingError: for whatever torch would not read.
        """
        self._stack, self._marks, self._memo = [], [], {}
        while (code := self._take(1)) != pickle.STOP:
            step = _STEPS.get(code)
            if step is None:
                raise pickle.UnpicklingError(f"opcode {code!r}")
            try:
                step(self)
            except (IndexError, KeyError) as error:
                raise DamageError("its pickle uses what is not there") from error
        return self._pop()

    def _take(self, count: int) -> bytes:
        if self.position + count > self._size:
            raise DamageError("its pickle has no end")
        self.position += count
        taken: bytes = self._data[self.position - count : self.position]
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + _LONGEST_NAME)
        if end < 0:
            raise DamageError("a name in it has no end")
        line = self._take(end - self.position).decode("utf-8")
        self._take(1)
        return line

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    # one method for each opcode that is more than a value

    def _protocol(self) -> None:
        if (protocol := self._number("<B")) != _PROTOCOL:
            raise pickle.UnpicklingError(f"protocol {protocol}")

    def _global(self) -> None:
        module, name = self._line(), self._line()
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        dotted = f"{module}.{name}"
        if not all(part.isidentifier() for part in dotted.split(".")):
            raise DamageError("a name in it is no name")
        self._names.add(dotted)
        if len(self._names) > _MOST_NAMES:
            raise StandInError(f"names more than {_MOST_NAMES} classes and functions")
        self._push(Name(dotted))

    def _new_object(self) -> None:
        args, cls = self._pop(), self._pop()
        if not (isinstance(cls, Name) and isinstance(args, tuple)):
            self._refuse(cls)
        if not self._is_foreign(cls):
            raise StandInError(f"creates a {cls.dotted}")
        self._push(Made(cls.dotted))

    def _reduce(self) -> None:
        args, func = self._pop(), self._pop()
        if not (isinstance(func, Name) and isinstance(args, tuple)):
            self._refuse(func)
        if func.dotted == "builtins.getattr" and len(args) == 2 and isinstance(args[0], Name):
            self._push(self._lookup(args[0], args[1]))
        elif self._is_foreign(func):
            self._note_call(func, args)
            self._push(Made(func.dotted))
        else:
            self._push(self._known.call(func, args))

    def _note_call(self, func: Name, args: tuple[Any, ...]) -> None:
        count = len(args) if all(map(is_key, args)) else -1
        before = self.calls.get(func.dotted, count)
        self.calls[func.dotted] = -1 if -1 in (count, before) else max(count, before)

    def _lookup(self, owner: Name, attribute: Any) -> Name:
        if not (isinstance(attribute, str) and attribute.isidentifier() and self._is_foreign(owner)):
            raise StandInError("looks up an attribute with builtins.getattr")
        self.lookups[owner.dotted, attribute] = None
        return Name(f"{owner.dotted}.{attribute}", owner=owner)

    def _is_foreign(self, name: Name) -> bool:
        return name.owner is not None or name.dotted in self._foreign

    def _build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, Table) and target.kind == "collections.OrderedDict":
            # of a state dict: the versions of its modules
            if not (isinstance(state, Table) and set(state.entries) <= {"_metadata"}):
                raise StandInError("gives an OrderedDict attributes")
        elif not isinstance(target, Made):
            self._refuse(target)

    def _persistent(self) -> None:
        persistent_id = self._pop()
        if not (isinstance(persistent_id, tuple) and persistent_id[0] == "storage"):
            raise pickle.UnpicklingError("a persistent id of no storage")
        self._push(self._storage(persistent_id))

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            self._refuse(self._stack[-1])
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, Table) or len(items) % 2:
            self._refuse(target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not is_key(key):
                raise StandInError("uses something odd as the key of a dict")
            target.entries[key if not isinstance(key, Name | Made) else id(key)] = value

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, count: int) -> None:
        items = self._stack[-count:]
        if len(items) < count:
            raise IndexError
        self._stack[-count:] = [tuple(items)]

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _long(self) -> None:
        self._push(pickle.decode_long(self._take(self._number("<B"))))

    def _text(self) -> None:
        self._push(str(self._take(self._number("<I")), "utf-8", "surrogatepass"))

    def _refuse(self, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"an operation on a {type(value).__name__}")


_STEPS: Mapping[bytes, Callable[[Proofreader], None]] = {
    pickle.PROTO: Proofreader._protocol,
    pickle.GLOBAL: Proofreader._global,
    pickle.NEWOBJ: Proofreader._new_object,
    pickle.REDUCE: Proofreader._reduce,
    pickle.BUILD: Proofreader._build,
    pickle.BINPERSID: Proofreader._persistent,
    pickle.APPEND: lambda self: self._extend([self._pop()]),
    pickle.APPENDS: lambda self: self._extend(self._since_mark()),
    pickle.SETITEM: lambda self: self._set_items([self._pop(), self._pop()][::-1]),
    pickle.SETITEMS: lambda self: self._set_items(self._since_mark()),
    pickle.MARK: Proofreader._mark,
    pickle.TUPLE: lambda self: self._push(tuple(self._since_mark())),
    pickle.TUPLE1: lambda self: self._tuple(1),
    pickle.TUPLE2: lambda self: self._tuple(2),
    pickle.TUPLE3: lambda self: self._tuple(3),
    pickle.EMPTY_TUPLE: lambda self: self._push(()),
    pickle.EMPTY_LIST: lambda self: self._push([]),
    pickle.EMPTY_DICT: lambda self: self._push(Table("dict")),
    pickle.EMPTY_SET: lambda self: self._push(Made("set")),
    pickle.NONE: lambda self: self._push(None),
    pickle.NEWTRUE: lambda self: self._push(True),
    pickle.NEWFALSE: lambda self: self._push(False),
    pickle.BININT: lambda self: self._push(self._number("<i")),
    pickle.BININT1: lambda self: self._push(self._number("<B")),
    pickle.BININT2: lambda self: self._push(self._number("<H")),
    pickle.BINFLOAT: lambda self: self._push(self._number(">d")),
    pickle.LONG1: Proofreader._long,
    pickle.BINUNICODE: Proofreader._text,
    pickle.SHORT_BINSTRING: lambda self: self._push(self._take(self._number("<B")).decode("utf-8")),
    pickle.BINGET: lambda self: self._push(self._memo[self._number("<B")]),
    pickle.LONG_BINGET: lambda self: self._push(self._memo[self._number("<I")]),
    pickle.BINPUT: lambda self: self._remember(self._number("<B")),
    pickle.LONG_BINPUT: lambda self: self._remember(self._number("<I")),
}
