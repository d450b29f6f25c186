"""Copies of models: as deepcopy makes them, and with what deepcopy loses."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon.surgery import _copies, _guard, _survey
from convsurgeon.surgery._calls import Watch
from convsurgeon.surgery._copies import call, copy_module, shadow
from convsurgeon.surgery._functional import Names


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))


def test_attributes_of_parameters_are_kept() -> None:
    model = net()
    lock = threading.Lock()
    model[0].weight.no_decay = True
    model[3].weight.group = {"lr": 0.1, "owner": model[3]}
    model[3].bias.lock = lock
    student = cs.rewrite(model)
    assert student[0].weight.no_decay
    assert student[3].weight.group == {"lr": 0.1, "owner": student[3]}
    assert student[3].weight.group is not model[3].weight.group
    assert student[3].bias.lock is lock
    assert not vars(student[2].pointwise.weight)


class Views(nn.Module):
    """Views of a buffer in a list and in a buffer of their own, an empty dict with two names, a tensor outside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("whole", self.table.view(2, 3))
        self.views = [self.table[:2], self.table.flip(0)]
        self.cache: dict[str, Any] = {}
        self.same_cache = self.cache
        self.order: OrderedDict[str, Any] = OrderedDict()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


@pytest.mark.parametrize(
    "copier", [copy_module, shadow, lambda model: cs.rewrite(model, mapping={"conv": "depthwise"})]
)
def test_what_shares_memory_does_so_in_the_copy(copier: Any) -> None:
    model = Views()
    copied = copier(model)
    copied.table += 10
    assert model.table.tolist() == [0, 1, 2, 3, 4, 5]
    assert copied.views[0].tolist() == [10, 11]
    assert copied.whole.tolist() == [[10, 11, 12], [13, 14, 15]]
    assert copied.views[1].tolist() == [5, 4, 3, 2, 1, 0]
    assert copied.cache is copied.same_cache
    assert copied.cache is not model.cache
    assert type(copied.order) is OrderedDict
    assert copied._forward_hooks is not model._forward_hooks


