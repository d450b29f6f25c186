"""The plan: a decision and a reason for every convolution, as data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import Shared, Small, Witness, conv
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon import Plan, ops
from convsurgeon.surgery import plan, survey

X3 = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


def decided(the_plan: Plan) -> dict[str, str | None]:
    return {decision.fqn: decision.op for decision in the_plan.decisions}


def reasons(the_plan: Plan) -> dict[str, str]:
    return {decision.fqn: decision.reason for decision in the_plan.decisions}


class Custom(nn.Conv2d):
    """A subclass with nothing of its own."""


class Blurred(nn.Conv2d):
    """A subclass that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_default_keeps_each_with_its_reason() -> None:
    found = plan(Small())
    assert decided(found) == {
        "stem": None,
        "conv1": "depthwise",
        "conv2": "depthwise",
        "shortcut": None,
        "depth": None,
        "grouped": None,
        "last": "depthwise",
    }
    said = reasons(found)
    assert said["stem"] == "it is the stem: the first layer, with 3 input channels"
    assert said["shortcut"] == "it is cheap already: 1x1"
    assert said["depth"] == "it is cheap already: depthwise"
    assert said["grouped"] == "it is cheap already: grouped (groups=4)"
    assert said["last"] == "5.8x fewer MACs"
    assert {decision.label for decision in found.converted} == {"converted"}


def test_converted_and_kept_split_the_plan() -> None:
    found = plan(Small())
    assert len(found.converted) == 3
    assert len(found.kept) == 4
    assert [*found.converted, *found.kept] == sorted(found.decisions, key=lambda decision: decision.op is None)


@pytest.mark.parametrize("name", ops.names())
def test_the_same_plan_with_and_without_an_input(name: str) -> None:
    assert plan(Small(), name) == plan(Small(), name, example_inputs=X3)
    assert plan(survey(Small()), name) == plan(Small(), name)


def test_where_the_op_would_cost_more_it_is_kept_unless_mapped() -> None:
    # 64 inputs to 2 outputs: the op's own spatial part outweighs the dense convolution
    model = nn.Sequential(conv(8, 64), conv(64, 2))
    kept = plan(model, "group", options={"groups": 8})
    assert decided(kept) == {"0": "group", "1": None}
    assert kept.decisions[1].label == "no gain"
    assert reasons(kept)["1"] == "group would cost 4.11x the MACs of the dense convolution"
    mapped = plan(model, "group", mapping={"1": "group"}, options={"groups": 8})
    assert decided(mapped) == {"0": "group", "1": "group"}
    assert reasons(mapped)["1"] == "4.1x more MACs, as mapped"


def test_the_cost_rule_sees_the_stride() -> None:
    # the pointwise part of bsconv runs at input resolution: at stride 3 on nine times the pixels
    model = nn.Sequential(*(conv(8, 8, stride=stride) for stride in (1, 2, 3)))
    found = plan(model, "bsconv")
    assert decided(found) == {"0": "bsconv", "1": "bsconv", "2": None}
    assert found.decisions[2].reason == "bsconv would cost 1.12x the MACs of the dense convolution"
    assert decided(plan(model, "depthwise"))["2"] == "depthwise"


def test_keep_wins_over_everything() -> None:
    found = plan(Small(), keep="conv*", only="*", mapping={"conv1": "shift", "*": "shift"})
    assert decided(found)["conv1"] is decided(found)["conv2"] is None
    assert reasons(found)["conv1"] == "kept by --keep 'conv*'"
    assert decided(found)["last"] == "shift"


def test_mapping_overrides_the_default_keeps() -> None:
    found = plan(Small(), mapping={"stem": "shift"})
    assert decided(found)["stem"] == "shift"
    assert decided(found)["conv1"] == "depthwise"


