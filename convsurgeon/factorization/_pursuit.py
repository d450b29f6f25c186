"""Which positions of its kernel each input channel keeps, chosen by what data say of them.

Shape letters: I in_channels, K kernel positions, F = I * K features of a patch, O out_channels, S features chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SWEEPS = 10
# a feature that the chosen ones explain to this share of its energy adds nothing but rounding
_EXPLAINED = 1e-10


@torch.no_grad()
def pursue_taps(gram_FF: Tensor, cross_OF: Tensor, positions: int, *, each: int = 1) -> Tensor:
    """Choose `each` positions for every input channel so that a least-squares fit on them errs little.

    Wanted is the kernel ``W`` that minimises ``tr(W G Wᵀ) - 2 tr(W Dᵀ)`` among those that read `each` positions
    of every channel; to choose them exactly is a combinatorial problem. Orthogonal matching pursuit takes, one by
    one, the feature that lowers the error most (Pati, Rezaiifar, Krishnaprasad, 1993), and then positions are
    exchanged, channel by channel, as long as that lowers the error further: no single exchange would at the end
    (or after ten sweeps).

    Shape:
        - gram_FF: `(F, F)`, second moments of the patches, positive semidefinite
        - cross_OF: `(O, F)`, moments of the outputs wanted with the patches
        - result: `(I, each)`, int64, ascending, values in `0 .. K - 1`

    Args:
        positions: `K`; the features of one channel follow one another.
        each: how many different positions a channel keeps.
    """
    gram, cross = gram_FF.double(), cross_OF.double()
    # features that say the same would leave nothing to invert
    gram = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (
        _EXPLAINED * float(gram.diagonal().mean()) or 1.0
    )
    chosen = _greedy(gram.clone(), cross.clone(), positions, each)
    chosen = _exchange(gram, cross, positions, chosen)
    return chosen.view(-1, each).sort(dim=1).values % positions


@torch.no_grad()
def fit_on_features(gram_FF: Tensor, cross_OF: Tensor, features_S: Tensor) -> Tensor:
    """Return the weights `(O, S)` with which some features fit the outputs best, by least squares.

    Of features that are zero, or say the same, the smallest weights are taken.
    """
    part_SS, wanted_OS = gram_FF[features_S][:, features_S].double(), cross_OF[:, features_S].double()
    weight_OS: Tensor = wanted_OS @ torch.linalg.pinv(part_SS, hermitian=True, rtol=_EXPLAINED)
    return weight_OS


def _greedy(gram_FF: Tensor, cross_OF: Tensor, positions: int, each: int) -> Tensor:
    """Return features `(I * each,)`, sorted; both arguments are used up."""
    features = len(gram_FF)
    channels = features // positions
    energy_F = gram_FF.diagonal().clone()
    open_F = torch.ones(features, dtype=torch.bool, device=gram_FF.device)
    left_I = torch.full((channels,), each, device=gram_FF.device)
    chosen = []
    for _ in range(channels * each):
        rest_F = gram_FF.diagonal()
        useful_F = open_F & (rest_F > _EXPLAINED * energy_F)
        gain_F = torch.where(useful_F, cross_OF.square().sum(0) / rest_F.clamp_min(1e-300), 0.0)
        feature = int(torch.where(open_F, gain_F, -1.0).argmax())
        chosen.append(feature)
        open_F[feature] = False
        left_I[feature // positions] -= 1
        if left_I[feature // positions] == 0:
            start = feature // positions * positions
            open_F[start : start + positions] = False
        if bool(useful_F[feature]):
            direction_F = gram_FF[feature] / gram_FF[feature, feature].sqrt()
            share_O = cross_OF[:, feature] / gram_FF[feature, feature].sqrt()
            gram_FF.addr_(direction_F, direction_F, alpha=-1)
            cross_OF.addr_(share_O, direction_F, alpha=-1)
    return torch.tensor(sorted(chosen), device=gram_FF.device)


def _exchange(gram_FF: Tensor, cross_OF: Tensor, positions: int, chosen_S: Tensor) -> Tensor:
    """Return the features after exchanges of one position at a time, each of which lowers the error."""
    inverse_SS = _inverse(gram_FF, chosen_S)
    for _ in range(_SWEEPS):
        changed = False
        for slot in range(len(chosen_S)):
            candidates_k = _candidates(chosen_S, slot, positions)
            gain_k = _gains(gram_FF, cross_OF, chosen_S, inverse_SS, slot, candidates_k)
            best, now = int(gain_k.argmax()), int((candidates_k == chosen_S[slot]).int().argmax())
            if float(gain_k[best]) > float(gain_k[now]) * (1 + _EXPLAINED):
                chosen_S[slot] = candidates_k[best]
                inverse_SS = _inverse(gram_FF, chosen_S)
                changed = True
        if not changed:
            break
    return chosen_S


def _inverse(gram_FF: Tensor, chosen_S: Tensor) -> Tensor:
    inverse_SS: Tensor = torch.linalg.inv(gram_FF[chosen_S][:, chosen_S])
    return inverse_SS


def _candidates(chosen_S: Tensor, slot: int, positions: int) -> Tensor:
    """Return the features of a slot's channel that no other slot has."""
    start = int(chosen_S[slot]) // positions * positions
    others_S = torch.cat([chosen_S[:slot], chosen_S[slot + 1 :]])
    all_k = torch.arange(start, start + positions, device=chosen_S.device)
    return all_k[~torch.isin(all_k, others_S)]


def _gains(
    gram_FF: Tensor, cross_OF: Tensor, chosen_S: Tensor, inverse_SS: Tensor, slot: int, candidates_k: Tensor
) -> Tensor:
    """Return by how much each candidate in a slot's place lowers the error of a fit on the other features."""
    # the inverse without a row and column, by the block inversion formula
    column_S = inverse_SS[:, slot]
    without_SS = inverse_SS - torch.outer(column_S, column_S) / column_S[slot]
    with_chosen_Sk = gram_FF[chosen_S][:, candidates_k]
    solved_Sk = without_SS @ with_chosen_Sk
    energy_k = gram_FF[candidates_k, candidates_k]
    rest_k = energy_k - (with_chosen_Sk * solved_Sk).sum(0)
    missed_Ok = cross_OF[:, candidates_k] - cross_OF[:, chosen_S] @ solved_Sk
    useful_k = rest_k > _EXPLAINED * energy_k
    return torch.where(useful_k, missed_Ok.square().sum(0) / rest_k.clamp_min(1e-300), 0.0)
