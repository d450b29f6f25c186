"""What a name of a package is, read off its source: nothing of a package is imported before the user trusts it."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from convsurgeon.storage._values import HAS_A_SAY

_LARGEST = 1_000_000  # bytes of a module's source
_BUILT_IN = frozenset(
    (
        "dict",
        "list",
        "tuple",
        "set",
        "frozenset",
        "int",
        "float",
        "str",
        "bytes",
        "OrderedDict",
        "defaultdict",
        "Exception",
    )
)
_ENUMS = ("Enum", "Flag")


def find_hindrance(name: str, *, called: bool) -> str | None:
    """Return why a file may not have what a name stands for even if its package is trusted, or None if it may.

    It is a guess where the source does not say, and then in favor of the package.

    Args:
        called: whether the file calls it, as it does to name a member of an enumeration.
    """
    module, _, attribute = name.rpartition(".")
    tree = _parse(module)
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == attribute:
            return "it is a function that the file calls" if called else None
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return _in_class(node, called=called)
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == attribute for each in node.names):
            return f"it is imported there from {'.' * node.level}{node.module or ''}"
    return None


def _in_class(node: ast.ClassDef, *, called: bool) -> str | None:
    bases = [_last_name(base) for base in node.bases]
    if any(base.endswith(_ENUMS) for base in bases):
        return None
    if any(keyword.arg == "metaclass" and _last_name(keyword.value) != "ABCMeta" for keyword in node.keywords):
        return "it has a metaclass"
    for base in bases:
        if base in _BUILT_IN:
            return f"it is built on {base}"
    for method in _names(node.body):
        if method in (*HAS_A_SAY, "__dict__"):
            return f"it has a {method} of its own"
        if method == "__slots__":
            return "it has __slots__"
    for decorator in node.decorator_list:
        keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
        if any(each.arg == "slots" and ast.unparse(each.value) == "True" for each in keywords):
            return "it has __slots__"
    return "it is a class that the file calls" if called and not bases else None


def _names(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _parse(module: str) -> ast.Module | None:
    path = _find_file(module)
    try:
        if path is None or path.stat().st_size > _LARGEST:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _find_file(module: str) -> Path | None:
    """Return the source of a module; unlike `importlib.util.find_spec`, this imports no package on the way."""
    parts = module.split(".")
    spec: ModuleSpec | None = None
    for count in range(1, len(parts) + 1):
        where = None if spec is None else spec.submodule_search_locations
        if count > 1 and where is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:count]), where)
        if spec is None:
            return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None
