"""What is saved comes back bit by bit: values, strides, what shares memory, modes; and saved again, the same bytes."""

from __future__ import annotations

import copy
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import convsurgeon as cs
from convsurgeon import storage
from convsurgeon.errors import ModelError
from convsurgeon.record import read_record, update_record
from convsurgeon.surgery import Plan, plan, rewrite

NET = """
from torch import nn

class Net(nn.Module):
    class Block(nn.Module):
        class Act(nn.Module):
            def forward(self, x):
                return x.relu()

        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1), self.Act()

        def forward(self, x):
            return self.act(self.conv(x))

        def helper(self):
            raise RuntimeError("ran")

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b, self.c = self.Block(), self.Block(), self.Block()
        self.norm = nn.BatchNorm2d(8)
        self.head, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(self.c(self.b(self.a(self.stem(x))))).mean((2, 3))
        return self.other(self.head(x))

def nested():
    return nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2))))
"""


@pytest.fixture(autouse=True)
def fidelnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Write `NET` to fidelnet.py and work in its folder; forget it afterwards."""
    (tmp_path / "fidelnet.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield __import__("fidelnet")
    sys.modules.pop("fidelnet", None)


def net() -> nn.Module:
    torch.manual_seed(0)
    return storage.load("fidelnet:Net")


def places(model: nn.Module) -> dict[str, object]:
    """Return of every tensor what can be told from outside, with the tensors it shares its memory with."""
    tensors = model.state_dict(keep_vars=True)
    starts: dict[int, int] = {}
    for tensor in tensors.values():
        key = tensor.untyped_storage().data_ptr()
        starts[key] = min(starts.get(key, sys.maxsize), tensor.storage_offset())
    firsts: dict[object, str] = {}
    return {
        name: (
            tensor.dtype,
            tensor.stride(),
            tensor.requires_grad,
            type(tensor),
            tensor.detach().contiguous().view(-1).view(torch.uint8).tolist(),
            firsts.setdefault(id(tensor), name),
            firsts.setdefault(("storage", tensor.untyped_storage().data_ptr()), name),
            tensor.storage_offset() - starts[tensor.untyped_storage().data_ptr()],
        )
        for name, tensor in tensors.items()
    }


def modes(model: nn.Module) -> dict[str, tuple[bool, str]]:
    firsts: dict[int, str] = {}
    return {
        name: (module.training, firsts.setdefault(id(module), name))
        for name, module in model.named_modules(remove_duplicate=False)
    }


def channels_last(model: Any) -> None:
    model.to(memory_format=torch.channels_last)


def one_channels_last(model: Any) -> None:
    model.b.conv.to(memory_format=torch.channels_last)


def tied_parameters(model: Any) -> None:
    model.other.weight = model.head.weight


def shared_modules(model: Any) -> None:
    model.c = model.a
    model.other = model.head


def same_memory(model: Any) -> None:
    model.other.weight = nn.Parameter(model.head.weight.data)


def views(model: Any) -> None:
    both = torch.randn(3, 8)
    model.norm.running_mean = both[0]
    model.norm.running_var = both[1].abs_()
    model.head.bias.data = both[2]


def overlapping_views(model: Any) -> None:
    line = torch.randn(12)
    model.norm.running_mean, model.norm.running_var = line[:8], line[4:]


def transposed(model: Any) -> None:
    model.other.weight.data = model.head.weight.data.t()


def repeated(model: Any) -> None:
    model.norm.running_mean = torch.randn(1).expand(8)


def far_apart(model: Any) -> None:
    model.head.bias.data = torch.randn(800)[::100]


def dtypes(model: Any) -> None:
    model.half()
    model.norm.float()
    model.head.to(torch.bfloat16)


def frozen(model: Any) -> None:
    model.a.requires_grad_(False)
    model.head.bias.requires_grad_(False)


def mixed_modes(model: Any) -> None:
    model.eval()
    model.norm.train()
    model.b.training = True


def odd_numbers(model: Any) -> None:
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([float("nan"), -0.0, 1e-45, float("inf"), 0, 1, 2, 3]))


def everything(model: Any) -> None:
    for change in (channels_last, shared_modules, views, frozen, mixed_modes):
        change(model)


CHANGES = (
    *(channels_last, one_channels_last, tied_parameters, shared_modules, same_memory, views, overlapping_views),
    *(transposed, repeated, far_apart, dtypes, frozen, mixed_modes, odd_numbers, everything),
)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_comes_back_as_it_was(change: Callable[[Any], None], suffix: str, converted: bool) -> None:
    model = net()
    change(model)
    if converted:
        model = rewrite(model, "group", options={"groups": 2})
        if change in (views, overlapping_views, transposed, same_memory, far_apart):
            change(model)  # a copy takes tensors apart
    loaded = storage.load(storage.save(model, f"a{suffix}"), trust_modules=["fidelnet"])
    expected = places(model)
    if change is far_apart and suffix == ".safetensors":  # a hundred times the memory: written close together
        expected["head.bias"] = places(loaded)["head.bias"]
        assert torch.equal(loaded.head.bias, model.head.bias)
    assert places(loaded) == expected
    assert modes(loaded) == modes(model)
    if suffix == ".safetensors":
        before = Path("a.safetensors").read_bytes()
        assert storage.save(loaded, "b.safetensors").read_bytes() == before
        assert storage.save(model, "c.safetensors").read_bytes() == before


def test_training_moves_what_shares_memory_together() -> None:
    model = net()
    views(model)
    loaded = storage.load(storage.save(model, "a.safetensors"), trust_modules=["fidelnet"])
    loaded.norm.running_mean.as_strided((24,), (1,)).fill_(3)
    assert (loaded.norm.running_var == 3).all()
    assert (loaded.head.bias == 3).all()


def test_plans_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    the_plan = plan(net(), "group", mapping={"b.*": "shift"}, options={"group.groups": 4})
    Path("a.json").write_text(the_plan.to_json())
    read = storage.read_plan("a.json")
    assert read == the_plan
    assert read.to_json() == the_plan.to_json()
    student = rewrite(net(), the_plan)
    update_record(student, classes=["a"])
    loaded = storage.load(storage.save(student, "a.safetensors"), trust_modules=["fidelnet"])
    assert Plan.from_dict(read_record(loaded)["plan"]).to_json() == the_plan.to_json()


def rewritten(path: str, **changes: str | None) -> Path:
    """Write a student's file again with other metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    safetensors.torch.save_file(safetensors.torch.load_file(path), "changed.safetensors", metadata=kept)
    return Path("changed.safetensors")


