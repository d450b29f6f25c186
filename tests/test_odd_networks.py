"""Awkward networks are converted, or kept for the right reason, and obey every law of whole models."""

from __future__ import annotations

import pytest
import torch
from odd_convolutions import ODD
from odd_networks import Odd

from convsurgeon.surgery import Plan, plan
from convsurgeon.testing import check_model

# torch's own, of an even kernel
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def outcome(the_plan: Plan) -> tuple[set[str], dict[str, str]]:
    """The names of what is converted, and the reasons of what is kept."""
    kept = {" = ".join(decision.fqns): decision.reason for decision in the_plan.kept}
    return {" = ".join(decision.fqns) for decision in the_plan.converted}, kept


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_expected_outcome_and_every_law(odd: Odd) -> None:
    torch.manual_seed(0)
    model = odd.make()
    if odd.error is not None:
        with pytest.raises(odd.error[0]) as caught:
            check_model(model, example_inputs=odd.inputs)
        assert odd.error[1] in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        return
    converted, kept = outcome(plan(model, example_inputs=odd.inputs))
    assert converted == set(odd.converted), kept
    assert set(kept) == set(odd.kept)
    for fqn, fragment in odd.kept.items():
        assert fragment in kept[fqn]
    check_model(model, example_inputs=odd.inputs)
