"""The survey finds every convolution, with its facts, and touches nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from nets import Branching, Shared, Small, Witness, conv
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon.surgery import Site, survey

X8 = torch.linspace(-1, 1, 8 * 36).reshape(1, 8, 6, 6)
X3 = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


def sites(model: nn.Module, **kwargs: object) -> dict[str, Site]:
    return {site.fqn: site for site in survey(model, **kwargs).sites}


def test_every_convolution_with_geometry_sizes_and_macs() -> None:
    found = survey(Small().eval(), example_inputs=X3)
    assert [site.fqn for site in found.sites] == [
        *("stem", "conv1", "conv2", "shortcut", "depth", "grouped", "last"),
    ]
    by_name = {site.fqn: site for site in found.sites}
    assert by_name["conv1"].spec == cs.ConvSpec(8, 16, (3, 3), (2, 2), (1, 1), bias=False)
    assert by_name["conv1"].input_sizes == ((8, 8),)
    assert by_name["conv1"].macs == 8 * 16 * 9 * 4 * 4
    assert by_name["depth"].macs == 16 * 9 * 4 * 4
    assert found.macs == sum(site.macs for site in found.sites if site.macs)
    assert {site.calls for site in found.sites} == {1}
    assert {site.routes for site in found.sites} == {("module", "fx", "observed")}
    assert {site.type for site in found.sites} == {"Conv2d"}
    assert found.observed
    assert found.untraced == ()
    assert found.model == "Small"


def test_macs_are_those_of_one_image_whatever_the_batch() -> None:
    one, four = (survey(Small(), example_inputs=torch.ones(n, 3, 8, 8)).macs for n in (1, 4))
    assert one == four


def test_neighbours() -> None:
    found = sites(Small())
    assert (found["stem"].norm, found["stem"].activation) == ("norm0", "relu")
    assert (found["conv1"].norm, found["conv1"].activation) == ("norm1", "ReLU")
    assert (found["conv2"].norm, found["conv2"].activation) == ("norm2", None)
    assert [name for name, site in found.items() if site.residual] == ["conv2", "shortcut"]
    assert [name for name, site in found.items() if site.feeds_head] == ["last"]
    assert [name for name, site in found.items() if site.stem] == ["stem"]


def test_a_submodule_named_add_is_no_addition() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)
            self.other = conv(8, 8)
            self.add = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.add(self.conv(x))).add(1.0)

    assert not any(site.residual for site in survey(Named()).sites)


def test_without_an_input_there_are_no_sizes() -> None:
    found = survey(Small())
    assert found.macs is None
    assert not found.observed
    assert all(site.input_sizes == () and site.macs is None for site in found.sites)
    assert all(site.routes == ("module", "fx") and site.calls == 1 for site in found.sites)


def test_a_shared_module_is_one_site_with_all_its_names_and_calls() -> None:
    found = survey(Shared(), example_inputs=X8)
    assert [site.fqns for site in found.sites] == [("first", "alias", "block.2"), ("block.0",)]
    shared = found.sites[0]
    assert shared.calls == 2
    assert shared.input_sizes == ((6, 6), (6, 6))
    assert shared.macs == 2 * 8 * 8 * 9 * 36
    assert survey(Shared()).sites[0].calls == 2


def test_an_untraceable_parent_still_yields_its_convolutions() -> None:
    found = survey(Branching(), example_inputs=X8)
    by_name = {site.fqn: site for site in found.sites}
    assert list(by_name) == ["body.0", "body.2", "up", "down"]
    assert [name for name, _ in found.untraced] == ["(root)"]
    assert "\n" not in found.untraced[0][1]
    assert by_name["body.0"].routes == ("module", "fx", "observed")
    assert by_name["body.0"].activation == "ReLU"
    assert sorted([by_name["up"].calls, by_name["down"].calls]) == [0, 1]


def test_the_graph_of_a_part_does_not_tell_how_often_the_part_is_called() -> None:
    assert [site.calls for site in survey(Branching()).sites] == [None] * 4


class Late(nn.Module):
    """Registers its layers in another order than it calls them."""

    def __init__(self, *, wide_first: bool = False, linear_first: bool = False, tricky: bool = False) -> None:
        super().__init__()
        self.second = conv(4, 4)
        self.first = conv(4, 4)
        self.wide = conv(8, 4) if wide_first else nn.Identity()
        self.linear = nn.Linear(6, 6) if linear_first else nn.Identity()
        self.tricky = tricky

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.wide(self.linear(x)))
        if self.tricky and x.sum() > 1e9:
            return x
        return self.second(x)


def stems(model: nn.Module, channels: int | None = None) -> list[str]:
    kwargs = {} if channels is None else {"example_inputs": torch.ones(1, channels, 6, 6)}
    return [site.fqn for site in survey(model, **kwargs).sites if site.stem]


def test_the_stem_is_first_in_call_order() -> None:
    assert stems(Late()) == ["first"]
    assert stems(Late(), 4) == ["first"]
    assert stems(Late(tricky=True), 4) == ["first"]


def test_without_trace_and_input_a_generated_image_shows_the_order() -> None:
    assert stems(Late(tricky=True)) == ["first"]


def test_the_stem_is_first_in_module_order_where_nothing_shows_the_calls() -> None:
    class TwoInputs(Late):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    assert stems(TwoInputs(tricky=True)) == ["second"]


def test_parallel_stems() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.three, self.next = conv(3, 8, 1), conv(3, 8), conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.next(self.one(x) + self.three(x))

    assert stems(Parallel()) == ["one", "three"]
    assert stems(Parallel(), 3) == ["one", "three"]


def test_no_stem_after_a_wide_convolution_or_a_linear_layer() -> None:
    assert stems(Late(wide_first=True)) == []
    assert stems(Late(wide_first=True), 8) == []
    assert stems(Late(linear_first=True)) == []
    assert stems(Late(linear_first=True), 4) == []


@pytest.mark.parametrize(("channels", "expected"), [(4, ["0"]), (5, [])])
def test_a_stem_has_at_most_four_channels(channels: int, expected: list[str]) -> None:
    assert stems(nn.Sequential(conv(channels, 8), conv(8, 8))) == expected


def test_what_is_no_2d_convolution_is_listed_with_a_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv1d(8, 8, 3, padding=1)
            self.three = nn.Conv3d(1, 1, 3, padding=1)
            self.up = nn.ConvTranspose2d(8, 8, 2)
            self.two = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x.flatten(2)).view_as(x)
            return self.up(self.two(self.three(x[:, None])[:, 0]))

    found = sites(Mixed(), example_inputs=X8)
    for name, kind in (("one", "Conv1d"), ("three", "Conv3d"), ("up", "ConvTranspose2d")):
        assert found[name].spec is None
        assert found[name].obstacle == f"{kind} is not a Conv2d"
        assert found[name].calls == 1
        assert (found[name].input_sizes, found[name].macs) == ((), None)
    assert found["two"].obstacle is None


def test_ops_of_a_student_are_one_site_each() -> None:
    student = cs.rewrite(Small(), "shift")
    found = sites(student, example_inputs=X3)
    assert list(found) == list(sites(Small()))
    assert (found["conv1"].op, found["conv1"].type) == ("shift", "ShiftConv2d")
    assert found["conv1"].macs == 8 * 16 * 4 * 4
    assert found["conv1"].spec == sites(Small())["conv1"].spec
    assert found["conv1"].norm == "norm1"
    assert found["stem"].op is None


class Custom(nn.Conv2d):
    """A subclass with nothing of its own."""


class Clamped(nn.Conv2d):
    """A max-norm constraint, as networks for biosignals have: forward writes to the weight."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(input)


