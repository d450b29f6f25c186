"""What a network is called with: example inputs, brought into one form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convsurgeon.errors import ExportError, one_line
from convsurgeon.record import read_record

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

_ASK_FOR_SHAPE = "say --input-shape 1,3,224,224 (in Python: example_inputs=torch.zeros(1, 3, 224, 224))"


@dataclass(frozen=True)
class Inputs:
    """One call of a network: positional and keyword arguments, on the CPU, floats in float32.

    Every tensor with a dimension has the batch first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, in the order of the exported file's inputs."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the call with every batched tensor changed."""
        return Inputs(
            *pytree.tree_map(lambda leaf: change(leaf) if is_batched(leaf) else leaf, (self.args, self.kwargs))
        )

    def resized(self, batch: int) -> Inputs:
        """Return the call with its examples repeated, or cut, to that batch size."""
        return self.map(lambda tensor: tensor[torch.arange(batch) % len(tensor)])

    def random(self, batch: int, generator: torch.Generator) -> Inputs:
        """Return a call of that batch size: floats normal (0, 1), other types drawn from the example."""

        def draw(tensor: Tensor) -> Tensor:
            shape = (batch, *tensor.shape[1:])
            if tensor.is_floating_point():
                return torch.randn(shape, generator=generator)
            return tensor.flatten()[torch.randint(tensor.numel(), shape, generator=generator)]

        return self.map(draw)

    def bound(self, model: nn.Module) -> dict[str, Any]:
        """Return the arguments under the parameter names of the model's forward."""
        return dict(inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments)


def is_batched(leaf: object) -> bool:
    """Whether an argument is a tensor whose first dimension is the batch."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def example_of(model: nn.Module, given: ExampleInputs | None, *, images: Tensor | None = None) -> Inputs:
    """Bring the example inputs into one form; without any, take the record's shape, then the images'.

    Raises:
        ExportError: if there is none, or the model's forward does not take it.
    """
    if given is None:
        given = _from_record(model, images)
    if isinstance(given, Tensor):
        inputs = Inputs((given,), {})
    elif isinstance(given, Mapping):
        inputs = Inputs((), dict(given))
    else:
        inputs = Inputs(tuple(given), {})
    inputs = inputs.map(_plain)
    batched = [tensor for tensor in inputs.tensors if is_batched(tensor)]
    if not batched or any(tensor.numel() == 0 for tensor in batched):
        raise ExportError(f"the example inputs hold no tensor, or an empty one; {_ASK_FOR_SHAPE}")
    return _in_signature_order(model, inputs)


def _from_record(model: nn.Module, images: Tensor | None) -> Tensor:
    shape = read_record(model).get("input_shape")
    if shape is not None:
        return torch.zeros(tuple(shape))
    if images is not None:
        return images
    raise ExportError(f"the input shape of this {type(model).__name__} is not known; {_ASK_FOR_SHAPE}")


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _in_signature_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """Sort keyword arguments as the signature has them: so the exporter orders the file's inputs."""
    try:
        names = list(inputs.bound(model))
    except TypeError as error:
        raise ExportError(
            f"{type(model).__name__}.forward does not take these example inputs: {one_line(error)}"
        ) from error
    ordered = sorted(inputs.kwargs, key=lambda name: names.index(name) if name in names else len(names))
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in ordered})
