"""The least-squares fit of one op: any op, by what its dense kernel does to the data's second moments."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convsurgeon.calibration._moments import AbstractMoments, Gram
from convsurgeon.ops import AbstractCheapConv

_RIDGES = (1e-4, 1e-3, 1e-2)
_CHOICE_RIDGE = 1e-3
_ITERATIONS, _TRIAL_ITERATIONS = 150, 25
_WORK = 3e12
"""Multiply-adds that the fit of one op may take, trials of the ridge included; a large one gets fewer iterations."""
_FEWEST = 10


@dataclass(frozen=True)
class Fit:
    """What the fit of one op came to.

    Args:
        before: squared output error over the targets' energy on the fitted rows, of the kernel it started from.
        after: the same at the end; never above `before`.
        ridge: the regularisation that did best on rows held out, a share of the features' mean energy.
    """

    before: float
    after: float
    ridge: float


def fit_op(op: AbstractCheapConv, donor_OF: Tensor, fitted: AbstractMoments, held: AbstractMoments) -> Fit:
    """Fit an op's parameters, in place, to moments of its own inputs and of the outputs wanted of it.

    Minimises ``sum |W x - y|² + ridge · mean(G) · |W - W0|²`` over the op's parameters, where `W` is its dense
    kernel and `W0` the donor's, by L-BFGS in float64 from where it stands (Liu and Nocedal, 1989). The ridge is
    the one whose short fit has the smallest error on the rows held out. The bias stays.

    Args:
        donor_OF: the dense kernel `(O, I * kh * kw)` that the op stands in for.
        fitted: moments of the rows to fit.
        held: moments of other rows, which choose the ridge.
    """
    everything = fitted.merged(held)  # type: ignore[attr-defined]
    start = _error_of(op, everything)
    # L-BFGS takes contiguous parameters only; the op's may be channels_last
    worker = copy.deepcopy(op).double().to(memory_format=torch.contiguous_format).requires_grad_(True)
    donor = donor_OF.double()
    if isinstance(everything, Gram):
        strength = _CHOICE_RIDGE * everything.feature_energy
        noise_FF = strength * torch.eye(len(everything.gram_FF), dtype=torch.float64, device=donor.device)
        worker.choose_by_data(everything.gram_FF + noise_FF, everything.cross_OF + strength * donor)
    initial = copy.deepcopy(worker.state_dict())
    trials = []
    for ridge in _RIDGES:
        worker.load_state_dict(initial)
        _minimise(worker, donor, fitted, ridge, _TRIAL_ITERATIONS)
        trials.append((_error_of(worker, held), ridge, copy.deepcopy(worker.state_dict())))
    _, ridge, state = min(trials, key=lambda trial: trial[0])
    worker.load_state_dict(state)
    _minimise(worker, donor, everything, ridge, _ITERATIONS)
    before = copy.deepcopy(op.state_dict())
    op.load_state_dict(worker.state_dict())
    after = _error_of(op, everything)
    if not after <= start:
        op.load_state_dict(before)
        return Fit(start, start, ridge)
    return Fit(start, after, ridge)


def _error_of(op: AbstractCheapConv, moments: AbstractMoments) -> float:
    with torch.no_grad():
        return moments.relative_error(op.as_dense().flatten(1))


def _minimise(op: AbstractCheapConv, donor_OF: Tensor, moments: AbstractMoments, ridge: float, iterations: int) -> None:
    parameters = _fitted_parameters(op)
    strength = ridge * moments.feature_energy
    scale = max(moments.energy, torch.finfo(torch.float64).tiny)
    in_all = len(_RIDGES) * _TRIAL_ITERATIONS + _ITERATIONS
    share = min(1.0, _WORK / (in_all * moments.product_cost(len(donor_OF))))
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max(_FEWEST, int(share * iterations)),
        history_size=20,
        tolerance_grad=0,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight_OF = op.as_dense().flatten(1)
        fixed_OF = weight_OF.detach()
        from_donor_OF = fixed_OF - donor_OF
        value, gradient_OF = moments.value_and_gradient(fixed_OF)
        # the gradient is known, so that the large product is done once
        (weight_OF * (gradient_OF + 2 * strength * from_donor_OF)).sum().div(scale).backward()  # type: ignore[no-untyped-call]
        return (value + strength * from_donor_OF.square().sum()) / scale

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def _fitted_parameters(op: AbstractCheapConv) -> list[nn.Parameter]:
    return [parameter for parameter in op.parameters() if parameter is not op.bias]