class Pointwise(nn.Module):
    """Mostly 1x1: a stem, what `pointwise` is for, a grouped one, one too narrow to gain, and a 3x3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, stride=2, padding=1)
        self.grouped, self.narrow = nn.Conv2d(16, 16, 1, groups=4), nn.Conv2d(16, 1, 1)
        self.spatial = conv(1, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(self.narrow(self.grouped(self.wide(self.stem(x)))))


def test_pointwise_converts_the_1x1_ones_besides() -> None:
    found = plan(Pointwise(), pointwise="lowrank")
    assert decided(found) == {
        "stem": None,
        "wide": "lowrank",
        "grouped": None,
        "narrow": None,
        "spatial": "depthwise",
    }
    said = reasons(found)
    assert said["stem"].startswith("it is the stem")
    assert said["wide"] == "2.0x fewer MACs; rank=4 for 0.25"
    assert said["grouped"] == "it is cheap already: grouped (groups=4)"
    assert said["narrow"] == "lowrank would cost 1.06x the MACs of the dense convolution"
    assert found.tag == "depthwise-lowrank"
    student = cs.rewrite(Pointwise(), pointwise="lowrank", example_inputs=X3)
    assert cs.plan_of(student) == found
    with pytest.raises(cs.errors.PlanError, match="carried out as it is"):
        cs.rewrite(Pointwise(), found, pointwise="lowrank")


def test_only_the_1x1_ones() -> None:
    found = plan(Pointwise(), "none", pointwise="lowrank")
    assert [name for name, op in decided(found).items() if op] == ["wide"]
    assert reasons(found)["spatial"] == "kept by --to none"


def test_none_leaves_all_but_what_is_mapped() -> None:
    found = plan(Small(), "none", mapping={"conv2": "shift"})
    assert [name for name, op in decided(found).items() if op] == ["conv2"]
    assert reasons(found)["shortcut"] == "it is cheap already: 1x1"


def test_keep_only_and_mapping_go_before_pointwise() -> None:
    model = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(4)))
    found = plan(model, pointwise="lowrank", keep="0", mapping={"[01]": "lowrank"}, only="[012]")
    assert decided(found) == {"0": None, "1": "lowrank", "2": "lowrank", "3": None}
    refused = plan(model, pointwise="lowrank", mapping={"2": "shift"})
    assert reasons(refused)["2"] == "shift: needs a spatial kernel, not 1x1"


def test_options_beside_pointwise() -> None:
    model = nn.Sequential(conv(8, 16), nn.Conv2d(16, 16, 1))
    for options in ({"lowrank.rank": 0.5}, ops.get("lowrank").parse_options({"rank": 0.5})):
        assert plan(model, pointwise="lowrank", options=options).decisions[1].options == {"rank": 8}
    both = plan(model, "lowrank", pointwise="lowrank", options={"rank": 2})
    assert [decision.options for decision in both.decisions] == [{"rank": 2}, {"rank": 2}]
    with pytest.raises(cs.errors.OptionError, match=r"say which op it is for: group\.groups"):
        plan(model, "group", pointwise="lowrank", options={"groups": 2})
    energy = plan(model, pointwise="lowrank", options={"lowrank.rank": "10%"}).decisions[1]
    assert energy.reason.endswith("rank=1 for 10%")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"pointwise": "shift"},
            cs.errors.SelectorError,
            "--pointwise 'shift': it needs a spatial kernel, not 1x1.",
        ),
        ({"pointwise": "lowrnk"}, cs.errors.UnknownNameError, "Did you mean 'lowrank'?"),
        ({"to": "none"}, cs.errors.SelectorError, "--to none converts nothing by itself; say --pointwise OP or --map"),
        (
            {"to": "none", "pointwise": "lowrank", "keep": "wide"},
            cs.errors.NothingToConvertError,
            "0 of 5 convolutions of Pointwise can become 'lowrank'",
        ),
    ],
)
def test_what_pointwise_cannot_be_is_said(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        plan(Pointwise(), **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_mapping_that_matches_wins() -> None:
    assert decided(plan(Small(), mapping={"conv*": "shift", "conv1": "group"}))["conv1"] == "group"
    assert decided(plan(Small(), mapping={"conv1": "group", "conv*": "shift"}))["conv1"] == "shift"


def test_mapping_cannot_do_what_the_op_cannot() -> None:
    found = plan(Small(), mapping={"grouped": "shift"})
    assert decided(found)["grouped"] is None
    assert reasons(found)["grouped"] == "shift: needs groups=1, not groups=4"
    assert found.decisions[5].label == "shift refused"


def test_a_subclass_is_decided_by_what_it_computes() -> None:
    found = plan(nn.Sequential(conv(8, 8), Custom(8, 8, 3), Blurred(8, 8, 3)))
    assert decided(found) == {"0": "depthwise", "1": "depthwise", "2.weight": "depthwise"}
    assert reasons(found)["2.weight"].endswith("inside the forward of test_plan.Blurred, which stays")


def test_only_restricts_and_does_not_override() -> None:
    found = plan(Small(), only=["stem", "conv2"])
    assert [name for name, op in decided(found).items() if op] == ["conv2"]
    assert reasons(found)["last"] == "not selected by --only 'stem' 'conv2'"
    assert reasons(found)["stem"].startswith("it is the stem")


def test_a_bare_string_is_one_pattern() -> None:
    assert plan(Small(), keep="conv1") == plan(Small(), keep=["conv1"])
    assert plan(Small(), only="last") == plan(Small(), only=("last",))


def test_filter_fn_sees_module_and_name() -> None:
    model = Small()
    seen = []

    def wide(module: nn.Module, fqn: str) -> bool:
        seen.append((module is model.get_submodule(fqn), fqn))
        return module.in_channels > 8

    found = plan(model, filter_fn=wide)
    assert seen == [(True, fqn) for fqn in decided(found)]
    assert [name for name, op in decided(found).items() if op] == ["conv2", "last"]
    assert reasons(found)["conv1"] == "filter_fn said no"
    with pytest.raises(cs.errors.SurveyError, match="filter_fn needs the model"):
        plan(survey(model), filter_fn=wide)


def test_a_pattern_reaches_a_shared_module_by_any_of_its_names() -> None:
    for pattern in ("first", "alias", "block.2"):
        assert decided(plan(Shared(), keep=pattern))["first"] is None


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ({"keep": "conv9"}, "--keep 'conv9' matched no convolution. Did you mean 'conv2'?"),
        ({"keep": ("last", "q*")}, "--keep 'q*' matched no convolution."),
        ({"only": "lst"}, "--only 'lst' matched no convolution. Did you mean 'last'?"),
        ({"mapping": {"fc": "shift"}}, "--map 'fc' matched no convolution."),
        ({"mapping": {"Conv1": "shift"}}, "--map 'Conv1' matched no convolution. Did you mean 'conv1'?"),
    ],
)
def test_a_selector_that_matches_nothing(selectors: dict[str, Any], message: str) -> None:
    with pytest.raises(cs.errors.SelectorError) as caught:
        plan(Small(), **selectors)
    assert str(caught.value) == message


def test_a_block_that_is_named_without_its_insides() -> None:
    with pytest.raises(cs.errors.SelectorError, match=r"Did you mean 'block\.\*'\?"):
        plan(Shared(), keep="block")


def test_nothing_converted_counts_the_reasons() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), conv(8, 8, groups=2))
    with pytest.raises(cs.errors.NothingToConvertError) as caught:
        plan(model, "bsconv")
    assert str(caught.value) == (
        "nothing to convert: 0 of 3 convolutions of Sequential can become 'bsconv': 2 are 1x1, 1 is grouped; "
        "`convsurgeon inspect` shows each"
    )


@pytest.mark.parametrize(
    ("channels", "why"),
    [((11, 11), " (no number of groups from 2 to 8 divides 11 input channels)"), ((11, 13), "")],
)
def test_nothing_converted_says_why_where_there_is_one_reason(channels: tuple[int, int], why: str) -> None:
    model = nn.Sequential(*(conv(width, 16) for width in channels))
    with pytest.raises(cs.errors.NothingToConvertError) as caught:
        plan(model, "group")
    assert f": 2 are group refused{why}; `convsurgeon inspect` shows each" in str(caught.value)


def test_nothing_to_convert_at_all() -> None:
    with pytest.raises(cs.errors.NothingToConvertError, match="Linear has no convolution;"):
        plan(nn.Linear(2, 2), keep="whatever")


def test_unknown_op_and_option() -> None:
    with pytest.raises(cs.errors.UnknownNameError, match=r"unknown op 'shft'\. Did you mean 'shift'\?"):
        plan(Small(), "shft")
    with pytest.raises(cs.errors.UnknownNameError, match="unknown op 'nope'"):
        plan(Small(), mapping={"conv1": "nope"})
    with pytest.raises(cs.errors.OptionError, match=r"group has no option 'group'\. Did you mean 'groups'"):
        plan(Small(), "group", options={"group": 4})
    with pytest.raises(cs.errors.OptionError, match="group: option groups must be of type int, got 'x'"):
        plan(Small(), "group", options={"groups": "x"})
    with pytest.raises(cs.errors.OptionError, match="groups must be at least 2"):
        plan(Small(), "group", options={"groups": 1})


def test_options_address_one_op_of_several() -> None:
    mapping = {"last": "group"}
    found = plan(Small(), "shift", mapping=mapping, options={"group.groups": 4, "shift.assignment": "fixed"})
    by_name = {decision.fqn: decision.options for decision in found.converted}
    assert by_name["last"]["groups"] == 4
    assert by_name["conv1"]["assignment"] == "fixed"
    with pytest.raises(cs.errors.OptionError, match=r"'groups' is ambiguous among shift, group; .*group\.gr"):
        plan(Small(), "shift", mapping=mapping, options={"groups": 4})
    with pytest.raises(cs.errors.OptionError, match=r"for op 'bsconv', which is not in use: shift, group"):
        plan(Small(), "shift", mapping=mapping, options={"bsconv.x": 4})


def test_options_may_be_the_options_of_an_op() -> None:
    group = ops.get("group")
    as_dict = plan(Small(), "group", options={"groups": 4})
    assert plan(Small(), "group", options=group.Options(groups=4)) == as_dict
    assert plan(Small(), "group", options={"group.groups": 4}) == as_dict
    mixed = plan(Small(), "shift", mapping={"last": "group"}, options=group.Options(groups=4))
    assert mixed.converted[-1].options["groups"] == 4
    with pytest.raises(cs.errors.OptionError, match="belong to none of the ops in use: shift"):
        plan(Small(), "shift", options=group.Options(groups=4))


def test_lowered_groups_are_shown() -> None:
    model = nn.Sequential(conv(12, 16), conv(16, 16), conv(7, 16))
    found = plan(model, "group", options={"groups": 8})
    assert found.decisions[0].options["groups"] == 6
    assert found.decisions[0].reason.endswith("; groups=6, since 8 does not fit")
    assert found.decisions[1].options["groups"] == 8
    assert "does not fit" not in found.decisions[1].reason
    assert found.decisions[2].options["groups"] == 7
    assert plan(nn.Sequential(conv(8, 8), conv(11, 8)), "group").decisions[1].reason == (
        "group: no number of groups from 2 to 8 divides 11 input channels"
    )


def test_the_caller_is_not_touched() -> None:
    model, keep, options = Small(), ["last"], {"groups": 4}
    mapping = {"conv1": "group"}
    witness = Witness(model)
    plan(model, "group", keep=keep, mapping=mapping, options=options, example_inputs=X3)
    with pytest.raises(cs.errors.SelectorError):
        plan(model, keep="nothing", example_inputs=X3)
    witness.check()
    assert (keep, options, mapping) == (["last"], {"groups": 4}, {"conv1": "group"})


@pytest.mark.parametrize("name", ops.names())
def test_json_both_ways_is_the_identity_and_byte_stable(name: str) -> None:
    found = plan(Small(), name, mapping={"stem": "group"}, keep="last")
    text = found.to_json()
    again = Plan.from_json(text)
    assert again == found
    assert again.to_json() == text == plan(Small(), name, mapping={"stem": "group"}, keep="last").to_json()
    assert Plan.from_dict(json.loads(text)) == found
    assert text.endswith("}\n")


def test_json_of_what_has_no_spec_or_a_named_padding() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 8, 3, padding="same"))
    found = plan(model)
    assert found.decisions[0].spec is None
    assert Plan.from_json(found.to_json()) == found


def test_tag() -> None:
    assert plan(Small(), "shift").tag == "shift"
    assert plan(Small(), "shift", mapping={"last": "group"}).tag == "group-shift"


def broken(**changes: Any) -> str:
    data = plan(Small()).to_dict()
    for path, value in changes.items():
        *parents, key = path.split("__")
        target: Any = data
        for parent in parents:
            target = target[int(parent) if parent.isdigit() else parent]
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "this is no plan"),
        ("null", "this is no plan"),
        ('{"format": "other"}', '"format": "convsurgeon-plan"'),
        (broken(version=2), "plan version 2 is not known here; expected 1"),
        (broken(version=...), "plan version None"),
        (broken(model=...), "malformed plan: a plan needs 'model'"),
        (broken(decisions=...), "malformed plan: a plan needs 'decisions'"),
        (broken(decisions=7), "malformed plan: decisions must be a list, got 7"),
        (broken(decisions="ab"), "malformed plan: decisions must be a list, got 'ab'"),
        (broken(decisions__0__fqns=...), "malformed plan: a decision needs 'fqns'"),
        (broken(decisions__0__fqns="stem"), "fqns must be a list of names, got 'stem'"),
        (broken(decisions__0__fqns=[]), "fqns must be a list of names"),
        (broken(decisions__0__fqns=[1]), "fqns must be a list of names"),
        (broken(decisions__0__op=3), "op must be a name, with a spec, or null, got 3"),
        (broken(decisions__0__options=None), "options must be an object, got None"),
        (broken(decisions__0__spec=[1]), "spec must be an object, got [1]"),
        (broken(decisions__0__spec__in_channels=...), "malformed plan: a spec needs 'in_channels'"),
        (broken(decisions__0__spec__in_channels="3"), "in_channels must be a whole number from 1 on, got '3'"),
        (broken(decisions__0__spec__color=1), "malformed plan: a spec has no 'color', but in_channels"),
        (broken(decisions__0__spec__kernel_size=3), "kernel_size must be two whole numbers from 1 on, got 3"),
        (broken(decisions__0__spec__stride=[1]), "stride must be two whole numbers"),
        (broken(decisions__0__spec__padding=None), "padding must be two whole numbers from 0 on, got None"),
        (broken(decisions__1__fqns=["stem"]), "the plan decides twice about 'stem'"),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(cs.errors.PlanError) as caught:
        Plan.from_json(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_is_frozen_and_can_be_edited_into_another() -> None:
    found = plan(Small())
    with pytest.raises(AttributeError):
        found.model = "x"  # type: ignore[misc]
    fewer = replace(found, decisions=found.decisions[:2])
    assert len(fewer.converted) == 1
    assert len(found.converted) == 3


@pytest.mark.parametrize("options", [{"rank": "90%"}, {}])
def test_numbers_that_are_not_finite_are_told_of_their_convolution(options: dict[str, object]) -> None:
    net = Small()
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(cs.errors.UnsupportedConvError, match=r"^conv2: its weight holds NaN or infinite numbers"):
        cs.rewrite(net, "lowrank", options=options)


def test_an_edited_plan_says_so() -> None:
    data = plan(Small(), "shift").to_dict()
    by_name = {item["fqns"][0]: item for item in data["decisions"]}
    by_name["stem"]["op"] = "depthwise"
    by_name["last"]["op"] = None
    found = {d.fqn: (d.op, d.label, d.reason) for d in Plan.from_dict(data).decisions}
    assert found["stem"] == ("depthwise", "converted", "as the plan was edited to say")
    assert found["last"] == (None, "kept by the plan", "as the plan was edited to say")
    assert found["conv1"][1] == "converted"


class Warm(nn.Sequential):
    """Three convolutions, and a flag that its first forward in train mode sets; the second is read by the flag."""

    def __init__(self, when: tuple[bool, bool]) -> None:
        super().__init__(*(conv(8, 8) for _ in range(3)))
        self.when, self.warm = when, False
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        now = self.warm, self.training
        if self.training:
            self.warm = True
            self.steps += 1
        x = super().forward(x)
        return x * self[1].weight.mean() if now == self.when else x


@pytest.mark.parametrize("when", [(warm, training) for warm in (False, True) for training in (False, True)])
def test_plan_and_rewrite_decide_alike_about_a_model_that_warms_up(when: tuple[bool, bool]) -> None:
    model, x = Warm(when), torch.linspace(-1, 1, 8 * 36).reshape(1, 8, 6, 6)
    witness = Witness(model)
    the_plan = plan(model, example_inputs=x)
    assert cs.plan_of(cs.rewrite(model, example_inputs=x)) == the_plan
    assert cs.plan_of(cs.rewrite(model, the_plan, example_inputs=x)) == the_plan
    # warm and in train mode is what the second step is, and nobody takes two
    expected = {"0", "2"} if when != (True, True) else {"0", "1", "2"}
    assert {decision.fqn for decision in the_plan.converted} == expected
    assert model.warm is False
    witness.check()
