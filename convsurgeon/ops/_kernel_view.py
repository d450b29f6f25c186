"""What `op.weight` is: the dense kernel that an op equals, to read as a tensor is read, and to write to.

A dense convolution keeps its kernel in memory, and an op computes it, so that a write to what it computed
would be lost. Here every torch function is watched by the version counters of the tensors it is given, so that no list
of functions is needed: what was written goes into the op's own parameters, or is refused.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from convsurgeon.errors import KernelWriteError
from convsurgeon.ops._kernel_write import kernel_parameters, take_kernel

if TYPE_CHECKING:
    from convsurgeon.ops._base import AbstractCheapConv

_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_SET_REQUIRES_GRAD: Any = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


def view_kernel(op: AbstractCheapConv) -> Tensor:
    """Return an op's dense kernel `(O, I, kh, kw)`, differentiably; what is written to it reaches the op.

    While a trace, an export, a compiler or a transform looks on, it is a plain tensor.
    """
    if _is_looked_on():
        return op.as_dense().contiguous()
    if torch.is_inference_mode_enabled():
        # an inference tensor counts no writes
        with torch.inference_mode(False), torch.no_grad():
            dense = op.as_dense().contiguous()
            dense = dense.clone() if dense.is_inference() else dense
    else:
        dense = op.as_dense().contiguous()
    if type(dense) not in (Tensor, nn.Parameter) or dense.is_inference():
        return dense
    return _bind(dense, _Tie(op, dense.detach(), _stamp(op)), is_root=True)


def _is_looked_on() -> bool:
    if torch.compiler.is_compiling():
        return True
    if torch.jit.is_tracing() or is_fx_symbolic_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


class _Tie:
    """What the views of one read of a kernel share: the op, the memory, and what the op was when it was read."""

    def __init__(self, op: AbstractCheapConv, base: Tensor, stamp: Any) -> None:
        self.op, self.base, self.stamp = op, base, stamp


class _Before(NamedTuple):
    view: KernelView
    version: int
    storage: int


class KernelView(Tensor):
    """The kernel of an op, or a part of it that shares its memory; what is computed from it is a plain tensor."""

    _tie: _Tie
    _is_root: bool

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function; bind what shares memory with the kernel, and let the op take what was written."""
        kwargs = kwargs or {}
        if not all(issubclass(kind, Tensor) for kind in types):
            return NotImplemented  # an op that stands for a kernel becomes a tensor first
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                return func(*args, **kwargs)
            if func in (Tensor.requires_grad_, _SET_REQUIRES_GRAD) and _is_root(args[0]):
                _require_grad(args[0]._tie, *args[1:], **kwargs)
                return args[0]
            leaves = pytree.tree_leaves((args, kwargs))
            views = [leaf for leaf in leaves if isinstance(leaf, KernelView)]
            before = [_Before(view, view._version, _storage(view)) for view in views]
            out = func(*args, **kwargs)
            for each in before:
                _commit(each)
            return _bound(out, views)

    def __setattr__(self, name: str, value: Any) -> None:
        """Become a plain parameter of its own where torch makes one of it, as `nn.Parameter(op.weight)` does."""
        if name == "_is_param":
            del self._tie, self._is_root
            self.__class__ = nn.Parameter  # type: ignore[assignment]
            return
        super().__setattr__(name, value)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Do what `Tensor.set_` does, which torch hands to no torch function."""
        return self.__torch_function__(Tensor.set_, (type(self),), (self, *args), kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a plain tensor, as all that leaves the process is."""
        copied: Tensor = copy.deepcopy(_plain(self), memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be pickled as a plain tensor, without the op."""
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        """Be shown as a plain tensor."""
        return str(_plain(self).__repr__(**kwargs))  # type: ignore[no-untyped-call]


def assign_kernel(op: AbstractCheapConv, value: Any) -> None:
    """Do what `op.weight = value` asks for.

    Raises:
        KernelWriteError: for what is no tensor, and for a kernel that the op cannot hold.
    """
    if not isinstance(value, Tensor):
        raise KernelWriteError(
            f"{type(op).__name__}: weight is computed from {', '.join(name for name, _ in kernel_parameters(op))}; "
            f"assign a tensor, not {'None' if value is None else type(value).__name__}"
        )
    if _is_root(value) and value._tie.op is op and value._tie.stamp == _stamp(op):
        return  # `op.weight *= 2` has written already
    take_kernel(op, _plain(value).detach(), cast=True)


def _is_root(value: Any) -> TypeGuard[KernelView]:
    return isinstance(value, KernelView) and value._is_root


def _require_grad(tie: _Tie, requires_grad: bool = True) -> None:
    """Freeze or thaw the parameters that a kernel is made of, as a dense convolution's weight would be."""
    for _, parameter in kernel_parameters(tie.op):
        parameter.requires_grad_(requires_grad)


def _commit(before: _Before) -> None:
    """Let the op take what was written to a view of its kernel, if anything was."""
    view, version, storage = before
    tie = view._tie
    moved = _storage(view) != storage
    if view._version == version and not moved:
        return
    if moved and not view._is_root:
        return  # `weight[0].data = x` changes no weight of a dense convolution either
    if _stamp(tie.op) != tie.stamp:
        raise KernelWriteError(
            f"{type(tie.op).__name__}: its parameters have changed since this weight was read; read weight again, "
            "and write to that"
        )
    if moved:
        tie.base = view.detach()
    try:
        take_kernel(tie.op, tie.base, cast=moved)
    except BaseException:
        if not moved:
            with torch.no_grad():
                tie.base.copy_(tie.op.as_dense())
        raise
    finally:
        tie.stamp = _stamp(tie.op)


def _bound(out: Any, views: list[KernelView]) -> Any:
    """Return a result bound to the kernel whose memory it shares; an array of that memory becomes read-only."""
    if type(out) in (tuple, list):
        return type(out)(_bound(each, views) for each in out)
    if isinstance(out, np.ndarray) and not out.flags.owndata:
        out.flags.writeable = False  # numpy counts no writes
    if type(out) is not Tensor or out.is_inference() or out.layout is not torch.strided:
        return out
    storage = _storage(out)
    tie = next((view._tie for view in views if _storage(view) == storage), None)
    return out if tie is None else _bind(out, tie, is_root=False)


def _bind(tensor: Tensor, tie: _Tie, *, is_root: bool) -> Tensor:
    view = tensor.as_subclass(KernelView)
    view._tie, view._is_root = tie, is_root
    return view


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor) if isinstance(tensor, KernelView) else tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else 0


def _stamp(op: AbstractCheapConv) -> Any:
    tensors = (*op.parameters(), *op.buffers())
    return [(id(each), each.dtype, 0 if each.is_inference() else each._version) for each in tensors]
