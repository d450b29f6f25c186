"""Where ops are found: the files of this folder, and the entry points of other packages."""

from convsurgeon.ops._base import AbstractCheapConv
from convsurgeon.registry import Registry

ENTRY_POINT_GROUP = "convsurgeon.ops"

_registry: Registry[type[AbstractCheapConv]] = Registry("op", "convsurgeon.ops", entry_points=ENTRY_POINT_GROUP)
register, names, get = _registry.register, _registry.names, _registry.get
