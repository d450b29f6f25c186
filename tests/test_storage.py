"""Models by name and from files, weights in all the forms people have them, students there and back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from convsurgeon import storage
from convsurgeon.errors import (
    ModelError,
    OptionError,
    OutputError,
    UnknownNameError,
    UntrustedFileError,
    WeightsError,
)
from convsurgeon.preprocessing import Preprocessing
from convsurgeon.progress import Progress
from convsurgeon.record import read_record, update_record
from convsurgeon.surgery import plan_of, rewrite

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, width=8):
        super().__init__()
        convs = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)
        self.body = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = self.first
        self.loose = nn.Conv2d(4, 4, 3, padding=1)
        self.loose.weight = self.first.weight

    def forward(self, x):
        return self.loose(self.second(self.first(x)))

class Zoo:
    small = Net

built = Net()

def needs(width):
    return Net(width=width)

def gives_list():
    return []

def breaks():
    raise RuntimeError("no luck\\nat all")
"""


@pytest.fixture
def mynet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write `NET` to mynet.py and work in its folder; forget it afterwards."""
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mynet", None)  # another test may have written another one
    yield __import__("mynet")
    sys.modules.pop("mynet", None)


def fails(error: type[Exception], call, *args, **options) -> str:
    """Return the message of the error that a call raises, which must be a single line."""
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=name)


def weights_of(state: dict[str, torch.Tensor]) -> storage._weights.Weights:
    """Return weights as they are read from a file that holds nothing else."""
    return storage._weights.Weights(Path("w.pt"), (storage._state_dicts.Entry("", state),))


# names


def test_torchvision_by_name_is_random_and_says_so():
    events: list[Progress] = []
    model = storage.load("torchvision:resnet18", model_args={"num_classes": 10}, report=events.append)
    assert isinstance(model, torchvision.models.ResNet)
    assert model.training
    assert model.fc.out_features == 10
    assert [event.message for event in events] == ["torchvision:resnet18 has random weights: no --weights was given"]
    record = read_record(model)
    assert record["source"] == {"name": "torchvision:resnet18", "args": {"num_classes": 10}}
    assert record["input_shape"] == [1, 3, 224, 224]
    preprocessing = Preprocessing.from_dict(record["preprocessing"])
    assert preprocessing.to_dict() == record["preprocessing"]
    assert (preprocessing.size, preprocessing.color, preprocessing.crop) == ((224, 224), "rgb", 0.875)
    assert preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_name_builds_as_the_library_does():
    torch.manual_seed(3)
    mine = storage.load("torchvision:squeezenet1_1")
    torch.manual_seed(3)
    assert_same_state(mine, torchvision.models.squeezenet1_1())


def test_segmentation_and_detection_fetch_no_backbone(monkeypatch):
    def fetch(*args, **options):
        raise AssertionError("fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    record = read_record(storage.load("torchvision:lraspp_mobilenet_v3_large", model_args={"num_classes": 2}))
    assert record["input_shape"] == [1, 3, 520, 520]
    assert record["preprocessing"]["crop"] == 1.0
    record = read_record(storage.load("torchvision:ssdlite320_mobilenet_v3_large"))
    assert set(record) == {"source"}


def test_a_vision_transformer_of_another_size_says_it():
    args = {"image_size": 64, "patch_size": 32, "num_layers": 1}
    shape = storage._input_facts.torchvision_facts("vit_b_16", args)["input_shape"]
    assert shape == [1, 3, 64, 64]


def test_timm_by_name_with_one_channel():
    model = storage.load("timm:resnet18", model_args={"in_chans": 1, "num_classes": 10})
    assert model.conv1.in_channels == 1
    record = read_record(model)
    assert record["input_shape"] == [1, 1, 224, 224]
    assert record["preprocessing"]["color"] == "gray"
    assert record["preprocessing"]["mean"] == pytest.approx([0.449])
    assert record["preprocessing"]["crop"] == 0.95
    assert Preprocessing.from_dict(record["preprocessing"]).channels == 1


def test_timm_with_four_channels_has_a_shape_and_no_colors():
    record = read_record(storage.load("timm:resnet18.a1_in1k", model_args={"in_chans": 4}))
    assert record["input_shape"] == [1, 4, 224, 224]
    assert "preprocessing" not in record


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'convsurgeon[zoo]'" in fails(ModelError, storage.load, "timm:resnet18")


def test_own_factories(mynet):
    assert storage.load("mynet:Net", model_args={"num_classes": 3}).fc.out_features == 3
    assert isinstance(storage.load("mynet:Zoo.small"), mynet.Net)
    assert read_record(storage.load("mynet:Net"))["source"] == {"name": "mynet:Net", "args": {}}


def test_unknown_names(mynet):
    message = fails(UnknownNameError, storage.load, "torchvision:resnt18")
    assert message.startswith("unknown torchvision model 'resnt18'. Did you mean 'resnet18'? Available: ")
    message = fails(UnknownNameError, storage.load, "timm:resnt18")
    assert "Did you mean 'resnet18'?" in message
    assert len(message) < 200
    assert "Did you mean 'Net'?" in fails(UnknownNameError, storage.load, "mynet:Nett")
    assert "no module 'mynets'" in fails(ModelError, storage.load, "mynets:Net")


def test_bad_factories(mynet, tmp_path):
    assert "returned a list, not an nn.Module" in fails(ModelError, storage.load, "mynet:gives_list")
    assert "is a Net; name a class or function" in fails(ModelError, storage.load, "mynet:built")
    assert "RuntimeError: no luck" in fails(ModelError, storage.load, "mynet:breaks")
    (tmp_path / "broken.py").write_text("import no_such_thing\n")
    assert "importing broken failed: ModuleNotFoundError" in fails(ModelError, storage.load, "broken:Net")
    (tmp_path / "unfinished.py").write_text("def (\n")
    assert "importing unfinished failed: SyntaxError" in fails(ModelError, storage.load, "unfinished:Net")


@pytest.mark.parametrize(
    ("source", "args", "said"),
    [
        (
            "torchvision:resnet18",
            {"depth": 3},
            "torchvision:resnet18 cannot be built with depth=3: TypeError",
        ),
        ("torchvision:resnet18", {"num_classes": "x"}, "num_classes='x'"),
        (
            "timm:resnet18",
            {"depth": 3, "num_classes": 3},
            "timm:resnet18 cannot be built with depth=3: TypeError",
        ),
        ("mynet:Net", {"depth": 3}, "mynet:Net cannot be built with depth=3: TypeError"),
        (
            "mynet:needs",
            {},
            "without arguments: TypeError: needs() missing 1 required positional argument: 'width'",
        ),
        ("torchvision:resnet18", {"pretrained": True}, "--weights FILE or --weights DEFAULT"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "--model-arg weights is not taken"),
        ("timm:resnet18", {"checkpoint_path": "x.pt"}, "--model-arg checkpoint_path is not taken"),
        ("timm:resnet18", {"pretrained_cfg": {"file": "x.pt"}}, "--model-arg pretrained_cfg is not taken"),
    ],
)
def test_wrong_model_args_are_named(mynet, source, args, said):
    assert said in fails(OptionError, storage.load, source, model_args=args)


def test_the_callers_model_args_stay_as_they_are(mynet):
    args = {"width": 4}
    torch.save(mynet.Net(3, 4).state_dict(), "w.pt")
    storage.load("mynet:Net", weights="w.pt", model_args=args)
    assert args == {"width": 4}


def test_default_weights(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    fetched = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda url, **options: fetched.append(url) or state,
    )
    events: list[Progress] = []
    model = storage.load("torchvision:resnet18", weights="DEFAULT", report=events.append)
    assert len(fetched) == 1
    assert events == []
    torch.testing.assert_close(model.fc.weight, state["fc.weight"], rtol=0, atol=0)


def test_default_weights_that_cannot_be_had(monkeypatch, mynet):
    def fetch(url, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    message = fails(ModelError, storage.load, "torchvision:resnet18", weights="DEFAULT")
    assert message == "the default weights of torchvision:resnet18 cannot be had: OSError: no network"
    options = {"weights": "DEFAULT", "model_args": {"num_classes": 7}}
    assert "num_classes=7" in fails(OptionError, storage.load, "torchvision:resnet18", **options)
    assert "no default weights" in fails(OptionError, storage.load, "mynet:Net", weights="DEFAULT")


def test_parse_model_args():
    parsed = storage.parse_model_args(["num_classes=10", "act=relu", "name='3'", "sizes=[1, 2]", "a==b", "none="])
    assert parsed == {"num_classes": 10, "act": "relu", "name": "3", "sizes": [1, 2], "a": "=b", "none": ""}
    assert "NAME=VALUE" in fails(OptionError, storage.parse_model_args, ["num_classes"])
    assert "NAME=VALUE" in fails(OptionError, storage.parse_model_args, ["num classes=3"])
    assert "given twice" in fails(OptionError, storage.parse_model_args, ["a=1", "a=2"])
    assert "--weights" in fails(OptionError, storage.parse_model_args, ["pretrained=True"])


# weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"epoch": 3, "model": state},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"ema": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    ],
    ids=[
        "plain",
        "state_dict",
        "model",
        "model_state_dict",
        "ema.state_dict",
        "module.",
        "module._orig_mod.",
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_in_all_their_wrappings(mynet, wrap, legacy):
    net = mynet.Net()
    torch.save(wrap(net.state_dict()), "weights.bin", _use_new_zipfile_serialization=not legacy)
    assert_same_state(storage.load("mynet:Net", weights="weights.bin"), net)


def test_weights_from_safetensors_and_from_a_pickled_module(mynet):
    net = mynet.Net()
    safetensors.torch.save_file(net.state_dict(), "weights.safetensors")
    assert_same_state(storage.load("mynet:Net", weights=Path("weights.safetensors")), net)
    torch.save(net, "net.pt")
    assert "--trust-module mynet" in fails(UntrustedFileError, storage.load, "mynet:Net", weights="net.pt")
    assert_same_state(storage.load("mynet:Net", weights="net.pt", trust_modules=["mynet"]), net)
    assert_same_state(storage.load("mynet:Net", weights="net.pt", trust=True), net)


def test_a_network_that_is_itself_called_module_keeps_its_prefix(tmp_path, monkeypatch):
    source = "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    (tmp_path / "wrapped_net.py").write_text(source + "        self.module = nn.Linear(2, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    net = storage.load("wrapped_net:Net")
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    assert_same_state(storage.load("wrapped_net:Net", weights=tmp_path / "weights.pt"), net)
    sys.modules.pop("wrapped_net")


@pytest.mark.parametrize(
    ("source", "classes"), [("torchvision:squeezenet1_1", 7), ("timm:resnet18", 7), ("mynet:Net", 7)]
)
def test_the_number_of_classes_is_inferred(mynet, source, classes):
    net = storage.load(source, model_args={"num_classes": classes})
    torch.save(net.state_dict(), "weights.pt")
    events: list[Progress] = []
    loaded = storage.load(source, weights="weights.pt", report=events.append)
    assert_same_state(loaded, net)
    assert read_record(loaded)["source"]["args"] == {"num_classes": classes}
    assert [event.message for event in events] == [f"{source} was built with the 7 classes of weights.pt"]


def test_the_number_of_classes_is_inferred_where_heads_have_multiples_of_it():
    model = storage.load("torchvision:ssdlite320_mobilenet_v3_large", model_args={"num_classes": 5})
    architecture = storage._architectures.parse_name("torchvision:ssdlite320_mobilenet_v3_large")
    built = storage._building.build_with(architecture, {}, weights_of(dict(model.state_dict())))
    assert built.args == {"num_classes": 5}
    assert_same_state(built.model, model)


def test_given_classes_are_not_overruled(mynet):
    torch.save(mynet.Net(7).state_dict(), "weights.pt")
    options = {"weights": "weights.pt", "model_args": {"num_classes": 3}}
    message = fails(WeightsError, storage.load, "mynet:Net", **options)
    assert message == (
        "weights.pt does not fit mynet:Net: 2 of another size "
        "(fc.weight: 7x8 in the file, 3x8 in the model, fc.bias: 7 in the file, 3 in the model)"
    )


def test_weights_that_do_not_fit_are_counted_and_named(mynet):
    state = mynet.Net().state_dict()
    del state["fc.bias"]
    state |= {f"head{i}.weight": torch.zeros(1) for i in range(5)}
    torch.save(state, "weights.pt")
    message = fails(WeightsError, storage.load, "mynet:Net", weights="weights.pt")
    assert message == (
        "weights.pt does not fit mynet:Net: 1 missing (fc.bias), "
        "5 unexpected (head0.weight, head1.weight, head2.weight, ...)"
    )


def test_old_files_of_torchvision_fit():
    architecture = storage._architectures.parse_name("torchvision:densenet121")
    net = torchvision.models.densenet121()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value
        for key, value in net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert any(".norm.1." in key for key in old)
    assert_same_state(storage._building.build_with(architecture, {}, weights_of(old)).model, net)


def test_weights_that_are_none(mynet):
    torch.save({"epoch": 3, "loss": [0.5]}, "weights.pt")
    message = fails(WeightsError, storage.load, "mynet:Net", weights="weights.pt")
    assert "holds a dict with the keys epoch, loss, and no state dict" in message
    assert "does not exist" in fails(ModelError, storage.load, "mynet:Net", weights="nets/weights.pt")
    torch.save(mynet.Net(), "net.pt")
    assert "not with the file net.pt" in fails(OptionError, storage.load, "net.pt", weights="weights.pt")
    assert "not with the file net.pt" in fails(OptionError, storage.load, "net.pt", model_args={"a": 1})


# files that are no model


def _scripted(path: Path) -> None:
    # the header of a TorchScript archive, which torch no longer writes without a warning
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("net/data.pkl", "net/constants.pkl", "net/code/__torch__/net.py"):
            archive.writestr(name, b"\x80\x02N.")


def _exported(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/archive_format", b"pt2")
        archive.writestr("net/models/model.json", b"{}")


def _exported_long_ago(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", b"5.1")
        archive.writestr("serialized_exported_program.json", b"{}")


def _onnx(path: Path) -> None:
    tensor = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    same = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [tensor], [same])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def _truncated(path: Path) -> None:
    torch.save(nn.Linear(100, 100), path)
    path.write_bytes(path.read_bytes()[:20_000])


def _damaged(path: Path) -> None:
    torch.save(nn.Linear(100, 100), path)
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if not name.endswith("data/0")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)


def _npz(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weight.npy", b"")


def _safetensors(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(100)}, path)


def _cut_safetensors(path: Path) -> None:
    _safetensors(path)
    path.write_bytes(path.read_bytes()[:100])


def _legacy_module(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("net.pt", lambda path: path.touch(), "is empty"),
        ("net.pt", Path.mkdir, "is a folder"),
        ("net.pt", _scripted, "is a TorchScript archive"),
        ("net.pt2", _exported, "is damaged"),
        ("net.pt", _exported, "is damaged"),
        ("net.pt2", _exported_long_ago, "as PyTorch wrote them before 2.8"),
        ("net.pt2", lambda path: path.write_bytes(b"x" * 99), "is no exported program"),
        ("net.onnx", _onnx, "is an ONNX file"),
        ("net.bin", _onnx, "is an ONNX file"),
        ("net.bin", lambda path: path.write_bytes(b"\x08 no protobuf"), "is no model"),
        ("net.pt", _truncated, "is truncated or damaged"),
        ("net.pt", _damaged, "is damaged"),
        ("net.pt", _npz, "is a zip archive, and no model"),
        ("net.pt", lambda path: path.write_text("# a text"), "is no model"),
        ("net.pt", lambda path: path.write_bytes(b"\x80\x05N."), "is a pickle that torch.save did not write"),
        ("net.safetensors", _cut_safetensors, "is truncated or damaged"),
        ("net.safetensors", lambda path: path.write_text("short"), "is truncated or damaged"),
        ("net.safetensors", _safetensors, "holds only weights, no architecture"),
        ("net.pt", lambda path: torch.save([1, 2], path), "holds a list, not an nn.Module"),
        ("net.pt", lambda path: torch.save({"a": 1}, path), "holds a dict with the keys a, not an nn.Module"),
        ("net.pt", lambda path: torch.save({}, path), "holds an empty dict"),
    ],
)
def test_files_that_are_no_model_say_what_they_are(tmp_path, name, make, said):
    path = tmp_path / name
    make(path)
    message = fails(ModelError, storage.load, path)
    assert said in message
    assert str(path) in message


def test_real_archives_of_torch_are_told_apart(tmp_path):
    net = nn.Linear(2, 2)
    torch.export.save(torch.export.export(net, (torch.zeros(1, 2),)), tmp_path / "net.pt2")
    (tmp_path / "net.pt2").rename(tmp_path / "net.pt")
    assert isinstance(storage.load(tmp_path / "net.pt"), nn.Module)
    with pytest.warns(Warning, match="deprecated"):
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 2)), tmp_path / "net.pt")
    assert "is a TorchScript archive" in fails(ModelError, storage.load, tmp_path / "net.pt")


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": {"state_dict": state}, "step": 1}])
def test_a_bare_state_dict_says_how_it_is_used(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(nn.Linear(2, 2).state_dict()), "weights.pt")
    assert fails(ModelError, storage.load, "weights.pt") == (
        "weights.pt holds only weights, no architecture; name the one they are of, such as mynet:Net or "
        "torchvision:resnet18: convsurgeon convert mynet:Net --weights weights.pt"
    )
    assert "holds only weights" in fails(ModelError, storage.load, "weights.pt", trust=True)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "net.pt")
    worker = threading.Thread(target=fails, args=(ModelError, storage.load, tmp_path / "net.pt"), daemon=True)
    worker.start()
    worker.join(timeout=10)
    assert not worker.is_alive()
    assert "no regular file" in fails(ModelError, storage.load, tmp_path / "net.pt")
    assert "no regular file" in fails(ModelError, storage.load, "/dev/null")


def test_missing_and_unreadable_files(tmp_path, monkeypatch):
    assert "does not exist" in fails(ModelError, storage.load, tmp_path / "net.pt")
    assert "torchvision:resnet18" in fails(ModelError, storage.load, "resnet18")
    assert "cannot read" in fails(ModelError, storage.load, "x" * 5000)
    assert "cannot read" in fails(ModelError, storage.load, "a\0b")
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert fails(ModelError, storage.load, tmp_path / "net.pt").endswith("net.pt: Permission denied")


def test_the_old_format_is_for_weights_only(tmp_path):
    _legacy_module(tmp_path / "net.pt")
    assert "before 1.6" in fails(UntrustedFileError, storage.load, tmp_path / "net.pt")
    assert isinstance(storage.load(tmp_path / "net.pt", trust=True), nn.Linear)


# pickled modules


def test_a_pickled_module_comes_back_as_it_was(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU())).eval()
    net[1].train()
    net[0].weight.requires_grad_(False)
    net[2].extra = [net[0], {"first": net[0]}]
    path = storage.save(net, tmp_path / "net.pt")
    loaded = storage.load(path)
    assert_same_state(loaded, net)
    assert [part.training for part in loaded.modules()] == [part.training for part in net.modules()]
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in net.parameters()]
    assert loaded[2].extra[0] is loaded[2].extra[1]["first"] is loaded[0]
    assert read_record(loaded) == {"source": {"file": "net.pt"}}
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=0)


def test_a_record_goes_with_the_pickle(tmp_path):
    net = nn.Linear(2, 2)
    update_record(net, source={"name": "torchvision:resnet18", "args": {}}, classes=["cat", "dog"])
    storage.save(net, tmp_path / "net.pth")
    assert read_record(storage.load(tmp_path / "net.pth")) == read_record(net)
    net.convsurgeon_record["classes"] = nn.Linear(1, 1)
    storage.save(net, tmp_path / "net.pth", force=True)
    assert "no plain data" in fails(ModelError, storage.load, tmp_path / "net.pth")


def test_a_file_wins_over_a_name(mynet):
    torch.save(nn.Linear(2, 2), "mynet:Net")
    assert isinstance(storage.load("mynet:Net"), nn.Linear)
    os.remove("mynet:Net")
    assert isinstance(storage.load("mynet:Net"), mynet.Net)


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_pickles_of_torchvision(tmp_path, name):
    _there_and_back(storage.load(f"torchvision:{name}"), tmp_path)


def test_pickles_of_timm(tmp_path):
    import timm

    for name in ("resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "efficientnet_lite0"):
        _there_and_back(timm.create_model(name), tmp_path)


def _there_and_back(net: nn.Module, folder: Path) -> None:
    torch.save(net, folder / "net.pt")
    loaded = storage.load(folder / "net.pt")
    assert repr(loaded) == repr(net)
    assert_same_state(loaded, net)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_pickles_of_every_torchvision_classifier(tmp_path, name):
    if any(size in name for size in ("_h_14", "l_16", "l_32", "128gf", "32gf", "7_large", "wide", "vgg")):
        pytest.skip("hundreds of MB, and no other classes than its smaller relatives")
    _there_and_back(torchvision.models.get_model(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *torchvision.models.list_models(module=torchvision.models.detection),
        *torchvision.models.list_models(module=torchvision.models.segmentation),
    ],
)
def test_pickles_of_every_torchvision_detector(tmp_path, name):
    _there_and_back(torchvision.models.get_model(name, weights=None, weights_backbone=None), tmp_path)


# saving


def test_saving_refuses_what_it_cannot_do(tmp_path, monkeypatch, mynet):
    net = nn.Linear(2, 2)
    assert ".safetensors" in fails(ModelError, storage.save, net, tmp_path / "net.onnx")
    assert "save it as net.pt" in fails(ModelError, storage.save, net, tmp_path / "net.safetensors")
    storage.save(net, tmp_path / "net.pt")
    assert "--force" in fails(OutputError, storage.save, net, tmp_path / "net.pt")
    assert storage.save(net, tmp_path / "net.pt", force=True) == tmp_path / "net.pt"
    assert "folder" in fails(OutputError, storage.save, net, tmp_path / "gone" / "net.pt")

    class Local(nn.Module):
        pass

    before = sorted(tmp_path.iterdir())
    assert "Local cannot be saved" in fails(ModelError, storage.save, Local(), tmp_path / "local.pt")
    net.rule = lambda x: x
    assert "Linear cannot be saved" in fails(ModelError, storage.save, net, tmp_path / "net.pt", force=True)
    script = type("ScriptNet", (nn.Module,), {"__module__": "__main__"})
    message = fails(ModelError, storage.save, nn.Sequential(script()), tmp_path / "script.pt")
    assert "mynet:ScriptNet --weights FILE" in message
    assert sorted(tmp_path.iterdir()) == before
    assert isinstance(storage.load(tmp_path / "net.pt"), nn.Linear)


def test_arguments_that_no_file_can_name_save_as_a_pickle(tmp_path):
    model = storage.load("torchvision:resnet18", model_args={"norm_layer": nn.InstanceNorm2d})
    assert "source" not in read_record(model)
    assert "with plain arguments" in fails(ModelError, storage.save, model, tmp_path / "net.safetensors")
    assert storage.default_output(model, "torchvision:resnet18", "shift") == Path("resnet18.shift.pt")


def test_default_output(mynet, tmp_path):
    named = nn.Linear(1, 1)
    update_record(named, source={"name": "torchvision:resnet18", "args": {}})
    for source, expected in {
        "torchvision:resnet18": "resnet18.shift.safetensors",
        "timm:resnet18.a1_in1k": "resnet18.a1_in1k.shift.safetensors",
        "mynet:Net": "Net.shift.safetensors",
        "nets/a.pt": "nets/a.shift.pt",
        "nets/a.pth": "nets/a.shift.pth",
        "nets/a.bin": "nets/a.shift.pt",
        "nets/a.safetensors": "nets/a.shift.safetensors",
    }.items():
        assert storage.default_output(named, source, "shift") == Path(expected)
    (tmp_path / "a:b.pt").touch()
    assert storage.default_output(named, "a:b.pt", "shift") == Path("a:b.shift.pt")


# students


@pytest.mark.parametrize("source", ["torchvision:resnet18", "timm:resnet18", "mynet:Net"])
def test_a_student_is_name_plan_and_weights(mynet, source):
    donor = storage.load(source, model_args={"num_classes": 3})
    student = rewrite(donor, "shift")
    student.fc.weight.requires_grad_(False)
    update_record(student, classes=["a", "b", "c"])
    path = storage.save(student, storage.default_output(student, source, "shift"))
    assert path.suffix == ".safetensors"
    options = {"trust_modules": ["mynet"]} if source == "mynet:Net" else {}
    loaded = storage.load(path, **options)
    assert_same_state(loaded, student)
    assert type(loaded) is type(student)
    assert repr(loaded) == repr(student)
    assert read_record(loaded) == read_record(student)
    assert plan_of(loaded) == plan_of(student)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in student.parameters()]


def test_the_file_of_a_student_holds_no_code(mynet):
    student = rewrite(storage.load("mynet:Net"), "shift")
    path = storage.save(student, "student.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("convsurgeon-student", "2")
    assert json.loads(metadata["record"]) == read_record(student)


def test_a_student_as_a_pickle(mynet, tmp_path):
    student = rewrite(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "group")
    loaded = storage.load(storage.save(student, tmp_path / "student.pt"))
    assert_same_state(loaded, student)
    assert plan_of(loaded) == plan_of(student)
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(loaded(x), student(x), rtol=0, atol=0)


@pytest.mark.parametrize("parts", ["all", "one"])
def test_a_students_dtypes_come_back(mynet, parts):
    student = rewrite(storage.load("mynet:Net"), "depthwise")
    (student if parts == "all" else student.fc).to(torch.bfloat16)
    loaded = storage.load(storage.save(student, "student.safetensors"), trust_modules=["mynet"])
    assert_same_state(loaded, student)
    assert loaded.fc.weight.dtype is torch.bfloat16
    assert loaded.body[3].num_batches_tracked.dtype is torch.int64


def test_tied_weights_are_written_once_and_stay_tied(mynet):
    model = storage.load("mynet:Tied")
    with torch.no_grad():
        model.first.bias.fill_(2)
    path = storage.save(model, "tied.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["first.bias", "first.weight", "loose.bias"]
    loaded = storage.load(path, trust_modules=["mynet"])
    assert_same_state(loaded, model)
    assert loaded.first is loaded.second
    assert loaded.loose.weight is loaded.first.weight


def test_views_of_one_storage_are_written_apart(mynet):
    model = storage.load("mynet:Net")
    both = torch.randn(2, 10)
    model.fc.bias.data = both[0]
    model.register_buffer("view", both[1])
    path = storage.save(model, "views.safetensors")
    tensors = safetensors.torch.load_file(path)
    torch.testing.assert_close(torch.stack([tensors["fc.bias"], tensors["view"]]), both, rtol=0, atol=0)


def test_a_student_built_by_own_code_needs_trust(mynet):
    path = storage.save(rewrite(storage.load("mynet:Net"), "shift"), "student.safetensors")
    del sys.modules["mynet"]
    message = fails(UntrustedFileError, storage.load, path)
    assert message == (
        "student.safetensors is built by mynet:Net, which is code not yet allowed; "
        "if you trust that code: --trust-module mynet, or --trust"
    )
    assert "mynet" not in sys.modules
    fails(UntrustedFileError, storage.load, path, trust_modules=["my"])
    assert type(storage.load(path, trust=True)).__name__ == "Net"


def _with_metadata(path: Path, **changes: str) -> Path:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata={**metadata, **changes})
    return path


def _record(**changes) -> str:
    return json.dumps({"source": {"name": "mynet:Net", "args": {}}, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"format": "pt"}, ModelError, "holds only weights, no architecture"),
        ({"version": "3"}, ModelError, "has version 3 of the student format"),
        ({"record": "{"}, ModelError, "is damaged"),
        ({"record": "[]"}, ModelError, "is damaged"),
        ({"record": _record(source={"name": 3})}, ModelError, "is damaged"),
        ({"record": _record(source={"name": "nets/a.pt"})}, ModelError, "'nets/a.pt' in its record"),
        (
            {"record": _record(source={"name": "os:system", "args": {}})},
            UntrustedFileError,
            "--trust-module os",
        ),
        (
            {"record": _record(source={"name": "torchvision:resnet", "args": {}})},
            ModelError,
            "unknown torchvision",
        ),
        (
            {"record": _record(source={"name": "timm:resnet18", "args": {"checkpoint_path": "x"}})},
            ModelError,
            "checkpoint_path is not taken",
        ),
        ({"record": _record(plan={"version": 99})}, ModelError, "student.safetensors"),
        ({"record": _record(plan=[])}, ModelError, "student.safetensors"),
        ({"record": _record()}, WeightsError, "missing"),
        ({"aliases": '{"a": "b"}'}, ModelError, "damaged"),
    ],
)
def test_student_files_that_are_wrong(mynet, changes, error, said):
    path = storage.save(rewrite(storage.load("mynet:Net"), "shift"), "student.safetensors")
    message = fails(error, storage.load, _with_metadata(path, **changes), trust_modules=["mynet"])
    assert said in message
    assert "student.safetensors" in message


def test_a_student_is_not_taken_for_weights(mynet):
    path = storage.save(rewrite(storage.load("mynet:Net"), "shift"), "student.safetensors")
    assert "is a whole student" in fails(WeightsError, storage.load, "mynet:Net", weights=path)
    plain = storage.load("mynet:Net")
    path = storage.save(plain, "plain.safetensors")
    assert_same_state(storage.load("mynet:Net", weights=path), plain)


def test_a_failed_write_leaves_the_old_student(mynet, monkeypatch):
    student = rewrite(storage.load("mynet:Net"), "shift")
    path = storage.save(student, "student.safetensors")
    before = path.read_bytes()

    def fail(*args, **options):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    assert "the disk is full" in fails(ModelError, storage.save, student, path, force=True)
    assert path.read_bytes() == before
    assert not [name for name in os.listdir() if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["shift", "depthwise", "group", "bsconv"])
@pytest.mark.parametrize("name", ["resnet50", "vgg16_bn", "deeplabv3_resnet50", "fasterrcnn_resnet50_fpn"])
def test_students_of_torchvision(tmp_path, name, op):
    student = rewrite(storage.load(f"torchvision:{name}"), op)
    for suffix in (".safetensors", ".pt"):
        loaded = storage.load(storage.save(student, tmp_path / f"student{suffix}"))
        assert_same_state(loaded, student)
        assert plan_of(loaded) == plan_of(student)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_full_disk_is_an_output_error(name: str, tmp_path: Path) -> None:
    """In a process of its own, since it is the process whose files may not grow."""
    code = f"""
import resource, signal
import convsurgeon as cs
net = cs.load("torchvision:squeezenet1_1")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
try:
    cs.save(net, {str(tmp_path / name)!r})
except cs.errors.OutputError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout == f"cannot write {tmp_path / name}: File too large\n", ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_same_pickled_module_gives_the_same_bytes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    storage.save(rewrite(net), tmp_path / "a.pt")  # the next one's record says where it came from
    again = storage.save(storage.load(tmp_path / "a.pt"), tmp_path / "b.pt").read_bytes()
    third = storage.save(storage.load(tmp_path / "b.pt"), tmp_path / "c.pt").read_bytes()
    assert again == third
