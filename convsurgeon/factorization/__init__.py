"""Dense kernels taken apart: pure functions on tensors, closed forms, or steps in closed form where there is none.

Everything is computed in float64, block by block, and handed back in the dtype of what came in.
"""

from convsurgeon.factorization._center import keep_groups_and_center, low_rank_and_center
from convsurgeon.factorization._hats import closest_hats, hat_kernel, hat_weights
from convsurgeon.factorization._low_rank import low_rank, rank_keeping, rank_one
from convsurgeon.factorization._polyadic import full_rank, polyadic, terms_keeping
from convsurgeon.factorization._pursuit import fit_on_features, pursue_taps
from convsurgeon.factorization._subspace import blueprint_weights, subspace_blueprints
from convsurgeon.factorization._taps import balanced_taps, fixed_taps, highest_energy_taps, one_hot_kernel
from convsurgeon.factorization._tucker import tucker

__all__ = [
    "balanced_taps",
    "blueprint_weights",
    "closest_hats",
    "fit_on_features",
    "fixed_taps",
    "full_rank",
    "hat_kernel",
    "hat_weights",
    "highest_energy_taps",
    "keep_groups_and_center",
    "low_rank",
    "low_rank_and_center",
    "one_hot_kernel",
    "polyadic",
    "pursue_taps",
    "rank_keeping",
    "rank_one",
    "subspace_blueprints",
    "terms_keeping",
    "tucker",
]
