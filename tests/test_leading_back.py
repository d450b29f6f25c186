"""Ways in which a copy leads back to the model, or past the plan: each is followed, named or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from nets import Witness, conv
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import check_outputs, survey

X = torch.linspace(-1, 1, 2 * 8 * 36).reshape(2, 8, 6, 6)


def test_a_tie_through_the_storage_is_a_tie_and_stays_one() -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8), conv(8, 8))
    model[1].weight = nn.Parameter(model[0].weight)
    assert model[1].weight is not model[0].weight
    obstacle = "its weight is tied, and stays so: 0.weight and 1.weight share memory"
    assert [site.obstacle for site in survey(model).sites] == [obstacle, obstacle, None]
    student = cs.rewrite(model, example_inputs=X)
    with torch.no_grad():
        student[0].weight.add_(1)
    assert torch.equal(student[1].weight, student[0].weight)
    assert not torch.equal(student[0].weight, model[0].weight)


def test_parameters_that_lie_side_by_side_in_one_storage_are_no_tie() -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8))
    together = torch.randn(2, 8, 8, 3, 3)
    for layer, weight in zip(model, together, strict=True):
        layer.weight = nn.Parameter(weight)
    student = cs.rewrite(model, keep="0", example_inputs=X)
    assert torch.equal(student[0].weight, model[0].weight)
    assert isinstance(student[1], AbstractCheapConv)


class Holder:
    """Holds a module where no walk goes."""

    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8)
        self.holder = Holder(conv(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.holder.layer(self.conv(x))


@pytest.mark.parametrize("given", [X, None])
def test_a_convolution_where_no_walk_goes_is_named(given: Tensor | None) -> None:
    found = survey(Hidden(), example_inputs=given)
    assert [(site.fqn, site.obstacle) for site in found.sites] == [
        ("conv", None),
        ("(root).conv2d()", "a Conv2d that is no submodule of the model; register it as one"),
    ]


class CopiedPastTheMemo(nn.Module):
    """Has a `__deepcopy__` that keeps its modules, but asks the memo for none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8)

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedPastTheMemo:
        made = type(self)()
        torch.rand(3)
        made.conv = self.conv if isinstance(self.conv, AbstractCheapConv) else conv(8, 8)
        if isinstance(self.conv, AbstractCheapConv):
            made.conv = type(self.conv).from_conv(conv(8, 8), self.conv.options)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_deepcopy_of_the_models_own_is_seen_to() -> None:
    model = nn.Sequential(CopiedPastTheMemo(), conv(8, 8))
    witness = Witness(model)
    student = cs.rewrite(model, "shift", example_inputs=X)
    witness.check()
    for decision in cs.plan_of(student).converted:
        assert isinstance(student.get_submodule(decision.fqn), AbstractCheapConv)


def test_a_deepcopy_that_builds_anew_is_refused() -> None:
    class Anew(CopiedPastTheMemo):
        def __deepcopy__(self, memo: dict[int, Any]) -> Anew:
            made = type(self)()
            made.load_state_dict(self.state_dict())
            return made

    with pytest.raises(cs.errors.GuardError, match="a __deepcopy__ that builds a module anew") as caught:
        cs.rewrite(nn.Sequential(Anew()), "shift", example_inputs=X)
    assert "\n" not in str(caught.value)


class Generating(nn.Module):
    def __init__(self, columns: int = 6) -> None:
        super().__init__()
        self.conv, self.columns = conv(8, 8), columns

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        yield self.conv(x)[..., : self.columns]


def test_a_generator_is_run_and_no_tensor_is_no_proof() -> None:
    assert check_outputs(Generating(), Generating(), X).tensors == 1
    with pytest.raises(cs.errors.GuardError, match=r"output\[0\] has size \(2, 8, 6, 5\)"):
        check_outputs(Generating(), Generating(5), X)

    class Silent(Generating):
        def forward(self, x: Tensor) -> str:
            return str(self.conv(x).shape)

    assert "hold no tensor that could be compared" in str(check_outputs(Silent(), Silent(), X))


class Calling(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 3


def test_what_call_does_besides_forward_stays() -> None:
    model = nn.Sequential(conv(8, 8), Calling(8, 8, 3, padding=1))
    student = cs.rewrite(model, "depthwise", example_inputs=X)
    assert cs.plan_of(student).converted[-1].fqn == "1.weight"
    with torch.no_grad():
        model[0].load_state_dict({"weight": student[0].as_dense(), "bias": student[0].bias})
        model[1].weight.copy_(student[1].weight.as_dense())
        torch.testing.assert_close(student(X), model(X), rtol=1e-4, atol=1e-5)  # float32


class Roundabout(nn.Module):
    """Calls its convolutions by all back doors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.flag = conv(8, 8), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.Conv2d.forward(self.one, x)
        x = self.two._conv_forward(x, self.two.weight, self.two.bias)
        return self.flag(x) if self.flag.weight.requires_grad else x


def test_back_doors_of_a_convolution() -> None:
    student = cs.rewrite(Roundabout(), "shift", example_inputs=X)
    assert isinstance(student.one, AbstractCheapConv)
    with torch.no_grad():
        expected = student.flag(student.two(student.one(X)))
        assert torch.equal(student(X), expected), "as with gradients, so without"


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(4, 8, 3, 3), "its weight is 4x8x3x3, and its attributes say 8x8x3x3; set them as the weight is"),
        (torch.zeros(8, 8, 3, 3, dtype=torch.int8), "its weight is torch.int8, no floating-point tensor"),
        (None, "it has no weight"),
    ],
)
def test_a_weight_that_does_not_fit_is_an_obstacle(weight: Tensor | None, reason: str) -> None:
    model = nn.Sequential(conv(8, 8), conv(8, 8))
    model[1].weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
    assert [site.obstacle for site in survey(model).sites] == [None, reason]


class Gain(nn.Conv2d):
    """A gain that starts at one."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.rand_like(weight) if self.training else weight


def test_what_shows_only_later_is_found_now() -> None:
    student = cs.rewrite(nn.Sequential(conv(8, 8), Gain()), example_inputs=X)
    assert cs.plan_of(student).converted[-1].fqn == "1.weight"
    noisy = nn.Sequential(conv(8, 8), conv(8, 8))
    torch.nn.utils.parametrize.register_parametrization(noisy[1], "weight", Noise())
    assert survey(noisy).sites[1].obstacle == "it changes its kernel in training"


def test_channels_that_are_numpys_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(np.int64(8), np.int64(8), np.int64(3), padding=np.int64(1)))
    plan = cs.plan(model)
    assert cs.Plan.from_json(plan.to_json()) == plan
    assert isinstance(cs.rewrite(model)[0].in_channels, int)


def test_a_student_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        student = cs.rewrite(nn.Sequential(conv(8, 8)), example_inputs=X)
    student(X).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