class Itself(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
        return self


class Parts(nn.Module):
    """Copied with the parameters and children of the original."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def __deepcopy__(self, memo: dict[int, Any]) -> Parts:
        return copy.copy(self)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(("inner", "shared"), [(Itself(nn.Conv2d(8, 8, 3)), "4"), (Parts(), "4.linear")])
@pytest.mark.parametrize("use", [cs.survey, cs.plan, cs.rewrite])
def test_a_copy_that_is_none_is_refused_and_the_model_stays(use: Any, inner: nn.Module, shared: str) -> None:
    model = net().append(inner)
    before = repr(model)
    with pytest.raises(cs.errors.SurveyError, match=f"the copy shares {shared} with it"):
        use(model)
    assert repr(model) == before


def closing_over(tensor: Tensor) -> nn.Module:
    """A network whose hook writes to a tensor that it has not registered."""

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        tensor.add_(1)

    model = net()
    model[0].register_forward_hook(count)
    return model


class CountsOnItsClass(nn.Sequential):
    calls = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        COUNT.add_(1)
        out: Tensor = super().forward(x)
        return out


COUNT = torch.zeros(1)


@pytest.mark.parametrize("inputs", [None, torch.zeros(1, 3, 8, 8)])
@pytest.mark.parametrize("use", [cs.survey, cs.plan, cs.rewrite])
def test_no_run_of_a_copy_writes_to_a_tensor_outside_of_it(use: Any, inputs: Any) -> None:
    CountsOnItsClass.calls.zero_()
    COUNT.zero_()
    use(CountsOnItsClass(*net()), example_inputs=inputs)
    assert CountsOnItsClass.calls.item() == COUNT.item() == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: cs.survey(model, example_inputs=x),
        lambda model, x: cs.rewrite(model, cs.plan(model), example_inputs=x),
        lambda model, x: cs.surgery.check_outputs(model, model, x),
        lambda model, x: cs.surgery.count_macs(model, x),
    ],
)
def test_a_closure_that_is_written_to_is_refused_and_as_before(use: Any) -> None:
    tensor = torch.full((2,), 5.0)
    with pytest.raises(cs.errors.SurveyError, match="Sequential writes to a tensor that a closure leads to"):
        use(closing_over(tensor), torch.zeros(1, 3, 8, 8))
    assert tensor.tolist() == [5.0, 5.0]


class DrawsWhenSwitched(nn.Sequential):
    def train(self, mode: bool = True) -> DrawsWhenSwitched:
        torch.rand(1)
        super().train(mode)
        return self


def test_a_switch_that_draws_leaves_the_random_state() -> None:
    model, before = DrawsWhenSwitched(*net()), torch.get_rng_state()
    cs.rewrite(model, example_inputs=torch.zeros(1, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [lambda key: {key: 2.0}, lambda key: {key}])
@pytest.mark.parametrize("use", [cs.survey, cs.plan, cs.rewrite])
def test_what_is_looked_up_by_id_is_refused(use: Any, kind: Any) -> None:
    model = nn.Sequential(net())
    model[0].gains = kind(id(model[0][2]))
    with pytest.raises(cs.errors.SurveyError) as caught:
        use(model)
    assert str(caught.value) == (
        "Sequential cannot be copied: 0.gains holds the id() of 0.2, and a copy has other ids; "
        "use the module itself as key, or its name"
    )


def test_lazy_layers_that_cannot_be_copied_are_named() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Conv2d(8, 8, 3))
    with pytest.raises(cs.errors.SurveyError, match="Sequential has lazy layers, which have no weights yet; run it"):
        cs.rewrite(model)


def test_watching_a_run_keeps_no_tensor_of_it_alive() -> None:
    model, seen = net(), []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    watch = Watch(Names(model).kernels, set(model.modules()))
    gc.disable()
    try:
        call(model, torch.zeros(1, 3, 8, 8), watch)
        assert len(watch.convolutions) == 2
        assert [reference() for reference in seen] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("inputs", [None, torch.zeros(1, 3, 8, 8)])
@pytest.mark.parametrize("use", [cs.survey, cs.plan, cs.rewrite])
def test_no_copy_outlives_its_use(use: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy-on-write copy that is left lying in a cycle would move the model's memory at its next step."""
    made = []

    def noting(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> nn.Module:
            made.append(weakref.ref(copied := original(*args, **kwargs)))
            return copied

        return call

    for room in (_copies, _guard, _survey):
        monkeypatch.setattr(room, "shadow", noting(_copies.shadow))
    gc.disable()
    try:
        use(net(), example_inputs=inputs)
        assert len(made) > 0
        assert {reference() for reference in made} == {None}
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "use",
    [
        cs.survey,
        cs.plan,
        cs.rewrite,
        cs.plan_of,
        lambda given: cs.save(given, "a.pt"),
        lambda given: cs.export(given, "a.onnx", example_inputs=torch.zeros(1, 3, 8, 8)),
    ],
)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (net().state_dict(), "got a OrderedDict, which holds weights and no network; build the model"),
        (nn.Conv2d, "got the class Conv2d itself; give an instance"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_model_is_said(use: Any, given: Any, message: str) -> None:
    with pytest.raises(cs.errors.SurveyError, match=message):
        use(given)


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ({"keep": 3}, "keep must be a pattern, .* got 3"),
        ({"to": None}, "to must be the name of an op, .* got None"),
        ({"only": [1]}, r"only must be a pattern, .* got \[1\]"),
        ({"mapping": ["a"]}, r"mapping must map patterns to ops, .* got \['a'\]"),
    ],
)
def test_selectors_of_the_wrong_type_are_said(selectors: Any, message: str) -> None:
    with pytest.raises(cs.errors.SelectorError, match=message):
        cs.plan(net(), **selectors)
