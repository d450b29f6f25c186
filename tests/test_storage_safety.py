"""Files that would run something: none runs, each is refused in one line that names what it met."""

from __future__ import annotations

import argparse
import collections
import functools
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision.datasets.utils
from torch import nn

from convsurgeon import storage
from convsurgeon.errors import ModelError, UntrustedFileError

NET = """
import functools, torch
from torch import nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm_layer = nn.BatchNorm2d
        self.norm = functools.partial(nn.GroupNorm, 2, eps=0.5)
        self.acts = [F.relu, torch.tanh, torch.nn.functional.gelu]
        self.sizes = {"kinds": (nn.ReLU, 3)}

    def forward(self, x):
        return self.acts[0](self.conv(x))

class Settings:
    def __init__(self, text):
        raise RuntimeError("ran")

def helper(path):
    open(path, "w").close()
"""


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write `NET` to mynet.py where it can be imported; forget it afterwards, and what another test left there."""
    sys.modules.pop("mynet", None)
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("mynet")
    sys.modules.pop("mynet", None)


def write_pickle(path: Path, data: bytes) -> Path:
    """Write an archive as torch.save does, with `data` as its pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return path


def refused(path: Path, **options) -> str:
    """Return what loading `path` is refused with; it must be one line."""
    with pytest.raises(UntrustedFileError) as caught:
        storage.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_shell_command_is_refused_and_did_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save(Calls(os.system, f"touch {mark}"), tmp_path / "net.pt")
    message = refused(tmp_path / "net.pt")
    assert f"{os.system.__module__}.system" in message
    assert "--trust" in message
    assert "--trust-module" not in message
    assert not mark.exists()


def test_trust_runs_what_the_file_brings(tmp_path):
    mark = tmp_path / "ran"
    torch.save(Calls(os.system, f"touch {mark}"), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="holds a int"):
        storage.load(tmp_path / "net.pt", trust=True)
    assert mark.exists()


def test_a_command_hidden_inside_an_ordinary_module_is_refused(tmp_path):
    mark = tmp_path / "ran"
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.extra = Calls(os.system, f"touch {mark}")
    torch.save(model, tmp_path / "net.pt")
    assert "system" in refused(tmp_path / "net.pt")
    assert not mark.exists()


def test_functions_under_admitted_prefixes_are_refused(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("ran", "x")
    function = torchvision.datasets.utils.extract_archive
    torch.save(Calls(function, str(archive), str(tmp_path)), tmp_path / "net.pt")
    message = refused(tmp_path / "net.pt")
    assert "torchvision.datasets.utils.extract_archive" in message
    assert "--trust-module" not in message
    assert not (tmp_path / "ran").exists()


def test_a_re_exported_function_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.utils, "copyfile", shutil.copyfile, raising=False)
    (tmp_path / "from").write_text("x")
    strings = (f"{tmp_path}/from", f"{tmp_path}/ran")
    arguments = b"".join(b"X" + len(text).to_bytes(4, "little") + text.encode() for text in strings)

    def calling(module: str, name: str) -> Path:
        data = f"\x80\x02c{module}\n{name}\n".encode("latin-1") + arguments + b"\x86R."
        return write_pickle(tmp_path / "net.pt", data)

    assert "torchvision.utils.copyfile" in refused(calling("torchvision.utils", "copyfile"))
    # a module inside another that only imported it
    with pytest.raises(ModelError, match=r"utils\.pathlib\.Path, which cannot be found here"):
        storage.load(calling("torchvision.utils.pathlib", "Path"))
    with pytest.raises(ModelError, match=r"utils\.pathlib\.Path, which cannot be found here"):
        storage.load(calling("torchvision.utils", "pathlib.Path"))
    assert not (tmp_path / "ran").exists()


