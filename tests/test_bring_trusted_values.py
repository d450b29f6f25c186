"""What a trusted package's modules are made with: values come back as they were, and nothing runs while they do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bombs import archive, call, dict_of, integer, module, text
from command import Program
from torch import nn

from convsurgeon import storage
from convsurgeon.errors import ModelError, UntrustedFileError

PACKAGE = """
import abc, dataclasses, enum, functools, types, typing
from collections import OrderedDict
from fractions import Fraction
from shutil import rmtree
from torch import nn
import torch

RAN = []  # what ran, by name


def ran(name):
    RAN.append(name)


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"
    PAIR = (1, 2)

    @classmethod
    def _missing_(cls, value):
        ran("_missing_")
        return cls.FAST


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Name(str, enum.Enum):
    A = "a"


class Bits(enum.Flag):
    ONE = 1
    TWO = 2


class Hashed(enum.Enum):
    A = 1

    def __hash__(self):
        ran("Hashed.__hash__")
        return 1


@dataclasses.dataclass(slots=False)
class Inner:
    depth: int = 2

    def __post_init__(self):
        ran("__post_init__")


@dataclasses.dataclass(frozen=True)
class Frozen:
    mode: Mode = Mode.FAST
    inner: Inner = None

    def __eq__(self, other):
        ran("Frozen.__eq__")
        return self is other

    def __hash__(self):
        ran("Frozen.__hash__")
        return 1


class Base(abc.ABC):
    def __init__(self):
        ran("Base.__init__")


class Config(Base):
    def __new__(cls, *args):
        ran("Config.__new__")
        return super().__new__(cls)

    def __init__(self, width=4):
        super().__init__()
        ran("Config.__init__")
        self.width = width

    def __init_subclass__(cls):
        ran("Config.__init_subclass__")

    def __setattr__(self, name, value):
        ran("Config.__setattr__")
        super().__setattr__(name, value)

    def __getattr__(self, name):
        ran("Config.__getattr__")
        raise AttributeError(name)

    def __call__(self):
        ran("Config.__call__")

    @property
    def secret(self):
        return 1

    @secret.setter
    def secret(self, value):
        ran("Config.secret")


class Empty:
    pass


class Size(typing.NamedTuple):
    height: int
    width: int


class Grown(Size):
    def __new__(cls, *args):
        ran("Grown.__new__")
        return super().__new__(cls, *args)


class Args(types.SimpleNamespace):
    def __init__(self, **kwargs):
        ran("Args.__init__")
        super().__init__(**kwargs)


def swish(x):
    ran("swish")
    return x * torch.sigmoid(x)


@functools.wraps(swish)
def wrapped(x):
    return x


class Net(nn.Module):
    class Kind(enum.Enum):
        PLAIN = 0

    @dataclasses.dataclass
    class Own:
        level: Level = Level.LOW

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.act(self.last(self.act(self.conv(x))))


class SetState:
    def __setstate__(self, state):
        ran("__setstate__")

class Reduce:
    def __reduce__(self):
        return super().__reduce__()

class ReduceEx:
    def __reduce_ex__(self, protocol):
        return super().__reduce_ex__(protocol)

class NewArgs:
    def __getnewargs__(self):
        return ()

class Deletes:
    def __del__(self):
        ran("__del__")

class Inherits(Deletes):
    pass

class GetAttribute:
    def __getattribute__(self, name):
        ran("__getattribute__")
        return super().__getattribute__(name)

class OwnDict:
    @property
    def __dict__(self):
        ran("__dict__")
        return {}

class Slots:
    __slots__ = ("a",)

@dataclasses.dataclass(slots=True)
class SlotsData:
    a: int = 1

class IsDict(dict):
    pass

class IsOrdered(OrderedDict):
    pass

class IsError(Exception):
    pass

class IsInt(int):
    pass

class Meta(type):
    def __call__(cls, *args):
        ran("Meta.__call__")
        return super().__call__(*args)

class HasMeta(metaclass=Meta):
    pass
"""
TRUST = {"trust_modules": ["mynet"]}


@pytest.fixture
def mynet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Write `PACKAGE` to mynet.py and work in its folder; forget it afterwards."""
    (tmp_path / "mynet.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mynet", None)
    yield __import__("mynet")
    sys.modules.pop("mynet", None)


