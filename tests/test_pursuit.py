"""Positions chosen by data: against brute force, and where data are degenerate."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from convsurgeon.factorization import fit_on_features, pursue_taps


def moments(seed: int, *, channels: int, positions: int, outputs: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = channels * positions
    x = torch.randn(300, features, generator=generator) @ torch.randn(features, features, generator=generator)
    y = x @ torch.randn(features, outputs, generator=generator) + torch.randn(300, outputs, generator=generator)
    return (x.mT @ x).double(), (y.mT @ x).double(), y.double()


def error(gram: Tensor, cross: Tensor, taps: Tensor, positions: int) -> float:
    """What a least-squares fit on those positions leaves, up to the energy of the targets."""
    features = (torch.arange(len(taps))[:, None] * positions + taps).flatten()
    weight = fit_on_features(gram, cross, features)
    return float((weight @ gram[features][:, features] * weight).sum() - 2 * (weight * cross[:, features]).sum())


def choices(channels: int, positions: int, each: int) -> list[Tensor]:
    one = list(itertools.combinations(range(positions), each))
    return [torch.tensor(chosen) for chosen in itertools.product(one, repeat=channels)]


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_chosen_positions_are_near_the_best_and_no_exchange_is_better(seed: int, each: int) -> None:
    channels, positions = 3, 4
    gram, cross, y = moments(seed, channels=channels, positions=positions)
    taps = pursue_taps(gram, cross, positions, each=each)
    assert taps.shape == (channels, each)
    mine = error(gram, cross, taps, positions)
    everything = [(error(gram, cross, other, positions), other) for other in choices(channels, positions, each)]
    for far, other in everything:
        if (
            int(
                (
                    torch.isin(
                        other + torch.arange(channels)[:, None] * positions,
                        taps + torch.arange(channels)[:, None] * positions,
                    )
                ).sum()
            )
            == channels * each - 1
        ):
            assert mine <= far + 1e-6 * float(y.square().sum())
    best = min(far for far, _ in everything)
    worst = max(far for far, _ in everything)
    assert mine <= best + 0.25 * (worst - best)


def test_representable_kernels_are_found_exactly() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6 * 9)
    x[:, 1:] += 0.5 * x[:, :-1]
    truth = torch.tensor([4, 0, 8, 3, 3, 7])
    features = torch.arange(6) * 9 + truth
    weight = torch.randn(5, 6)
    y = x[:, features] @ weight.mT
    gram, cross = x.mT @ x, y.mT @ x
    assert torch.equal(pursue_taps(gram, cross, 9)[:, 0], truth)
    torch.testing.assert_close(fit_on_features(gram, cross, features).float(), weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["zeros", "dead channel", "twins"])
def test_degenerate_data_give_some_choice(kind: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(100, 12)
    if kind == "zeros":
        x.zero_()
    elif kind == "dead channel":
        x[:, 4:8] = 0
    else:
        x[:, 4:8] = x[:, :4]
    y = x @ torch.randn(12, 3)
    gram, cross = x.mT @ x, y.mT @ x
    taps = pursue_taps(gram, cross, 4, each=2)
    assert taps.shape == (3, 2)
    assert bool((taps >= 0).all())
    assert bool((taps < 4).all())
    assert bool((taps[:, 0] < taps[:, 1]).all())
    features = (torch.arange(3)[:, None] * 4 + taps).flatten()
    assert bool(fit_on_features(gram, cross, features).isfinite().all())
