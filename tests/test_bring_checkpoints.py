"""Checkpoints as code bases write them: which weights are taken, under which prefix, and what is said about it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from command import Program
from torch import Tensor, nn

from convsurgeon import storage
from convsurgeon.errors import ConvSurgeonError, ModelError, OptionError, UntrustedFileError, WeightsError
from convsurgeon.progress import Progress

State = dict[str, Tensor]

NET = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.last(self.norm(self.conv(x)))).mean((2, 3)))

class Inner(nn.Module):
    """A network whose only part is called `model`, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.model(x)

class Trainer:
    """Something that is no network."""
'''


@pytest.fixture
def mynet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Write `NET` to mynet.py and work in its folder; forget it afterwards."""
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mynet", None)
    yield __import__("mynet")
    sys.modules.pop("mynet", None)


def filled(net: nn.Module, value: float) -> nn.Module:
    """Return the network with one number everywhere, so that it can be told from others."""
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(value)
    return net.eval()


def state(mynet: ModuleType, value: float, prefix: str = "", **kwargs: Any) -> State:
    """Return a state dict of `Net` with one number everywhere."""
    return {f"{prefix}{key}": tensor for key, tensor in filled(mynet.Net(**kwargs), value).state_dict().items()}


def load(source: str = "mynet:Net", **options: Any) -> tuple[float, list[str]]:
    """Return the number that a network was filled with, and what was said."""
    said: list[Progress] = []
    net = storage.load(source, report=said.append, **options)
    numbers = {float(tensor.detach().flatten()[0]) for tensor in (*net.parameters(), *net.buffers())}
    assert len(numbers) == 1
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in net.state_dict().values())
    return numbers.pop(), [event.message for event in said]


def fails(error: type[ConvSurgeonError], **options: Any) -> str:
    """Return the one line that a load is refused with."""
    with pytest.raises(error) as caught:
        storage.load(options.pop("source", "mynet:Net"), **options)
    assert type(caught.value) is error
    assert str(caught.value).isprintable()
    return str(caught.value)


# which weights

RAW, AVERAGE = 1.0, 2.0


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("state_dict", "state_dict_ema"),  # timm
        ("model", "model_ema"),  # torchvision's references, ConvNeXt, DeiT
        ("model", "ema"),
        ("params", "params_ema"),  # BasicSR, Real-ESRGAN
        ("model_state_dict", "model_state_dict_ema"),
        ("model_state_dict", "ema_state_dict"),
        ("net", "net_ema"),
        ("student", "teacher"),  # DINO, mean teachers
        ("state_dict", "swa_state_dict"),  # a name by nobody, that says what it is
    ],
)
@pytest.mark.parametrize("average_first", [False, True])
def test_the_average_comes_before_the_raw_weights(
    mynet: ModuleType, raw: str, average: str, average_first: bool
) -> None:
    both = {raw: state(mynet, RAW), average: state(mynet, AVERAGE)}
    torch.save({"epoch": 3, **(dict(reversed(both.items())) if average_first else both)}, "w.pth")
    note = f"w.pth holds {average} and {raw}; {average} was loaded; --weights-key {raw} takes the other"
    assert load(weights="w.pth") == (AVERAGE, [note])
    assert load(weights="w.pth", weights_key=raw) == (RAW, [])
    assert load(weights="w.pth", weights_key=average) == (AVERAGE, [])


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda raw, ema: {"model": raw, "ema": {"module": ema, "updates": 7}}, "ema.module"),  # RT-DETR
        (lambda raw, ema: {"state_dict": raw, "ema": {"state_dict": ema, "decay": 0.99}}, "ema.state_dict"),
        (lambda raw, ema: {"model": {"state_dict": raw, "ema": ema}}, "model.ema"),
        (lambda raw, ema: {"net": raw, "model_ema": {"model": ema}}, "model_ema.model"),
    ],
)
def test_averages_that_are_nested(mynet: ModuleType, wrap: Callable[[State, State], object], key: str) -> None:
    torch.save(wrap(state(mynet, RAW), state(mynet, AVERAGE)), "w.pth")
    number, (note,) = load(weights="w.pth")
    assert number == AVERAGE
    assert f"; {key} was loaded; --weights-key " in note
    assert load(weights="w.pth", weights_key=key) == (AVERAGE, [])
    (other,) = (part for part in note.split("; ")[0].removeprefix("w.pth holds ").split(" and ") if part != key)
    assert load(weights="w.pth", weights_key=other)[0] == RAW


@pytest.mark.parametrize("empty", [None, {}, "no", 0.999])
def test_an_average_that_is_none_is_not_spoken_of(mynet: ModuleType, empty: object) -> None:
    torch.save({"state_dict": state(mynet, RAW), "state_dict_ema": empty, "optimizer": {"state": {0: {}}}}, "w.pth")
    assert load(weights="w.pth") == (RAW, [])


def test_mmengine_keeps_the_average_under_state_dict(mynet: ModuleType) -> None:
    saved = {"meta": {}, "message_hub": {}, "state_dict": state(mynet, AVERAGE), "ema_state_dict": state(mynet, RAW)}
    torch.save(saved, "w.pth")
    number, (note,) = load(weights="w.pth")
    assert number == AVERAGE
    assert note == (
        "w.pth holds state_dict and ema_state_dict; state_dict was loaded; --weights-key ema_state_dict takes the other"
    )


def test_an_average_that_does_not_fit_gives_way_and_that_is_said(mynet: ModuleType) -> None:
    torch.save({"state_dict": state(mynet, RAW), "ema": state(mynet, AVERAGE, width=8)}, "w.pth")
    number, (note,) = load(weights="w.pth")
    assert number == RAW
    assert note.startswith("w.pth holds ema and state_dict; state_dict was loaded, since ema does not fit: ")
    assert "conv.weight: 8x3x3x3 in the file, 4x3x3x3 in the model" in note


def test_an_average_of_a_class_not_allowed_is_spoken_of(mynet: ModuleType) -> None:
    torch.save({"state_dict": state(mynet, RAW), "ema": filled(mynet.Net(), AVERAGE)}, "w.pth")
    number, (note,) = load(weights="w.pth")
    assert number == RAW
    assert note.endswith("state_dict was loaded, since ema is of a class not yet allowed: --trust-module mynet")
    number, (note,) = load(weights="w.pth", trust_modules=["mynet"])
    assert number == AVERAGE
    assert note.endswith("; ema was loaded; --weights-key state_dict takes the other")


def test_a_raw_module_of_a_class_not_allowed_gives_no_reason(mynet: ModuleType) -> None:
    torch.save({"model": filled(mynet.Net(), RAW), "ema": state(mynet, AVERAGE)}, "w.pth")
    note = "w.pth holds ema and model; ema was loaded; --weights-key model takes the other"
    assert load(weights="w.pth") == (AVERAGE, [note])
    assert "--trust-module mynet" in fails(UntrustedFileError, weights="w.pth", weights_key="model")


def test_a_key_with_several_weights_below_it_says_which(mynet: ModuleType) -> None:
    both = {"state_dict": state(mynet, RAW), "state_dict_ema": state(mynet, AVERAGE)}
    torch.save({"run": {"last": both}}, "w.pth")
    number, (note,) = load(weights="w.pth", weights_key="run.last")
    assert number == AVERAGE
    assert "; run.last.state_dict_ema was loaded; --weights-key run.last.state_dict takes the other" in note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_and_half_modules_become_float32(mynet: ModuleType, dtype: torch.dtype) -> None:
    half = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state(mynet, 2).items()}
    torch.save({"params_ema": half}, "w.pth")
    assert load(weights="w.pth") == (2.0, [])
    torch.save({"model": filled(mynet.Net(), 3.0).to(dtype), "ema": None}, "w.pth")
    assert load(weights="w.pth", trust_modules=["mynet"]) == (3.0, [])


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("state_dict_emma", "has no such key. Did you mean 'state_dict_ema'? It has: state_dict_ema, state_dict, "),
        ("epoch", "has a int there, no state dict; weights are under: state_dict_ema, state_dict"),
        ("callbacks.EMA", "callbacks.EMA: w.pth has a dict there, no state dict"),
        ("callbacks.ema", "has no such key."),
        ("", "has no such key."),
    ],
)
def test_a_key_that_is_none(mynet: ModuleType, key: str, said: str) -> None:
    saved = {"epoch": 3, "callbacks": {"EMA": {"decay": 0.9}}}
    torch.save({**saved, "state_dict": state(mynet, RAW), "state_dict_ema": state(mynet, AVERAGE)}, "w.pth")
    assert said in fails(OptionError, weights="w.pth", weights_key=key)


@pytest.mark.parametrize(
    ("saved", "key"),
    [
        (lambda ema: {"callbacks": {"EMA": {"state": ema, "decay": 0.9}}}, "callbacks.EMA.state"),
        (lambda ema: {"callbacks": {"EMA{'decay': 0.9}": {"ema": ema}}}, "callbacks.EMA{'decay': 0.9}"),
        (lambda ema: {"loops": {"a": {"b": {"c": {"d": ema}}}}}, "loops.a.b.c.d"),
        (lambda ema: {"versions": {3: ema}}, "versions.3"),
        (lambda ema: {"a.b": {"c": ema}}, "a.b.c"),
    ],
)
def test_a_key_says_where_nobody_looks(mynet: ModuleType, saved: Callable[[State], dict[str, Any]], key: str) -> None:
    torch.save({"state_dict": state(mynet, RAW), **saved(state(mynet, AVERAGE))}, "w.ckpt")
    assert load(weights="w.ckpt") == (RAW, [])
    assert load(weights="w.ckpt", weights_key=key) == (AVERAGE, [])


def test_networks_under_names_of_their_own(mynet: ModuleType) -> None:
    torch.save({"G": state(mynet, RAW), "D": {"weight": torch.zeros(2)}}, "gan.pth")
    number, (note,) = load(weights="gan.pth")
    assert number == RAW
    assert note == "gan.pth holds G and D; G was loaded, the only one that fits"
    torch.save({"A": state(mynet, RAW), "B": state(mynet, AVERAGE)}, "cyclegan.pth")
    said = fails(WeightsError, weights="cyclegan.pth")
    assert said == "cyclegan.pth holds A and B, which all fit mynet:Net; say which: --weights-key A"
    assert load(weights="cyclegan.pth", weights_key="B") == (AVERAGE, [])


def test_another_number_of_classes_is_said_as_the_network_calls_it(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(
        "from torch import nn\n\n"
        "def make(classes=10):\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, classes))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        torch.save(storage.load("counted:make", model_args={"classes": 5}).state_dict(), tmp_path / "w.pth")
        with pytest.raises(WeightsError) as caught:
            storage.load("counted:make", weights=tmp_path / "w.pth")
        assert str(caught.value).endswith(
            "another number of classes is said by --model-arg NAME=N, with the name that counted:make has for it"
        )
        assert storage.load("counted:make", weights=tmp_path / "w.pth", model_args={"classes": 5})[1].out_features == 5


def test_flags_about_weights_want_a_file_of_weights(mynet: ModuleType) -> None:
    torch.save(filled(mynet.Net(), RAW), "net.pt")
    safetensors.torch.save_file(state(mynet, RAW), "w.safetensors")
    assert "--weights-key is about a file of weights" in fails(OptionError, weights_key="ema")
    assert "--weights-prefix is about a file" in fails(OptionError, weights="DEFAULT", weights_prefix="model")
    assert "--weights-prefix goes with an arch" in fails(OptionError, source="net.pt", weights_prefix="model")
    assert "leave out --weights-key" in fails(OptionError, weights="w.safetensors", weights_key="ema")
    assert "a safetensors file" in fails(OptionError, source="w.safetensors", weights_key="ema")
    said = fails(OptionError, source="net.pt", weights_key="ema", trust_modules=["mynet"])
    assert "leave out --weights-key" in said


# prefixes


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.", "module.", "_orig_mod.", "module.model.", "_orig_mod.module.", "model._orig_mod.", "a.b.c."],
)
def test_one_prefix_is_found_beside_losses_metrics_and_other_networks(mynet: ModuleType, prefix: str) -> None:
    more = {
        "criterion.weight": torch.ones(3),
        "val_acc.total": torch.zeros(()),
        "val_acc.correct": torch.zeros(()),
        "vgg.fc.weight": torch.zeros(3, 4),
        "n_averaged": torch.zeros((), dtype=torch.long),
    }
    torch.save({"state_dict": {**state(mynet, RAW, prefix), **more}}, "w.ckpt")
    note = f"took {prefix!r} of w.ckpt: 11 of 16 entries; the other 5 are criterion.*, val_acc.*, vgg.*, ..."
    assert load(weights="w.ckpt") == (RAW, [note])
    torch.save({"state_dict": {**more, **state(mynet, RAW, prefix)}}, "w.ckpt")
    assert load(weights="w.ckpt", weights_prefix=prefix.rstrip("."))[0] == RAW
    safetensors.torch.save_file({**state(mynet, RAW, prefix), **more}, "w.safetensors")
    assert load(weights="w.safetensors")[0] == RAW


def test_a_prefix_of_all_entries_is_said(mynet: ModuleType) -> None:
    torch.save(state(mynet, RAW, "module."), "w.pth")
    assert load(weights="w.pth") == (RAW, ["took 'module.' of w.pth: all 11 entries"])
    torch.save({**state(mynet, RAW, "module."), "n_averaged": torch.tensor(3)}, "w.pth")  # AveragedModel
    assert load(weights="w.pth") == (RAW, ["took 'module.' of w.pth: 11 of 12 entries; the other is n_averaged"])


def test_no_prefix_is_not_spoken_of(mynet: ModuleType) -> None:
    torch.save(state(mynet, RAW), "w.pth")
    assert load(weights="w.pth") == (RAW, [])


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
def test_a_network_with_a_part_called_model(mynet: ModuleType, prefix: str) -> None:
    net = filled(mynet.Inner(), RAW)
    saved = {f"{prefix}{key}": tensor for key, tensor in net.state_dict().items()}
    torch.save({"state_dict": saved}, "w.ckpt")
    notes = [f"took {prefix!r} of w.ckpt: all 7 entries"] if prefix else []
    assert load("mynet:Inner", weights="w.ckpt") == (RAW, notes)


def test_counters_that_are_missing_under_a_prefix(mynet: ModuleType) -> None:
    saved = {key: tensor for key, tensor in state(mynet, RAW, "net.").items() if "num_batches" not in key}
    torch.save(saved, "w.pth")
    net = storage.load("mynet:Net", weights="w.pth")
    assert net.norm.num_batches_tracked == 0
    assert float(net.norm.running_var[0]) == RAW


@pytest.mark.parametrize(
    ("first", "second"),
    [("model.", "ema_model."), ("", "ema."), ("encoder_q.", "encoder_k."), ("module.", "module.old.")],
)
def test_two_prefixes_that_fit_are_refused_naming_both(mynet: ModuleType, first: str, second: str) -> None:
    torch.save({"state_dict": {**state(mynet, RAW, first), **state(mynet, AVERAGE, second)}}, "w.ckpt")
    said = fails(WeightsError, weights="w.ckpt")
    one, other = sorted([first, second])
    assert said == (
        f"w.ckpt has all that mynet:Net needs under each of {one!r} and {other!r}; say which: --weights-prefix {other}"
    )
    assert load(weights="w.ckpt", weights_prefix=first)[0] == RAW
    assert load(weights="w.ckpt", weights_prefix=second)[0] == AVERAGE


def test_two_networks_of_two_sizes_are_told_apart(mynet: ModuleType) -> None:
    torch.save({**state(mynet, RAW, "a."), **state(mynet, AVERAGE, "b.", width=8)}, "w.pth")
    assert load(weights="w.pth")[0] == RAW
    assert load(weights="w.pth", model_args={"width": 8})[0] == AVERAGE


def test_classes_are_inferred_under_a_prefix(mynet: ModuleType) -> None:
    torch.save({**state(mynet, RAW, "model.", num_classes=7), "criterion.weight": torch.ones(7)}, "w.ckpt")
    number, notes = load(weights="w.ckpt")
    assert number == RAW
    assert notes == [
        "took 'model.' of w.ckpt: 11 of 12 entries; the other is criterion.*",
        "mynet:Net was built with the 7 classes of w.ckpt",
    ]
    torch.save({**state(mynet, RAW, "student.", num_classes=7), **state(mynet, AVERAGE, "teacher.")}, "w.ckpt")
    assert "under each of 'student.' and 'teacher.'" in fails(WeightsError, weights="w.ckpt")
    assert load(weights="w.ckpt", model_args={"num_classes": 7})[0] == RAW


@pytest.mark.parametrize("prefix", ["", "model."])
def test_leftovers_under_the_prefix_are_refused(mynet: ModuleType, prefix: str) -> None:
    torch.save({**state(mynet, RAW, prefix), f"{prefix}aux.weight": torch.zeros(3, 4)}, "w.ckpt")
    under = f"under {prefix!r}, " if prefix else ""
    assert fails(WeightsError, weights="w.ckpt") == (
        f"w.ckpt does not fit mynet:Net: {under}1 unexpected ({prefix}aux.weight); "
        f"nearest to {prefix}aux.weight in the model: fc.weight"
    )


@pytest.mark.parametrize("classes", [4, 7])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_refusal_shows_the_nearest_keys(mynet: ModuleType, prefix: str, classes: int) -> None:
    raw = state(mynet, RAW, prefix, num_classes=classes)
    saved = {key.replace("fc.", "head."): tensor for key, tensor in raw.items()}
    torch.save({**saved, "loss.weight": torch.zeros(2)}, "w.ckpt")
    said = fails(WeightsError, weights="w.ckpt")
    assert "2 missing (fc.weight, fc.bias)" in said
    assert f"nearest to fc.weight in the file: {prefix}head.weight; " in said
    assert f"nearest to fc.bias in the file: {prefix}head.bias" in said
    assert ("under 'model.', " in said) == bool(prefix)


def test_a_prefix_that_is_not_there(mynet: ModuleType) -> None:
    torch.save({**state(mynet, RAW, "model."), "loss.weight": torch.zeros(2)}, "w.ckpt")
    said = fails(WeightsError, weights="w.ckpt", weights_prefix="modell")
    assert said == (
        "w.ckpt does not fit mynet:Net: nothing in it is under 'modell.'. Did you mean 'model.'? "
        "Its prefixes: model., loss."
    )
    said = fails(WeightsError, weights="w.ckpt", weights_prefix="loss.")
    assert "under 'loss.', 10 missing (conv.weight, " in said


@pytest.mark.parametrize("dots", [10, 1000])
def test_odd_names_take_no_time(mynet: ModuleType, dots: int) -> None:
    odd = {f"{number}{'.a' * dots}.weight": torch.zeros(1) for number in range(300)}
    torch.save({**odd, "": torch.zeros(1), ".": torch.zeros(1), "a\nb": torch.zeros(1)}, "w.pth")
    assert "missing (conv.weight, conv.bias, " in fails(WeightsError, weights="w.pth")


# whole modules in checkpoints


def yolo(mynet: ModuleType, **more: Any) -> dict[str, Any]:
    """A checkpoint as detection code bases write it."""
    rest = {"epoch": 3, "best_fitness": 0.5, "train_args": {"lr": 0.1}, "date": "2024-01-01", "optimizer": None}
    return {"model": filled(mynet.Net(), RAW).half(), "ema": None, **rest, **more}


def test_a_checkpoint_with_a_whole_module_is_a_model(mynet: ModuleType) -> None:
    torch.save(yolo(mynet), "best.pt")
    assert "--trust-module mynet" in fails(UntrustedFileError, source="best.pt")
    for options in ({"trust_modules": ["mynet"]}, {"trust": True}):
        note = "took the whole Net under model of best.pt; it was float16, now float32"
        assert load("best.pt", **options) == (RAW, [note])


def test_the_average_module_comes_first(mynet: ModuleType) -> None:
    torch.save(yolo(mynet, ema=filled(mynet.Net(), AVERAGE).half(), updates=7), "best.pt")
    number, (note,) = load("best.pt", trust_modules=["mynet"])
    assert number == AVERAGE
    assert note == (
        "best.pt holds ema and model; ema was loaded; --weights-key model takes the other; it was float16, now float32"
    )
    number, (note,) = load("best.pt", trust_modules=["mynet"], weights_key="model")
    assert (number, note) == (RAW, "took the whole Net under model of best.pt; it was float16, now float32")
    assert load(weights="best.pt", trust_modules=["mynet"])[0] == AVERAGE
    assert load(weights="best.pt", trust_modules=["mynet"], weights_key="model") == (RAW, [])


def test_modules_that_share_tensors_or_keep_them_in_attributes_become_float32(mynet: ModuleType) -> None:
    net = filled(mynet.Net(), RAW)
    net.last.weight = net.extra = nn.Parameter(torch.ones(4, 4, 3, 3), requires_grad=False)
    net.anchors = torch.ones(3)
    torch.save({"model": net.half()}, "best.pt")
    net.anchors = net.anchors.half()
    torch.save({"model": net}, "best.pt")
    loaded = storage.load("best.pt", trust_modules=["mynet"])
    assert loaded.last.weight is loaded.extra
    assert not loaded.extra.requires_grad
    assert loaded.anchors.dtype == loaded.extra.dtype == torch.float32
    assert loaded.norm.num_batches_tracked.dtype == torch.int64
    assert loaded(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_other_checkpoints_with_modules(mynet: ModuleType) -> None:
    one, other = filled(mynet.Net(), RAW), filled(mynet.Net(), AVERAGE)
    options = {"trust_modules": ["mynet"]}
    torch.save({"generator": one}, "gan.pt")
    assert load("gan.pt", **options) == (RAW, ["took the whole Net under generator of gan.pt"])
    torch.save({"A": one, "B": other}, "gan.pt")
    assert "gan.pt holds A, B, all whole modules; say which: --weights-key A" in fails(
        ModelError, source="gan.pt", **options
    )
    assert load("gan.pt", weights_key="B", **options)[0] == AVERAGE
    torch.save({"model": one, "state_dict_ema": other.state_dict()}, "both.pt")
    number, (note,) = load("both.pt", **options)
    assert number == RAW
    assert note == (
        "both.pt holds state_dict_ema and model; model was loaded, since state_dict_ema has only weights, "
        "which --weights both.pt with an architecture takes"
    )
    torch.save({"model": other.state_dict(), "trainer": one}, "weights.pt")
    assert "holds only weights" in fails(ModelError, source="weights.pt", **options)


def test_a_checkpoint_that_needs_more_trust_says_so(mynet: ModuleType) -> None:
    torch.save(yolo(mynet, trainer=mynet.Trainer.__new__(mynet.Trainer), path=Path), "best.pt")
    assert "pathlib" in fails(UntrustedFileError, source="best.pt", trust_modules=["mynet"])


# hooks and methods that a file brings are not called


def test_nothing_of_a_module_is_called_while_its_weights_are_read(
    mynet: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = filled(mynet.Net(), RAW)
    net._state_dict_hooks[1] = net._state_dict_pre_hooks[2] = nn.functional.relu
    torch.save({"model": net}, "w.pth")
    monkeypatch.setattr(nn.Module, "state_dict", _forbid(nn.Module.state_dict, mynet.Net, net))
    assert load(weights="w.pth", trust_modules=["mynet"])[0] == RAW


def _forbid(method: Callable[..., Any], kind: type, _: object) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert not self._state_dict_hooks, f"state_dict of a {kind.__name__} out of a file was called"
        return method(self, *args, **kwargs)

    return call


def test_modules_that_hold_one_another_without_end_are_refused(tmp_path: Path) -> None:
    net: nn.Module = nn.Identity()
    for _ in range(40):
        outer = nn.Module()
        outer.a = outer.b = net
        net = outer
    torch.save({"model": net}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="hold one another too often"):
        storage.load("torchvision:squeezenet1_1", weights=tmp_path / "w.pth")


def test_a_dict_that_holds_itself_is_no_checkpoint(mynet: ModuleType) -> None:
    endless: dict[str, Any] = {"epoch": 1}
    endless["model"] = endless["state_dict"] = endless
    torch.save(endless, "w.pth")
    assert "no state dict" in fails(WeightsError, weights="w.pth")
    assert "not an nn.Module" in fails(ModelError, source="w.pth")


# the command line

SHAPE = ("--input-shape", "1,3,8,8")


@pytest.fixture
def program(mynet: ModuleType, tmp_path: Path) -> Program:
    """The command line in a folder with `w.ckpt`, raw and average under a prefix, and `best.pt`, a whole module."""
    more = {"criterion.weight": torch.ones(3)}
    both = {
        "state_dict": state(mynet, RAW, "model.") | more,
        "state_dict_ema": {**state(mynet, AVERAGE, "model."), **more},
    }
    torch.save({"epoch": 3, **both}, "w.ckpt")
    torch.save(yolo(mynet), "best.pt")
    return Program(tmp_path)


def test_the_command_line_says_what_it_took(program: Program) -> None:
    done = program("convert", "mynet:Net", "--weights", "w.ckpt", *SHAPE).done()
    notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: w.ckpt holds state_dict_ema and state_dict; state_dict_ema was loaded; "
        "--weights-key state_dict takes the other",
        "note: took 'model.' of w.ckpt (state_dict_ema): 11 of 12 entries; the other is criterion.*",
    ]
    student = storage.load(program.folder / "Net.depthwise.safetensors", trust_modules=["mynet"])
    assert float(student.fc.weight.detach()[0, 0]) == AVERAGE


@pytest.mark.parametrize("verb", ["inspect", "convert", "export"])
def test_every_verb_takes_the_flags(program: Program, verb: str) -> None:
    flags = ("--weights", "w.ckpt", "--weights-key", "state_dict", "--weights-prefix", "model")
    done = program(verb, "mynet:Net", *flags, *SHAPE).done()
    assert "note: took 'model.' of w.ckpt: 11 of 12" in done.err
    assert "holds" not in done.err
    (program.folder / "mynet-Net.onnx").unlink(missing_ok=True)
    assert "nothing in it is under 'a.'" in program(verb, "mynet:Net", *flags[:-1], "a", *SHAPE).error
    assert "has no such key" in program(verb, "mynet:Net", *flags[:3], "a", *SHAPE).error
    assert "give one: --weights FILE" in program(verb, "mynet:Net", *flags[2:], *SHAPE).error


def test_evaluate_and_distill_take_them_and_a_run_remembers(program: Program) -> None:
    (program.folder / "data.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n\ndef small():\n"
        "    images = TensorDataset(torch.zeros(8, 3, 8, 8), torch.arange(8) % 3)\n"
        "    return (DataLoader(images, batch_size=4),) * 3\n"
    )
    flags = ("--weights", "w.ckpt", "--weights-key", "state_dict", "--weights-prefix", "model.", "--data", "data:small")
    assert "note: took 'model.' of w.ckpt: " in program("evaluate", "mynet:Net", *flags).done().err
    assert "has no such key" in program("evaluate", "mynet:Net", *flags[:3], "a", *flags[4:]).error
    program("distill", "mynet:Net", *flags, "--epochs", "1", "--no-augment", "-o", "run").done()
    said = json.loads((program.folder / "run" / "command.json").read_text())
    assert (said["weights_key"], said["weights_prefix"]) == ("state_dict", "model.")
    sys.modules.pop("data", None)


def test_an_onnx_file_takes_no_weights(program: Program) -> None:
    (program.folder / "a.onnx").write_bytes(b"")
    for flag in ("--weights-key", "--weights-prefix"):
        assert "not with the ONNX file a.onnx" in program("evaluate", "a.onnx", flag, "a", "--data", "digits").error


def test_a_checkpoint_of_a_whole_module_is_converted(program: Program) -> None:
    done = program("convert", "best.pt", "--trust-module", "mynet", *SHAPE).done()
    assert "note: took the whole Net under model of best.pt; it was float16, now float32\n" in done.err
    assert "if you trust that code: --trust-module mynet, or --trust" in program("convert", "best.pt").error
    student = storage.load(program.folder / "best.depthwise.pt", trust_modules=["mynet"])
    assert student.conv.weight.dtype == torch.float32