def test_files_of_version_1_are_read_as_before() -> None:
    model = rewrite(net().eval(), "shift")
    model.head.weight.requires_grad_(False)
    storage.save(model, "a.safetensors")
    loaded = storage.load(rewritten("a.safetensors", version="1", layout=None), trust_modules=["fidelnet"])
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert not loaded.head.weight.requires_grad
    assert loaded.training  # it was not written then


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (None, "is damaged"),
        ([], "does not say how its tensors lie"),
        ({"modules": []}, "does not say how its tensors lie"),
        ({"tied": {"a.conv.bias": "stem.weight"}}, "fits no such network"),
        ({"tied": {"gone": "head.weight"}}, "fits no such network"),
        ({"strides": {"head.weight": [0, 0]}}, "loaded"),
        ({"strides": {"head.weight": [10**12, 1]}}, "fits no such network"),
        ({"strides": {"head.weight": [1, 1]}}, "fits no such network"),
        ({"strides": {"head.weight": [-8, 1]}}, "fits no such network"),
        ({"strides": {"head.weight": [8]}}, "fits no such network"),
        ({"storages": [[["head.bias", 10**12, [1]]]]}, "fits no such network"),
        ({"storages": [[["head.bias", 0, [1]], ["norm.num_batches_tracked", 0, []]]]}, "fits no such network"),
        ({"storages": 3}, "fits no such network"),
        ({"modules": {"a.conv": "a"}}, "fits no such network"),
        ({"unlike": None}, "fits no such network"),
    ],
)
def test_layouts_that_are_wrong(layout: Any, said: str) -> None:
    storage.save(net(), "a.safetensors")
    with safetensors.safe_open("a.safetensors", framework="pt") as file:
        before = json.loads(file.metadata()["layout"])
    text = None if layout is None else json.dumps({**before, **layout} if layout else layout)
    if said == "loaded":  # of an expanded tensor only the first number counts
        assert (
            storage.load(rewritten("a.safetensors", layout=text), trust_modules=["fidelnet"])
            .head.weight.unique()
            .numel()
            == 1
        )
        return
    with pytest.raises(ModelError) as caught:
        storage.load(rewritten("a.safetensors", layout=text), trust_modules=["fidelnet"])
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_modules_that_would_hold_themselves_are_refused() -> None:
    storage.save(storage.load("fidelnet:nested"), "a.safetensors")
    with safetensors.safe_open("a.safetensors", framework="pt") as file:
        layout = json.loads(file.metadata()["layout"])
    layout["modules"] = {"0.0": "0"}
    with pytest.raises(ModelError, match="its modules hold themselves"):
        storage.load(rewritten("a.safetensors", layout=json.dumps(layout)), trust_modules=["fidelnet"])