def test_a_module_class_is_never_called(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(nn.Linear, "__init__", lambda self, *sizes: built.append(sizes))
    torch.save(Calls(nn.Linear, 20_000, 20_000), tmp_path / "net.pt")
    assert "calls torch.nn.modules.linear.Linear" in refused(tmp_path / "net.pt")
    assert built == []


IDENTITY = b"\x80\x02ctorch.nn.modules.linear\nIdentity\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (IDENTITY + b"K\x05\x85\x81.", "with arguments"),
        (IDENTITY + b")\x81}b}b.", "a state"),
        (IDENTITY + b")\x81]b.", "a state"),
        (IDENTITY + b")\x81}X\x0c\x00\x00\x00__setstate__K\x01sb.", "a state"),
        (IDENTITY + b"}b.", "read safely"),
        (IDENTITY + b")\x81)R.", "read safely"),
        (
            b"\x80\x02cfunctools\npartial\nX\x01\x00\x00\x00a\x85R(X\x01\x00\x00\x00a)}Ntb.",
            "functools.partial",
        ),
        (b"\x80\x02ctorch.nn.functional\nrelu\nK\x01\x85R.", "calls torch.nn.functional.relu"),
        (
            b"\x80\x02cbuiltins\ngetattr\nctorch.nn.modules.linear\nIdentity\nX\x04\x00\x00\x00call\x86R.",
            "getattr",
        ),
        (
            b"\x80\x02cbuiltins\ngetattr\nctorch._C\n_VariableFunctionsClass\nX\x09\x00\x00\x00from_file\x86R.",
            "getattr",
        ),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "read safely"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_odd_pickles_are_refused(tmp_path, data, said):
    assert said in refused(write_pickle(tmp_path / "net.pt", data))


def test_a_module_that_never_got_its_state_is_refused(tmp_path):
    assert "without its state" in refused(write_pickle(tmp_path / "net.pt", IDENTITY + b")\x81."))


def test_a_module_with_improper_parts_is_damaged(tmp_path):
    parts = b"X\x0b\x00\x00\x00_parameters}X\x01\x00\x00\x00aK\x01ss"
    for state in (b"}" + parts, b"}X\x08\x00\x00\x00_buffers}s"):
        with pytest.raises(ModelError, match="a Identity in it has no proper _parameters"):
            storage.load(write_pickle(tmp_path / "net.pt", IDENTITY + b")\x81" + state + b"b."))


def test_a_reference_to_nothing_is_damaged(tmp_path):
    with pytest.raises(ModelError, match="is damaged"):
        storage.load(write_pickle(tmp_path / "net.pt", b"\x80\x02h\x00."))


def test_a_child_that_never_got_its_state_is_refused(tmp_path):
    child = b"ctorch.nn.modules.linear\nIdentity\n)\x81"
    modules = b"}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00a" + child + b"ss"
    data = b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81" + modules + b"b."
    assert "without its state" in refused(write_pickle(tmp_path / "net.pt", data))


@pytest.mark.parametrize(
    "name", ["torch.fx.graph_module.GraphModule", "torchvision.models.feature_extraction.DualGraphModule"]
)
def test_modules_that_carry_code_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    data = f"\x80\x02c{module}\n{attribute}\n)\x81}}b.".encode("latin-1")
    assert attribute in refused(write_pickle(tmp_path / "net.pt", data), trust_modules=["torch"])


def test_a_class_that_fetches_when_it_is_called_is_refused(tmp_path):
    from timm.task.distillation import DistillationTeacher

    net = nn.Sequential()
    net.forward = functools.partial(DistillationTeacher, "hf-hub:someone/something")
    torch.save(net, tmp_path / "net.pt")
    assert "timm.task.distillation.DistillationTeacher" in refused(tmp_path / "net.pt")


def test_modules_named_main_are_not_imported(tmp_path):
    data = b"\x80\x02cconvsurgeon.__main__\nNet\n)\x81}b."
    assert "convsurgeon.__main__.Net" in refused(write_pickle(tmp_path / "net.pt", data))


def test_nothing_of_an_untrusted_package_is_imported(tmp_path, own_module):
    torch.save(own_module.Block(), tmp_path / "net.pt")
    del sys.modules["mynet"]
    message = refused(tmp_path / "net.pt")
    assert "mynet.Block" in message
    assert "--trust-module mynet, or --trust" in message
    assert "mynet" not in sys.modules


def test_an_own_class_is_admitted_by_its_module(tmp_path, own_module):
    model = own_module.Block().eval()
    torch.save(model, tmp_path / "net.pt")
    loaded = storage.load(tmp_path / "net.pt", trust_modules=["mynet"])
    assert type(loaded) is own_module.Block
    assert not loaded.training
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.norm_layer is nn.BatchNorm2d
    assert loaded.acts == [nn.functional.relu, torch.tanh, nn.functional.gelu]
    assert loaded.sizes == {"kinds": (nn.ReLU, 3)}
    assert isinstance(loaded.norm, functools.partial)
    assert loaded.norm(4).eps == 0.5


def test_a_prefix_covers_whole_components_only(tmp_path, own_module):
    torch.save(own_module.Block(), tmp_path / "net.pt")
    for prefix in ("my", "mynet.Block", "mynets"):
        assert "mynet.Block" in refused(tmp_path / "net.pt", trust_modules=[prefix])


def test_what_is_no_module_class_stays_out_of_a_trusted_module(tmp_path, own_module):
    torch.save(Calls(own_module.helper, str(tmp_path / "ran")), tmp_path / "net.pt")
    message = refused(tmp_path / "net.pt", trust_modules=["mynet"])
    assert "mynet.helper" in message
    assert "--trust-module" not in message
    torch.save(Calls(own_module.Settings, "x"), tmp_path / "net.pt")
    assert "mynet.Settings" in refused(tmp_path / "net.pt", trust_modules=["mynet"])
    assert not (tmp_path / "ran").exists()


def test_a_trusted_class_that_is_gone_says_so(tmp_path, own_module):
    torch.save(own_module.Block(), tmp_path / "net.pt")
    del own_module.Block
    with pytest.raises(ModelError, match=r"needs mynet\.Block, which cannot be found here: AttributeError"):
        storage.load(tmp_path / "net.pt", trust_modules=["mynet"])


@pytest.mark.parametrize("trust", [False, True])
def test_a_class_saved_from_a_script_says_the_way_out(tmp_path, monkeypatch, trust):
    net = type("ScriptNet", (nn.Module,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "ScriptNet", net, raising=False)
    torch.save(net(), tmp_path / "net.pt")
    monkeypatch.delattr(sys.modules["__main__"], "ScriptNet")
    message = refused(tmp_path / "net.pt", trust=trust)
    assert "mynet:ScriptNet" in message
    assert "--weights FILE" in message
    assert "state_dict" in message


def test_what_the_program_admitted_itself_is_not_used_and_is_put_back(tmp_path):
    torch.save(Calls(shutil.copyfile, "/nowhere", "/nowhere else"), tmp_path / "net.pt")
    with torch.serialization.safe_globals([shutil.copyfile]):
        before = set(torch.serialization.get_safe_globals())
        assert "shutil.copyfile" in refused(tmp_path / "net.pt")
        assert set(torch.serialization.get_safe_globals()) == before
    assert shutil.copyfile in before


def test_weights_with_foreign_objects_are_read_without_them(tmp_path, own_module):
    net = nn.Linear(2, 3)
    rest = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
        "hook": Calls(own_module.helper, str(tmp_path / "ran")),
        "settings": own_module.Settings.__new__(own_module.Settings),
    }
    torch.save({"state_dict": net.state_dict(), **rest}, tmp_path / "weights.pt")
    (tmp_path / "linear_net.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 3)\n")
    model = storage.load("linear_net:build", weights=tmp_path / "weights.pt")
    torch.testing.assert_close(model.weight, net.weight, rtol=0, atol=0)
    assert not (tmp_path / "ran").exists()
    sys.modules.pop("linear_net")
    with pytest.raises(ModelError, match="holds only weights"):
        storage.load(tmp_path / "weights.pt")


def test_a_checkpoint_takes_and_gives_plain_data_only(tmp_path):
    state = {"step": 3, "model": nn.Linear(2, 2).state_dict(), "history": [0.5, ("a", None)]}
    path = storage.save_checkpoint(state, tmp_path / "last.pt")
    loaded = storage.load_checkpoint(path)
    assert loaded["step"] == 3
    assert loaded["history"] == [0.5, ("a", None)]
    torch.testing.assert_close(loaded["model"], collections.OrderedDict(state["model"]), rtol=0, atol=0)
    with pytest.raises(ModelError, match=r"plain data, not torch\.nn\.modules\.linear\.Linear"):
        storage.save_checkpoint({"model": nn.Linear(2, 2)}, path)
    assert storage.load_checkpoint(path)["step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    with pytest.raises(ModelError, match="cannot write the checkpoint"):
        storage.save_checkpoint({"rule": lambda: None}, path)


def test_a_checkpoint_from_elsewhere_runs_nothing(tmp_path):
    torch.save({"step": Calls(os.system, f"touch {tmp_path}/ran")}, tmp_path / "last.pt")
    with pytest.raises(UntrustedFileError, match="system"):
        storage.load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()
    torch.save([1], tmp_path / "last.pt")
    with pytest.raises(ModelError, match="holds a list and no checkpoint"):
        storage.load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(ModelError, match="does not exist"):
        storage.load_checkpoint(tmp_path / "gone.pt")
    whole = storage.save_checkpoint({"a": torch.zeros(1000)}, tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="truncated or damaged"):
        storage.load_checkpoint(tmp_path / "last.pt")
