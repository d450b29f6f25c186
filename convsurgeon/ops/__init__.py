"""The cheap convolutions. One file each; the file's name is the op's name and what follows `--to`.

`names()` lists them and `get(name)` returns the class. Both read this folder and the entry-point
group `convsurgeon.ops`, through which other packages add theirs.
"""

from typing import TYPE_CHECKING, Any

from convsurgeon.ops._base import AbstractCheapConv
from convsurgeon.ops._kernel_attributes import TENSOR_METADATA
from convsurgeon.ops._pointwise_spatial import AbstractPointwiseSpatial
from convsurgeon.ops._registry import get, names, register
from convsurgeon.ops._same_padding import SamePadding
from convsurgeon.ops._spatial_pointwise import AbstractSpatialPointwise

__all__ = [
    "TENSOR_METADATA",
    "AbstractCheapConv",
    "AbstractPointwiseSpatial",
    "AbstractSpatialPointwise",
    "SamePadding",
    "get",
    "names",
    "register",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Find a class by its name: `convsurgeon.ops.ShiftConv2d`."""
        for op_name in names():
            op = get(op_name)
            if op.__name__ == name:
                return op
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
