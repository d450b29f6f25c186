"""Properties of surgery on whole networks that hypothesis draws: the public laws, and what goes beyond them."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Witness
from torch import nn

import convsurgeon as cs
from convsurgeon import ops
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import count_macs, example_like, plan, plan_of, rewrite, survey, totals
from convsurgeon.testing import ModelCase, check_model, model_laws, models
from convsurgeon.testing._networks import Functional, Switch, Twice, draw_model

SIZE = (3, 9, 9)
EXAMPLES = settings(max_examples=8)


@pytest.mark.parametrize("name", ops.names())
@EXAMPLES
@given(model=models())
def test_every_law_of_whole_models(name: str, model: nn.Module) -> None:
    check_model(model, name, example_inputs=example_like(model, (2, *SIZE)))


@pytest.mark.parametrize("law", model_laws().values(), ids=model_laws())
def test_a_law_can_be_run_alone(law) -> None:
    model = draw_model(random.Random(5).choice)
    witness = Witness(model)
    law(ModelCase(model, "group", example_inputs=example_like(model, (1, *SIZE)), options={"groups": 2}))
    witness.check()


def test_the_strategy_draws_every_kind_of_network() -> None:
    drawn = [draw_model(random.Random(seed).choice) for seed in range(60)]
    kinds = {type(module) for model in drawn for module in model.modules()}
    assert {Functional, Switch, Twice, nn.BatchNorm2d} <= kinds
    assert {model.training for model in drawn} == {False, True}
    assert {next(model.parameters()).dtype for model in drawn} == {torch.float32, torch.float64}
    again = draw_model(random.Random(0).choice)
    assert all(map(torch.equal, again.state_dict().values(), drawn[0].state_dict().values()))


def test_without_hypothesis_only_the_strategy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(cs.errors.ConvSurgeonError, match="strategies need hypothesis"):
        models()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    check_model(net, example_inputs=torch.ones(1, 3, 6, 6))


def test_what_rewrite_refuses_is_raised_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    x = torch.ones(1, 3, 6, 6)
    with pytest.raises(cs.errors.SelectorError, match="--keep 'x' matched no convolution"):
        check_model(model, example_inputs=x, keep="x")
    with pytest.raises(cs.errors.NothingToConvertError):
        check_model(model, example_inputs=x, keep="1")
    for law in model_laws().values():
        with pytest.raises(cs.errors.UnknownNameError):
            law(ModelCase(model, "no such op", example_inputs=x))


@EXAMPLES
@given(model=models(), name=st.sampled_from(ops.names()))
def test_names_stay_and_ops_stand_where_the_plan_says(model: nn.Module, name: str) -> None:
    student = rewrite(model, name)
    before, after = survey(model).sites, survey(student).sites
    assert {site.fqns for site in after} == {site.fqns for site in before}
    assert {site.fqns for site in after if site.op} == converted(student)
    found = {fqn for fqn, module in student.named_modules() if isinstance(module, AbstractCheapConv)}
    assert found == {fqns[0] for fqns in converted(student)}
    # shapes and sizes decide nothing
    assert plan(model, name, example_inputs=example_like(model, (1, *SIZE))) == plan_of(student)


def converted(student: nn.Module) -> set[tuple[str, ...]]:
    the_plan = plan_of(student)
    assert the_plan is not None
    return {decision.fqns for decision in the_plan.converted}


@EXAMPLES
@given(model=models(), name=st.sampled_from(ops.names()), data=st.data())
def test_the_caller_is_as_before_after_an_exception(model: nn.Module, name: str, data: st.DataObject) -> None:
    wrong = data.draw(
        st.sampled_from([{"keep": "x"}, {"options": {"no": 1}}, {"example_inputs": torch.ones(1, 1, 9, 9)}])
    )
    witness = Witness(model)
    with pytest.raises(cs.errors.ConvSurgeonError) as caught:
        rewrite(model, name, **wrong)
    assert "\n" not in str(caught.value)
    witness.check()


@EXAMPLES
@given(model=models(), name=st.sampled_from(ops.names()))
def test_costs_of_the_sites_are_all_there_is(model: nn.Module, name: str) -> None:
    x = example_like(model, (1, *SIZE))
    found, the_plan = survey(model, example_inputs=x), plan(model, name)
    assert count_macs(model, x).true == totals(the_plan, found).macs_before == found.macs


@EXAMPLES
@given(model=models())
def test_an_untraceable_part_hides_no_convolution(model: nn.Module) -> None:
    found = survey(model)
    mine = {module for module in model.modules() if isinstance(module, nn.Conv2d)}
    modules = {site.fqns[0] for site in found.sites if site.type != "F.conv2d"}
    assert {model.get_submodule(fqn) for fqn in modules} == mine
    kernels = {f"{fqn}.weight" for fqn, module in model.named_modules() if isinstance(module, Functional)}
    assert {site.fqns[0] for site in found.sites if site.type == "F.conv2d"} == kernels
    switches = [fqn for fqn, module in model.named_modules() if isinstance(module, Switch)]
    assert {fqn for fqn, _ in found.untraced} == ({"(root)", *switches} if switches else set())