def save(mynet: ModuleType, path: str = "net.pt", **attributes: Any) -> nn.Module:
    """Save a network with these attributes."""
    net: nn.Module = mynet.Net()
    net.act = torch.relu
    for name, value in attributes.items():
        setattr(net, name, value)
    torch.save(net.eval(), path)
    mynet.RAN.clear()
    return net


def refused(path: Path | str = "net.pt", **options: Any) -> str:
    """Return the one line that a file is refused with."""
    with pytest.raises(UntrustedFileError) as caught:
        storage.load(Path(path), **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def values_of(mynet: ModuleType) -> dict[str, Any]:
    """Return a value of every kind, under names of their own."""
    inner = mynet.Inner(3)
    config = mynet.Config()
    config.itself, config.inner, config.act = config, inner, mynet.swish
    endless: list[Any] = []
    endless.append(mynet.Size(endless, 2))
    return {
        "member": mynet.Mode.FAST,
        "member of a tuple": mynet.Mode.PAIR,
        "member of integers": mynet.Level.HIGH,
        "member of strings": mynet.Name.A,
        "member of flags": mynet.Bits.TWO,
        "member inside": mynet.Net.Kind.PLAIN,
        "enumeration": mynet.Mode,
        "members as keys": {mynet.Mode.FAST: 1, (mynet.Level.LOW, 2): [mynet.Mode.SLOW]},
        "set of members": {mynet.Mode.FAST, mynet.Level.LOW},
        "data": inner,
        "frozen data": mynet.Frozen(mynet.Mode.SLOW, inner),
        "data inside": mynet.Net.Own(mynet.Level.HIGH),
        "object": config,
        "object without state": mynet.Empty(),
        "class": mynet.Config,
        "named tuple": mynet.Size(1, 2),
        "nested named tuple": [mynet.Size(mynet.Size(1, 2), (inner, {"a": mynet.Mode.FAST}))],
        "endless named tuple": endless,
        "subclass of a named tuple": mynet.Grown(1, 2),
        "namespace": mynet.Args(lr=0.1, inner=inner, mode=mynet.Mode.FAST),
        "function": mynet.swish,
        "functions": [mynet.swish, {"act": (mynet.swish,)}],
    }


def describe(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """Return what a value is, as something that can be compared without its class."""
    if id(value) in seen:
        return "itself"
    seen = (*seen, id(value))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, dict | set):
        items = value.items() if isinstance(value, dict) else value
        return kind, sorted(repr(describe(item, seen)) for item in items)
    if isinstance(value, tuple | list):
        return kind, [describe(item, seen) for item in value]
    if hasattr(type(value), "__members__") or isinstance(value, type) or (callable(value) and not vars(value)):
        return repr(value)
    return (kind, describe(vars(value), seen)) if hasattr(value, "__dict__") else value


KINDS = (
    "member", "member of a tuple", "member of integers", "member of strings", "member of flags", "member inside",
    "enumeration", "members as keys", "set of members", "data", "frozen data", "data inside", "object",
    "object without state", "class", "named tuple", "nested named tuple", "endless named tuple", "namespace",
    "function", "functions", "subclass of a named tuple",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_value_comes_back_and_nothing_ran(mynet: ModuleType, kind: str) -> None:
    value = values_of(mynet)[kind]
    assert set(values_of(mynet)) == set(KINDS)
    save(mynet, value=value, again=value)
    expected = describe(value)
    mynet.RAN.clear()
    loaded = storage.load(Path("net.pt"), **TRUST)
    assert mynet.RAN == []
    assert type(loaded.value) is type(value)
    assert describe(loaded.value) == expected
    if isinstance(value, mynet.Mode | type | type(mynet.swish)):
        assert loaded.value is value
    assert loaded.again is loaded.value or isinstance(value, int)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("imported", [True, False])
def test_the_refusal_names_the_flag_that_opens_it(mynet: ModuleType, kind: str, imported: bool) -> None:
    save(mynet, value=values_of(mynet)[kind])
    if not imported:
        del sys.modules["mynet"]
    said = refused()
    assert said.endswith("not yet allowed; if you trust that code: --trust-module mynet, or --trust")
    assert imported or "mynet" not in sys.modules
    (prefix,) = re.findall(r"--trust-module ([\w.]+)", said)
    storage.load(Path("net.pt"), trust_modules=[prefix])


def test_values_hung_on_parameters_come_back(mynet: ModuleType) -> None:
    net = mynet.Net()
    net.act = mynet.swish
    net.conv.weight.kind, net.conv.weight.config = mynet.Mode.SLOW, mynet.Inner(5)
    torch.save(net.eval(), "net.pt")
    mynet.RAN.clear()
    loaded = storage.load(Path("net.pt"), **TRUST)
    assert mynet.RAN == []
    assert loaded.conv.weight.kind is mynet.Mode.SLOW
    assert loaded.conv.weight.config.depth == 5
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=0)


def test_a_network_made_with_them_is_converted_and_saved(mynet: ModuleType, tmp_path: Path) -> None:
    save(mynet, act=mynet.swish, mode=mynet.Mode.FAST, config=mynet.Config(), size=mynet.Size(1, 2))
    program, shape = Program(tmp_path), ("--input-shape", "1,3,8,8")
    assert "--trust-module mynet, or --trust" in program("convert", "net.pt", *shape).error
    program("convert", "net.pt", "--trust-module", "mynet", *shape).done()
    student = storage.load(tmp_path / "net.depthwise.pt", **TRUST)
    fresh = sys.modules["mynet"]
    assert student.mode is fresh.Mode.FAST
    assert (student.act, type(student.config), student.size) == (fresh.swish, fresh.Config, fresh.Size(1, 2))


def test_a_weights_file_may_hold_them(mynet: ModuleType) -> None:
    net = mynet.Net()
    torch.save({"state_dict": net.state_dict(), "config": mynet.Config(), "mode": mynet.Mode.FAST}, "w.pt")
    mynet.RAN.clear()
    for options in ({}, TRUST):
        storage.load("mynet:Net", weights="w.pt", **options)
    assert mynet.RAN == []


# classes that have a say in how they are restored

HOPELESS = {
    "SetState": "it has a __setstate__ of its own",
    "Reduce": "it has a __reduce__ of its own",
    "ReduceEx": "it has a __reduce_ex__ of its own",
    "NewArgs": "it has a __getnewargs__ of its own",
    "Deletes": "it has a __del__ of its own",
    "GetAttribute": "it has a __getattribute__ of its own",
    "OwnDict": "it has a __dict__ of its own",
    "Slots": "it has __slots__",
    "SlotsData": "it has __slots__",
    "IsDict": "it is built on ",
    "IsOrdered": "it is built on ",
    "IsError": "it is built on ",
    "IsInt": "it is built on ",
    "HasMeta": "it has a metaclass",
    "Fraction": "it is ",
    "rmtree": "it is ",
}


def value(name: str, content: bytes) -> None:
    """Write net.pt: a module that holds what these opcodes push."""
    parts = b"}" + b"".join(text(part) + b"}s" for part in ("_parameters", "_buffers", "_modules"))
    state = parts + text(name) + content + b"s"
    archive(module("torch.nn.modules.linear.Identity", state))(Path("net.pt"))


def new(cls: str, state: bytes = b"}b", args: bytes = b")") -> bytes:
    """Opcodes that push an object, created and given a state."""
    return f"cmynet\n{cls}\n".encode() + args + b"\x81" + state


def named(name: str) -> bytes:
    """Opcodes that push what a name of mynet stands for."""
    return f"cmynet\n{name}\n".encode()


@pytest.mark.parametrize(("name", "why"), HOPELESS.items())
@pytest.mark.parametrize("imported", [True, False])
def test_what_could_run_is_refused_and_only_trust_is_named(
    mynet: ModuleType, name: str, why: str, imported: bool
) -> None:
    value("value", named(name) if name == "rmtree" else new(name))
    mynet.RAN.clear()
    assert f"mynet.{name} ({why}" in refused(**TRUST)
    if not imported:
        del sys.modules["mynet"]
    said = refused()
    assert f"mynet.{name} (it " in said
    assert said.endswith("Only if you know who made it: --trust")
    assert "--trust-module" not in said
    assert mynet.RAN == []


def test_what_a_base_class_brings_is_refused_when_it_is_seen(mynet: ModuleType) -> None:
    value("value", new("Inherits"))
    said = refused(**TRUST)
    assert "mynet.Inherits (it has a __del__ of its own)" in said
    assert "--trust-module" not in said
    assert mynet.RAN == []


def test_one_hopeless_name_among_others_is_said_first(mynet: ModuleType) -> None:
    value("value", b"(" + named("Mode") + new("SetState") + new("Config") + b"t")
    said = refused()
    assert "would use mynet.SetState (it has a __setstate__ of its own), mynet.Config, mynet.Mode, which" in said


# hostile files

PARTIAL = b"cfunctools\npartial\n"


def partial(func: bytes) -> bytes:
    """Opcodes that push a `functools.partial` of it, as pickle writes them."""
    return PARTIAL + func + b"\x85R(" + func + b")}Ntb"


HOSTILE = {
    "function called": call("mynet.swish", text("a")),
    "function called without arguments": call("mynet.swish"),
    "function given a state": named("swish") + b"}b",
    "function created": named("swish") + b")\x81",
    "partial of a function": partial(named("swish")),
    "partial of a partial": partial(partial(named("swish"))),
    "partial of a class": partial(named("Config")),
    "partial of an enumeration": partial(named("Mode")),
    "partial of a member": partial(call("mynet.Mode", text("fast"))),
    "partial of an object": partial(new("Config")),
    "partial of a namespace": partial(named("Args")),
    "class called": call("mynet.Config"),
    "class called with arguments": call("mynet.Config", integer(1)),
    "class created with arguments": new("Config", args=integer(1) + b"\x85"),
    "class given a state": named("Config") + b"}b",
    "two states": new("Config", state=b"}b}b"),
    "state that is no dict": new("Config", state=b"]b"),
    "state of two": new("Config", state=b"}}\x86b"),
    "state with a special name": new("Config", state=dict_of(text("__class__"), named("Net")) + b"b"),
    "state with a number": new("Config", state=dict_of(integer(1), b"N") + b"b"),
    "member that is missing": call("mynet.Mode", text("faster")),
    "member of two values": call("mynet.Mode", text("fast"), text("slow")),
    "member of another type": call("mynet.Level", b"G" + b"\x3f\xf0" + bytes(6)),
    "member of an object": call("mynet.Mode", new("Config")),
    "member of a list": call("mynet.Mode", b"]"),
    "member of both flags": call("mynet.Bits", integer(3)),
    "enumeration created": new("Mode"),
    "member given a state": call("mynet.Mode", text("fast")) + b"}b",
    "attribute of a class": call("builtins.getattr", named("Config"), text("secret")),
    "method of a class": call("builtins.getattr", named("Config"), text("__init__")),
    "method of a module class": call("builtins.getattr", named("Net"), text("forward")),
    "method of an enumeration": call("builtins.getattr", named("Mode"), text("_missing_")),
    "value of an enumeration": call("builtins.getattr", named("Mode"), text("mro")),
    "attribute of a function": call("builtins.getattr", named("swish"), text("__globals__")),
    "attribute of an object": call("builtins.getattr", new("Config"), text("secret")),
    "named tuple of another length": new("Size", state=b"", args=integer(1) + b"\x85"),
    "named tuple with a state": new("Size", args=integer(1) + integer(2) + b"\x86"),
    "named tuple called": call("mynet.Size", integer(1), integer(2)),
    "namespace called with arguments": call("mynet.Args", integer(1)) + b"}b",
    "object as a key": dict_of(new("Frozen"), b"N"),
    "object in a key": dict_of(new("Frozen") + b"\x85", b"N"),
    "namespace as a key": dict_of(call("mynet.Args") + b"}b", b"N"),
    "named tuple as a key": dict_of(new("Size", state=b"", args=new("Frozen") + b"N\x86"), b"N"),
    "object in a set": call("builtins.set", b"]" + new("Frozen") + b"a"),
    "member that hashes itself as a key": dict_of(call("mynet.Hashed", integer(1)), b"N"),
    "member that hashes itself in a set": call("builtins.set", b"]" + call("mynet.Hashed", integer(1)) + b"a"),
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("imported", [True, False])
def test_hostile_files_run_nothing(mynet: ModuleType, attack: str, imported: bool) -> None:
    value("value", HOSTILE[attack])
    mynet.RAN.clear()
    if not imported:
        del sys.modules["mynet"]
    with pytest.raises((UntrustedFileError, ModelError)) as caught:
        storage.load(Path("net.pt"), **TRUST)
    said = str(caught.value)
    assert said.isprintable()
    assert "--trust-module" not in said
    assert mynet.RAN == getattr(sys.modules.get("mynet"), "RAN", []) == []


def test_a_tuple_that_is_reached_from_itself_first_is_refused(mynet: ModuleType) -> None:
    archive(b"]q\x01" + named("Size") + b"h\x01N\x86\x81a")(Path("net.pt"))
    assert "has a named tuple that holds itself" in refused(**TRUST)


def test_functions_in_the_place_of_methods_and_hooks_are_not_called(mynet: ModuleType) -> None:
    net = save(mynet, "no.pt")
    for name in ("state_dict", "_apply", "named_parameters", "parameters", "buffers", "modules", "float", "train"):
        net.__dict__[name] = mynet.swish
    for hooks in (net._state_dict_hooks, net._state_dict_pre_hooks, net._forward_hooks, net._load_state_dict_pre_hooks):
        hooks[1] = mynet.swish
    torch.save({"model": net.conv, "ema": net}, "net.pt")
    mynet.RAN.clear()
    storage.load(Path("net.pt"), **TRUST)
    storage.load("mynet:Net", weights="net.pt", **TRUST)
    assert mynet.RAN == []


@pytest.mark.parametrize(
    "name",
    [
        "torchvision.datasets.utils.extract_archive",
        "os.removedirs",
        "shutil.rmtree",
        "torch.hub.load",
        "timm.models._factory.load_model_config_from_hf",
    ],
)
def test_what_is_built_in_is_never_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    owner, _, attribute = name.rpartition(".")
    value("value", f"c{owner}\n{attribute}\n".encode())
    said = refused(trust_modules=["torch", "torchvision", "timm", "os", "shutil"])
    assert name.rpartition(".")[2] in said
    assert "--trust-module" not in said


def test_modules_of_torch_that_need_trust_say_so(tmp_path: Path) -> None:
    from torch.ao.nn.intrinsic import ConvReLU2d

    torch.save(ConvReLU2d(nn.Conv2d(3, 4, 3), nn.ReLU()), tmp_path / "net.pt")
    said = refused(tmp_path / "net.pt")
    (prefix,) = re.findall(r"--trust-module ([\w.]+)", said)
    assert isinstance(storage.load(tmp_path / "net.pt", trust_modules=[prefix]), ConvReLU2d)


def test_a_prefix_covers_its_own_names_only(mynet: ModuleType) -> None:
    value("value", named("swish"))
    for prefix in ("my", "mynets", "mynet.swish"):
        assert "mynet.swish" in refused(trust_modules=[prefix])
    assert storage.load(Path("net.pt"), **TRUST).value is mynet.swish


def test_a_package_is_read_and_not_imported_for_the_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deep" / "inside").mkdir(parents=True)
    for folder in (tmp_path / "deep", tmp_path / "deep" / "inside"):
        (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    source = "class Good:\n    pass\nclass Bad:\n    __slots__ = ('a',)\n" + "import re\n'\\d'\n"
    (tmp_path / "deep" / "inside" / "config.py").write_text(source)
    (tmp_path / "deep" / "inside" / "broken.py").write_text("class (:\n")
    for name, advice in (("config\nGood", "--trust-module deep.inside.config"), ("config\nBad", "made it: --trust")):
        value("value", f"cdeep.inside.{name}\n)\x81}}b".encode("latin-1"))
        assert advice in refused()
    for name in ("broken\nNet", "gone\nNet"):
        value("value", f"cdeep.inside.{name}\n)\x81}}b".encode("latin-1"))
        assert "--trust-module deep.inside." in refused()
    assert not {"deep", "deep.inside"} & set(sys.modules)