def test_a_subclass_is_named_with_its_module() -> None:
    site = survey(nn.Sequential(Clamped(8, 8, 3))).sites[0]
    assert site.type.endswith("test_survey.Clamped")
    assert site.obstacle == f"{site.type} is a subclass of Conv2d that writes to its weight when it runs"
    assert survey(nn.Sequential(Custom(8, 8, 3))).sites[0].obstacle is None


def test_a_forward_that_was_replaced_is_an_obstacle() -> None:
    model = nn.Sequential(conv(8, 8))
    model[0].forward = lambda x: x
    assert survey(model).sites[0].obstacle == "its forward was replaced by one that runs 0 convolutions, not one"


def test_a_weight_that_is_no_parameter_is_called_what_it_is() -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8), Custom(8, 8, 3), conv(8, 8))
    for module in (model[0], model[1]):
        weight = module.weight.detach().clone()
        del module.weight
        (module.register_buffer if module is model[0] else module.__setattr__)("weight", weight)
    original = model[3]
    original.forward = lambda x: nn.functional.conv2d(x, 2 * original.weight, original.bias, padding=1)
    notes = [site.note for site in survey(model).sites]
    assert notes == [
        "started from its weight, which is a buffer",
        "started from its weight, which is a plain tensor",
        None,
        "started from the kernel that its replaced forward computes",
    ]


