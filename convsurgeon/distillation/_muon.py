"""Muon for convolutions: steps whose singular values are all alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(Optimizer):
    """SGD with Nesterov momentum, in which a kernel moves by the nearest orthogonal matrix to its step.

    A kernel `(O, I, kh, kw)` is a matrix `(O, I * kh * kw)`; its steps are as large in the directions in which
    the gradient is small. Parameters of one dimension, norms and biases, move by the plain step, from gradients
    whose norm, over all of them, is at most `max_norm`. torch's own
    `torch.optim.Muon` takes matrices only, one after the other; here, those of one shape are turned together.

    Reference:
        Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al., 2025,
        arXiv:2502.16982. Clipping: Pascanu, Mikolov, Bengio, 2013, arXiv:1211.5063.

    Args:
        params: parameters or groups, as for any torch optimiser.
        lr: the spectral norm of a step of a kernel no taller than wide, `sqrt(rows / columns)` times that of
            a taller one.
        momentum: of the gradients.
        weight_decay: the share by which a weight shrinks in a step at rate 1.
        max_norm: of the gradients of all parameters of one dimension together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        max_norm: float = 1.0,
    ) -> None:
        self.max_norm = max_norm
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip_grad_norm_([p for group in self.param_groups for p in group["params"] if p.dim() <= 1], self.max_norm)
        for group in self.param_groups:
            for parameters in _by_shape(group["params"]).values():
                steps = [self._nesterov(parameter, group["momentum"]) for parameter in parameters]
                if parameters[0].dim() > 1:
                    steps = list(orthogonalized(torch.stack([step.flatten(1) for step in steps])))
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(step.view(parameter.shape), alpha=-group["lr"])
        return loss

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer: Tensor = state["momentum_buffer"].mul_(momentum).add_(parameter.grad)
        return parameter.grad.add(buffer, alpha=momentum)


def orthogonalized(matrices_BRC: Tensor) -> Tensor:
    """Return matrices with the singular vectors of those given, and singular values from about 0.7 to 1.2.

    Five Newton-Schulz steps in float32 or, where the matrices are, in a wider type; those with more rows than
    columns are `sqrt(R / C)` times as large.
    """
    rows, columns = matrices_BRC.shape[1:]
    if rows > columns:
        wide: Tensor = orthogonalized(matrices_BRC.mT) * (rows / columns) ** 0.5
        return wide.mT
    x: Tensor = matrices_BRC.to(torch.promote_types(matrices_BRC.dtype, torch.float32))
    x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(matrices_BRC.dtype)


def _by_shape(parameters: Iterable[Tensor]) -> dict[Any, list[Tensor]]:
    found: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            key = (parameter.flatten(1).shape if parameter.dim() > 1 else 1, parameter.dtype, parameter.device)
            found[key].append(parameter)
    return found
