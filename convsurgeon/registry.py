"""Discovery: one file of a folder is one variant, and nobody keeps a list."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from convsurgeon.errors import ConvSurgeonError, UnknownNameError, one_line

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """The classes that the files of a package register under their `name`.

    Args:
        kind: what they are, for messages: `op`, `method`.
        package: the package whose files (those without a leading underscore) are imported on first use.
        entry_points: an entry-point group through which other packages add theirs, or None.
    """

    def __init__(self, kind: str, package: str, *, entry_points: str | None = None) -> None:
        self._kind, self._package, self._group = kind, package, entry_points
        self._classes: dict[str, T] = {}
        self._discovered = False

    def register(self, cls: T) -> T:
        """Make a class known by its `name`. A class decorator.

        Raises:
            ValueError: if another class has that name already.
        """
        name = getattr(cls, "name", None)
        if not isinstance(name, str):
            raise ValueError(f"{self._kind} {cls.__qualname__} has no name")
        known = self._classes.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"two {self._kind}s are named {name!r}: in {known.__module__} and in {cls.__module__}")
        return cls

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> T:
        """Return the class of that name.

        Raises:
            UnknownNameError: naming the nearest match and all there are.
        """
        self._discover()
        if name not in self._classes:
            raise UnknownNameError.among(self._kind, name, self._classes)
        return self._classes[name]

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True  # first: a file that is being imported may ask for names
        try:
            self._import_all()
        except BaseException:
            self._discovered = False  # or the next caller would be told of half of them
            raise

    def _import_all(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self._package}.{module.name}")
        for entry_point in entry_points(group=self._group) if self._group else ():
            try:
                self.register(entry_point.load())
            except Exception as error:  # whatever a foreign package raises, and a name taken twice
                raise ConvSurgeonError(
                    f"the {self._kind} {entry_point.name!r} of another package ({entry_point.value}) "
                    f"cannot be loaded: {one_line(error)}; repair or uninstall that package"
                ) from error