def test_a_students_file_is_plain_safetensors_with_its_metadata_in_order() -> None:
    path = storage.save(net(), "a.safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert list(metadata) == sorted(metadata)
    assert (metadata["format"], metadata["version"]) == ("convsurgeon-student", "2")
    assert safetensors.torch.load_file(path).keys() == net().state_dict().keys()


def test_nested_classes_come_back_with_their_module_trusted(fidelnet: Any) -> None:
    model = fidelnet.Net().eval()
    torch.save(model, "a.pt")
    for options in ({}, {"trust_modules": ["fidel"]}):
        with pytest.raises(ModelError, match="--trust-module fidelnet, or --trust"):
            storage.load("a.pt", **options)
    loaded = storage.load("a.pt", trust_modules=["fidelnet"])
    assert type(loaded.a) is fidelnet.Net.Block
    assert type(loaded.a.act) is fidelnet.Net.Block.Act
    assert places(loaded) == places(model)
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    student = rewrite(loaded, "shift")
    again = storage.load(storage.save(student, "b.pt"), trust_modules=["fidelnet"])
    torch.testing.assert_close(again(x), student(x), rtol=0, atol=0)


def test_the_weights_of_nested_classes_need_no_trust(fidelnet: Any) -> None:
    torch.save({"model": fidelnet.Net().state_dict(), "net": fidelnet.Net()}, "a.pt")
    assert isinstance(storage.load("fidelnet:Net", weights="a.pt"), fidelnet.Net)


class Lookup:
    """Pickles as `getattr(owner, name)`."""

    def __init__(self, owner: object, name: str) -> None:
        self.call = (getattr, (owner, name))

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("name", ["helper", "forward", "__init__", "__dict__", "mro", "__subclasses__"])
def test_nothing_but_classes_is_looked_up(fidelnet: Any, name: str) -> None:
    torch.save(Lookup(fidelnet.Net.Block, name), "a.pt")
    with pytest.raises(ModelError) as caught:
        storage.load("a.pt", trust_modules=["fidelnet"])
    assert "getattr" in str(caught.value)


def test_a_copy_is_not_the_original() -> None:
    """The comparison that the tests above rest on sees every one of these changes."""
    for change in CHANGES:
        model = net()
        changed = copy.deepcopy(model)
        change(changed)
        assert (places(model), modes(model)) != (places(changed), modes(changed)), change.__name__


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda net: setattr(net, "maxpool", nn.Identity()), r"maxpool is Identity\(\), there MaxPool2d\("),
        (lambda net: setattr(net.conv1, "stride", (1, 1)), "conv1 is Conv2d"),
        (lambda net: setattr(net.bn1, "eps", 1e-3), "bn1 is BatchNorm2d"),
        (lambda net: setattr(net, "fc", nn.Linear(512, 7)), "fc is Linear"),
    ],
)
def test_what_its_name_no_longer_makes_is_not_saved_under_it(change: Any, where: str, tmp_path: Path) -> None:
    net = cs.load("torchvision:resnet18", model_args={"num_classes": 10})
    change(net)
    student = cs.rewrite(net, "depthwise", keep="layer1.*")
    with pytest.raises(cs.errors.ModelError, match=f"no longer what torchvision:resnet18 builds: {where}"):
        cs.save(student, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    cs.save(student, tmp_path / "a.pt")
