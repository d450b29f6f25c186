"""Attributes of parameters, by which optimizers group them: a converted kernel's go to its op's parameters."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convsurgeon as cs
from convsurgeon import ops
from convsurgeon.surgery import copy_module


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(12, 12, 3, 3) / 10)
        self.shift = nn.Parameter(torch.zeros(12))
        self.stem.weight.no_decay = True
        self.body.weight.lr_scale = 0.5
        self.body.weight.tags = {"group": ["a", 1]}
        self.body.bias.no_decay = True
        self.kernel.no_decay = "kernel"
        self.shift.no_decay = "shift"

    def forward(self, x):
        return F.conv2d(self.body(self.stem(x).relu()).relu(), self.kernel, self.shift, padding=1)


def marks(module):
    return {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}


def require_marks(student):
    for name, parameter in student.body.named_parameters():
        bias = name.endswith("bias")
        assert vars(parameter) == ({"no_decay": True} if bias else {"lr_scale": 0.5, "tags": {"group": ["a", 1]}})
    assert all(vars(parameter) == {"no_decay": "kernel"} for parameter in student.kernel.parameters())
    assert vars(student.shift) == {"no_decay": "shift"}
    assert vars(student.stem.weight) == {"no_decay": True}
    assert vars(student.stem.bias) == {}


@pytest.mark.parametrize("name", ops.names())
def test_every_op_gets_them(name):
    model = Net()
    before = marks(model)
    student = cs.rewrite(model, name, only=["body", "kernel"], example_inputs=torch.zeros(1, 3, 9, 9))
    assert len(cs.plan_of(student).converted) == 2
    require_marks(student)
    assert marks(model) == before
    next(student.body.parameters()).tags["group"].append(2)
    assert model.body.weight.tags == {"group": ["a", 1]}


def student_of(model=None):
    return cs.rewrite(model or Net(), "depthwise", example_inputs=torch.zeros(1, 3, 9, 9))


def loaded(student, tmp_path, **kwargs):
    cs.save(student, tmp_path / "net.pt")
    return cs.load(tmp_path / "net.pt", **kwargs)


@pytest.mark.parametrize(
    "travel",
    [
        lambda student, path: copy_module(student),
        lambda student, path: loaded(student, path, trust=True),
        lambda student, path: loaded(student, path, trust_modules=["test_bring_attributes"]),
        lambda student, path: cs.calibrate(Net(), student, torch.randn(12, 3, 9, 9), polish=False),
        lambda student, path: cs.rewrite(Net(), cs.plan_of(student)),
        lambda student, path: cs.surgery.rebuild(Net(), cs.plan_of(student)),
    ],
    ids=["copy", "pickle", "safe pickle", "calibrate", "plan", "rebuild"],
)
def test_they_travel(travel, tmp_path):
    require_marks(travel(student_of(), tmp_path))


def test_a_second_rewrite_keeps_those_of_the_first():
    student = student_of()
    again = cs.rewrite(student, "none", mapping={"stem": "group"}, options={"group.groups": 3})
    assert type(again.stem).__name__ == "GroupConv2d"
    for name, parameter in again.stem.named_parameters():
        assert vars(parameter) == ({} if name.endswith("bias") else {"no_decay": True})
    for part in ("body", "kernel"):
        assert marks(getattr(again, part)) == marks(getattr(student, part))


def weight_normed(net):
    torch.nn.utils.parametrizations.weight_norm(net.body)
    for name, parameter in net.body.named_parameters():
        if name != "bias":
            parameter.lr_scale, parameter.tags = 0.5, {"group": ["a", 1]}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def weight_normed_by_a_hook(net):
    torch.nn.utils.weight_norm(net.body)
    net.body.weight_v.lr_scale, net.body.weight_g.tags = 0.5, {"group": ["a", 1]}


def pruned(net):
    torch.nn.utils.prune.l1_unstructured(net.body, "weight", 0.3)
    net.body.weight_orig.lr_scale, net.body.weight_orig.tags = 0.5, {"group": ["a", 1]}


def half(net):
    marked = {name: dict(vars(parameter)) for name, parameter in net.named_parameters()}
    net.double()
    assert marks(net) == marked


def frozen(net):
    net.body.weight.requires_grad_(False)


class Padded(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def subclassed(net):
    old = net.body
    net.body = Padded(8, 12, 3)
    net.body.weight, net.body.bias = old.weight, old.bias


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [weight_normed, weight_normed_by_a_hook, pruned, half, frozen, subclassed])
def test_whatever_the_weight_is_computed_from(change):
    net = Net()
    change(net)
    student = cs.rewrite(net, "depthwise")
    assert "body" in {decision.fqn.split(".")[0] for decision in cs.plan_of(student).converted}
    kernel = [each for name, each in student.body.named_parameters() if not name.endswith("bias")]
    assert kernel
    assert all(vars(each) == {"lr_scale": 0.5, "tags": {"group": ["a", 1]}} for each in kernel)


def test_tensors_stay_behind():
    net = Net()
    net.body.weight.mask = torch.ones(12, 8, 3, 3)
    net.body.weight.masks = [torch.ones(1)]
    net.stem.weight.mask = torch.ones(8, 3, 3, 3)
    student = student_of(net)
    for parameter in student.body.parameters():
        assert not hasattr(parameter, "mask")
        assert not hasattr(parameter, "masks")
    assert torch.equal(student.stem.weight.mask, net.stem.weight.mask)


def test_what_cannot_be_copied_is_shared_and_the_models_parts_lead_to_the_students():
    net = Net()
    net.body.weight.lock = lock = threading.Lock()
    net.body.weight.owner = net.body
    net.body.bias.after = net.stem
    student = student_of(net)
    for name, parameter in student.body.named_parameters():
        if name.endswith("bias"):
            assert parameter.after is student.stem
        else:
            assert parameter.lock is lock
            assert parameter.owner is student.body


def test_parameter_groups_by_an_attribute():
    student = student_of()
    groups = {}
    for name, parameter in student.named_parameters():
        groups.setdefault(getattr(parameter, "lr_scale", 1.0), []).append(name)
    assert groups[0.5] == ["body.spatial.weight", "body.pointwise.weight"]