class WithMask(nn.Conv2d):
    """As partial convolutions are, which return a mask besides."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input > 0


def test_a_subclass_that_returns_more_than_a_tensor_is_told_so() -> None:
    site = survey(nn.Sequential(WithMask(8, 8, 3))).sites[0]
    assert site.obstacle == f"{site.type} is a subclass of Conv2d that returns a tuple, and an op returns a tensor"


def test_tied_weights_are_an_obstacle_that_names_both() -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8), conv(8, 8))
    model[1].weight = model[0].weight
    model[2].bias = model[0].bias
    obstacles = [site.obstacle for site in survey(model).sites]
    assert obstacles[0] == "its weight is tied, and stays so: 0.weight and 1.weight share memory"
    assert obstacles[1] == obstacles[0]
    assert obstacles[2] == "its bias is tied, and stays so: 0.bias and 2.bias share memory"


def prune(model: nn.Sequential, name: str) -> None:
    torch.nn.utils.prune.l1_unstructured(model[0], name, amount=0.5)


def weight_norm(model: nn.Sequential, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model[0], name)


def parametrize(model: nn.Sequential, name: str) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[0], name)


@pytest.mark.parametrize("compute", [prune, weight_norm, parametrize])
def test_a_computed_weight_is_baked_in(compute) -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8)).eval()
    compute(model, "weight")
    first, second = survey(model, example_inputs=X8).sites
    assert first.obstacle is None
    assert first.note is not None
    assert "baked in" in first.note or "the sparsity is lost" in first.note
    assert second.note is None
    kernel = model[0].weight.detach().clone()
    student = cs.rewrite(model, "group", options={"groups": 2}, example_inputs=X8)
    plain = nn.Sequential(conv(8, 8), copy.deepcopy(model[1]))
    plain[0].load_state_dict({"weight": kernel, "bias": model[0].bias.detach()})
    expected = cs.rewrite(plain, "group", options={"groups": 2})
    assert list(student.state_dict()) == list(expected.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(student(X8), expected(X8), rtol=0, atol=0)
    assert not student[0]._forward_pre_hooks
    student.train()(X8).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_computed_bias_is_baked_in() -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8))
    prune(model, "bias")
    site = survey(model).sites[0]
    assert site.obstacle is None
    assert site.note == "started from its pruned weight; the sparsity is lost"
    student = cs.rewrite(model, "shift")
    assert torch.equal(student[0].bias, model[0].bias)
    assert isinstance(student[0].bias, nn.Parameter)


def test_a_lazy_convolution_stays_lazy() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), conv(8, 8))
    witness = Witness(model)
    found = survey(model, example_inputs=X8)
    assert found.sites[0].obstacle == "it is lazy and has no weights yet; run the model once first"
    witness.check()


def test_a_complex_weight_is_an_obstacle() -> None:
    model = nn.Sequential(conv(8, 8, dtype=torch.complex64))
    assert survey(model).sites[0].obstacle == "its weight is complex"


class Noisy(nn.Module):
    """Draws random numbers, counts its calls, and writes into its input."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.conv = conv(8, 8)
        self.clamped = Clamped(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("count", torch.zeros(()))
        self.fails = fails
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        x = self.clamped(self.conv(x.add_(torch.rand(1)))) + torch.rand(1) + torch.randn(2)[0]
        if self.fails:
            raise RuntimeError("on purpose")
        return self.norm(x)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("observed", [False, True])
def test_nothing_is_touched(fails: bool, observed: bool) -> None:
    model = Noisy(fails=fails).train()
    model.norm.eval()
    model.conv.register_forward_hook(lambda *args: None)
    x = X8.clone()
    witness = Witness(model)
    if fails and observed:
        with pytest.raises(cs.errors.SurveyError, match="Noisy itself fails on the example input 1x8x6x6"):
            survey(model, example_inputs=x)
    else:
        survey(model, **({"example_inputs": x} if observed else {}))
    witness.check()
    assert model.calls == 0
    assert torch.equal(x, X8)
    assert "forward" not in vars(model)


def test_arguments_may_be_a_tensor_a_tuple_or_a_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor, scale: Tensor, *, shift: Tensor | None = None) -> Tensor:
            return self.conv(input=x) * scale

    model = Two()
    scale = torch.ones(())
    for inputs in ((X8, scale), {"x": X8, "scale": scale, "shift": scale}):
        assert survey(model, example_inputs=inputs).sites[0].input_sizes == ((6, 6),)
    with pytest.raises(cs.errors.SurveyError, match="fails on the example input 1x8x6x6"):
        survey(model, example_inputs=X8)


def test_optional_arguments_do_not_prevent_a_trace() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, mode: str = "a", size=(1, 2)) -> Tensor:
            return self.conv(x) if mask is None and mode == "a" and size[0] == 1 else x

    assert survey(Optional()).untraced == ()


def test_a_model_that_cannot_be_copied_says_so_in_one_line() -> None:
    model = nn.Sequential(conv(8, 8))
    model.stream = (i for i in range(3))
    with pytest.raises(cs.errors.SurveyError, match="Sequential cannot be copied") as caught:
        survey(model)
    assert "\n" not in str(caught.value)


def test_a_model_without_convolutions_has_an_empty_survey() -> None:
    found = survey(nn.Linear(2, 2), example_inputs=torch.ones(1, 2))
    assert found.sites == ()
    assert found.macs == 0


def test_a_root_that_is_the_convolution() -> None:
    site = survey(conv(8, 8), example_inputs=X8).sites[0]
    assert (site.fqn, site.fqns, site.calls) == ("(root)", ("",), 1)


def test_the_run_is_in_eval_mode_whatever_the_models_mode() -> None:
    # in train mode a batch norm refuses a batch of one value per channel
    model = nn.Sequential(conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).train()
    assert survey(model, example_inputs=X8).macs == 8 * 8 * (9 * 36 + 1)
    assert model.training
