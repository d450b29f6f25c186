"""The attributes by which model code knows a convolution: `weight` and `bias`, to read and to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from convsurgeon.errors import KernelWriteError
from convsurgeon.ops._kernel_view import assign_kernel, view_kernel

if TYPE_CHECKING:
    from convsurgeon.ops._base import AbstractCheapConv

TENSOR_METADATA = frozenset(
    {
        *("shape", "dtype", "device", "ndim", "is_meta", "is_cuda", "layout", "itemsize"),
        *("size", "dim", "numel", "is_floating_point", "is_complex", "element_size", "is_contiguous"),
    }
)
"""What a tensor can be asked for without looking at its values."""


class KernelAttributes(nn.Module):
    """A module whose `weight` is computed, and whose `bias` is that of the part named by `last`."""

    last: ClassVar[str]
    """The submodule that carries the bias; its output is the op's output, or one of those that are added up to it."""

    def __getattr__(self, name: str) -> Any:
        """Find `weight` too, if the op has none of its own: the dense kernel it equals, as model code expects.

        What is written to it reaches the op's parameters, or raises `KernelWriteError`. Where the op stands for a
        kernel, it is asked for shape, dtype and device, and written to, as a tensor is.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "weight" and name not in TENSOR_METADATA and not _is_write(name):
                raise
            if self.last not in self._modules:  # it is being made
                raise
        op = cast("AbstractCheapConv", self)
        if name == "weight":
            return view_kernel(op)
        return getattr(view_kernel(op) if _is_write(name) else op.as_dense(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Let an assignment to `weight` or `bias` reach the op's parameters, as model code expects.

        Raises:
            KernelWriteError: for a kernel that the op cannot hold.
        """
        if self._is_computed(name):
            assign_kernel(cast("AbstractCheapConv", self), value)
        elif name == "bias":
            object.__setattr__(self, name, value)  # nn.Module would register it
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Refuse to delete `weight` and `bias`, which are no attributes of the op's own.

        Raises:
            KernelWriteError: for these two.
        """
        if name == "bias" or self._is_computed(name):
            instead = "set it to None" if name == "bias" else "assign another tensor to it"
            raise KernelWriteError(f"{type(self).__name__}: {name} cannot be deleted; {instead}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; `weight` and `bias` are taken as if they were assigned.

        Raises:
            KernelWriteError: for a kernel that the op cannot hold.
        """
        if name == "bias" or self._is_computed(name):
            setattr(self, name, param)
        else:
            super().register_parameter(name, param)

    def _is_computed(self, name: str) -> bool:
        """Whether a name is that of the kernel, and the op has no such tensor of its own; while it is made, it may."""
        if name != "weight" or self.last not in self._modules:
            return False
        return not any(name in own for own in (self._parameters, self._buffers, self._modules, self.__dict__))


def _is_write(name: str) -> bool:
    """Whether a tensor is written to by that name: by a method in place, or through what `data` gives."""
    return name == "data" or (name.endswith("_") and not name.startswith("_") and hasattr(Tensor, name))
