"""How an exported program is called, as plain data: names, nesting, sizes, types, and which sizes may vary.

It stays in the network's record, so that saving it exports it again for the same sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from convsurgeon.errors import ModelError
from convsurgeon.storage._program_grammar import UnsupportedError, check_tree
from convsurgeon.storage._program_writer import arguments_of_program
from convsurgeon.surgery import in_mode

Convention = dict[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]

_SMALLEST_BATCH = 2  # torch takes a size of 1 for a constant


def convention_of(program: ExportedProgram) -> Convention:
    """Return how a program is called.

    Each leaf is a `value`, or a tensor with `shape`, in which a size that varies is the name of its
    symbol (None where it follows from others), `example` sizes and `dtype`.
    """
    arguments = arguments_of_program(program)
    leaves: list[dict[str, Any]] = []
    for node, spec in (leaf for argument in arguments for leaf in argument.leaves):
        value = node.meta.get("val")
        if isinstance(spec.arg, ConstantArgument):
            leaves.append({"value": spec.arg.value})
        elif isinstance(value, Tensor):
            leaves.append(
                {
                    "shape": [_symbol(size) for size in value.shape],
                    "example": [_hint(size) for size in value.shape],
                    "dtype": str(value.dtype).removeprefix("torch."),
                }
            )
        else:
            raise UnsupportedError(f"a {type(value).__name__} as its input")
    signature = program.module_call_graph[0].signature
    assert signature is not None
    ranges = {
        str(symbol): [_bound(limits.lower), _bound(limits.upper)]
        for symbol, limits in program.range_constraints.items()
        if symbol.is_Symbol
    }
    return {
        "names": [argument.name for argument in arguments],
        "tree": pytree.treespec_dumps(signature.in_spec),
        "leaves": leaves,
        "ranges": ranges,
        "weights": _common_dtype(program.state_dict),
    }


def convention_of_example(example: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Convention:
    """Return the convention of a network that takes such inputs, with a free batch size."""
    args = (example,) if isinstance(example, Tensor) else example if isinstance(example, tuple) else ()
    leaves, tree = pytree.tree_flatten((args, dict(example) if isinstance(example, Mapping) else {}))
    return {
        "names": [],
        "tree": pytree.treespec_dumps(tree),
        "leaves": [_leaf_of_example(leaf) for leaf in leaves],
        "ranges": {"batch": [None, None]},
        "weights": None,
    }


def _leaf_of_example(leaf: Any) -> dict[str, Any]:
    if not isinstance(leaf, Tensor):
        return {"value": leaf}
    dtype = str(leaf.dtype).removeprefix("torch.")
    if leaf.dim() == 0:
        return {"shape": [], "example": [], "dtype": dtype}
    rest = list(leaf.shape[1:])
    return {"shape": ["batch", *rest], "example": [_SMALLEST_BATCH, *rest], "dtype": dtype}


def example_call(convention: Convention, model: nn.Module) -> Call:
    """Return arguments of the example sizes, all zero.

    Inputs whose type was that of the weights have the type that the weights have now.

    Raises:
        ModelError: if the record is damaged.
    """
    before, now = convention["weights"], _common_dtype(dict(model.named_parameters()))
    return _assembled(convention, [_example(leaf, before, now) for leaf in convention["leaves"]])


def _example(leaf: Mapping[str, Any], before: str | None, now: str | None) -> Any:
    if "value" in leaf:
        return leaf["value"]
    dtype = now if now is not None and leaf["dtype"] == before else leaf["dtype"]
    sizes = [
        length if isinstance(size, int) else max(length, _SMALLEST_BATCH)
        for size, length in zip(leaf["shape"], leaf["example"], strict=True)
    ]
    return torch.zeros(sizes, dtype=getattr(torch, dtype))


def dynamic_shapes(convention: Convention) -> tuple[Any, ...] | dict[str, Any]:
    """Return what `torch.export.export` takes under this name."""
    dims = {
        name: Dim(name, **{key: bound for key, bound in zip(("min", "max"), limits, strict=True) if bound})
        for name, limits in convention["ranges"].items()
    }

    def varying(leaf: Mapping[str, Any]) -> dict[int, Any] | None:
        sizes = enumerate(leaf.get("shape", ()))
        return {index: dims.get(size, Dim.AUTO) for index, size in sizes if not isinstance(size, int)} or None

    args, kwargs = _assembled(convention, [varying(leaf) for leaf in convention["leaves"]])
    return dict(zip(convention["names"], args, strict=False)) | kwargs if kwargs else args


def _assembled(convention: Convention, leaves: Sequence[Any]) -> Call:
    tree = pytree.treespec_loads(check_tree(convention["tree"]))
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    return tuple(args), dict(kwargs)


def fixed_batch(convention: Convention) -> int | None:
    """Return the one batch size that a program was exported for, or None where it may vary."""
    shapes = [leaf["shape"] for leaf in convention["leaves"] if leaf.get("shape")]
    first = {shape[0] for shape in shapes}
    return shapes[0][0] if len(first) == 1 and isinstance(shapes[0][0], int) else None


def takes_other_batches(network: nn.Module, convention: Convention) -> bool:
    """Whether a network that was exported for one batch size computes other ones too.

    Its graph may hold the number, as in `x.view(1, -1)`. It is called without numbers, in two sizes; what
    cannot be called that way, because it looks at values, is taken to be free.
    """
    batch = fixed_batch(convention)
    assert batch is not None
    other = 2 * batch + 1
    network = in_mode(network, training=False)
    try:
        usual = _shapes(network, convention, batch)
    except Exception:  # whatever a program raises without numbers
        return True
    try:
        changed = _shapes(network, convention, other)
    except Exception:  # the number stands in the graph
        return False
    expected = [(other, *shape[1:]) if shape[:1] == (batch,) else shape for shape in usual]
    return changed == expected


def _shapes(network: nn.Module, convention: Convention, batch: int) -> list[tuple[int, ...]]:
    """Return the sizes of all outputs for a batch size, without computing them."""
    leaves = [
        {**leaf, "example": [batch, *leaf["example"][1:]]} if leaf.get("shape") else leaf
        for leaf in convention["leaves"]
    ]
    args, kwargs = example_call({**convention, "leaves": leaves}, network)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with FakeTensorMode() as mode, torch.no_grad():
        fake: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        outputs = torch.func.functional_call(network, fake, args, kwargs)
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def check_convention(convention: Any) -> Convention:
    """Return a convention that came with a record, if it is one.

    Raises:
        ModelError: if it is damaged.
    """
    try:
        json.dumps(convention)
        _assembled(convention, [leaf.get("shape") for leaf in convention["leaves"]])
        assert isinstance(convention["ranges"], dict)
        return dict(convention)
    except Exception as error:  # whatever is in it
        raise ModelError("the record of how the network is called is damaged; give example_inputs") from error


def _symbol(size: Any) -> int | str | None:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return str(expression) if expression.is_Symbol else None


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or _SMALLEST_BATCH)


def _bound(value: Any) -> int | None:
    """Return a limit as a number, None for none."""
    return int(value) if value.is_Integer else None


def _common_dtype(tensors: Mapping[str, Any]) -> str | None:
    """Return the floating type that all tensors have, or None."""
    found = {tensor.dtype for tensor in tensors.values() if isinstance(tensor, Tensor) and tensor.is_floating_point()}
    return str(found.pop()).removeprefix("torch.") if len(found) == 1 else None
