"""Discovery in a folder and through entry points, and options from mappings and from the command line."""

import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar, Literal

import pytest

from convsurgeon import ops, registry
from convsurgeon.errors import ConvSurgeonError, OptionError, UnknownNameError
from convsurgeon.options import parse_options, parse_pairs
from convsurgeon.registry import Registry

VARIANT = """
from {package} import animals

@animals.register
class {cls}:
    name = {name!r}
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A package of two variants and a private file; gives a function that adds a file, and the registry."""
    folder = tmp_path / "zoo_of_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from convsurgeon.registry import Registry\n"
        "animals = Registry('animal', 'zoo_of_tests', entry_points='zoo.animals')\n"
    )

    def add(file, *, name=None, code=None):
        text = code or VARIANT.format(package="zoo_of_tests", cls=file.title(), name=name or file)
        (folder / f"{file}.py").write_text(text)
        importlib.invalidate_caches()
        return folder / f"{file}.py"

    add("tapir")
    add("okapi")
    add("_private", code="raise AssertionError('a private file was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    yield add, importlib.import_module("zoo_of_tests").animals
    for module in [module for module in sys.modules if module.split(".")[0] == "zoo_of_tests"]:
        del sys.modules[module]


@pytest.fixture
def foreign(monkeypatch):
    """A list of entry points that the registry sees, in place of the installed ones."""
    found = []

    def entry_points(*, group):
        return [point for point in found if point.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return found


class Quagga:
    name = "quagga"


class OtherTapir:
    name = "tapir"


class Nameless:
    pass


def here(attribute, *, group="zoo.animals"):
    return EntryPoint(attribute.lower(), f"{__name__}:{attribute}", group)


def test_every_public_file_is_found(zoo):
    _, animals = zoo
    assert animals.names() == ["okapi", "tapir"]
    assert animals.get("tapir").__module__ == "zoo_of_tests.tapir"


def test_nothing_is_imported_before_it_is_asked_for(zoo):
    _, animals = zoo
    assert "zoo_of_tests.tapir" not in sys.modules
    animals.names()
    assert "zoo_of_tests.tapir" in sys.modules


def test_a_new_file_is_a_new_variant(zoo):
    add, animals = zoo
    add("gnu")
    assert animals.names() == ["gnu", "okapi", "tapir"]


def test_an_unknown_name_says_what_there_is(zoo):
    _, animals = zoo
    with pytest.raises(UnknownNameError) as caught:
        animals.get("tapri")
    assert str(caught.value) == "unknown animal 'tapri'. Did you mean 'tapir'? Available: okapi, tapir."


def test_a_file_may_ask_for_names_while_it_is_imported(zoo):
    add, animals = zoo
    add("aardvark", code="from zoo_of_tests import animals\nseen = animals.names()\n")
    assert animals.names() == ["okapi", "tapir"]
    assert sys.modules["zoo_of_tests.aardvark"].seen == []


def test_a_file_that_fails_fails_every_time(zoo):
    add, animals = zoo
    broken = add("panda", code="raise ZeroDivisionError('bamboo')")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="bamboo"):
            animals.names()
    broken.unlink()
    importlib.invalidate_caches()
    assert animals.names() == ["okapi", "tapir"]


def test_two_of_a_name_are_refused(zoo):
    add, animals = zoo
    add("yak", name="tapir")
    with pytest.raises(
        ValueError, match=r"two animals are named 'tapir': in zoo_of_tests\.tapir and in zoo_of_tests\.yak"
    ):
        animals.names()


def test_registering_twice_is_once_and_a_class_without_a_name_is_refused(zoo):
    _, animals = zoo
    assert animals.register(animals.get("tapir")) is animals.get("tapir")
    assert animals.names() == ["okapi", "tapir"]
    with pytest.raises(ValueError, match="animal Nameless has no name"):
        animals.register(Nameless)


def test_an_entry_point_adds_a_variant(zoo, foreign):
    _, animals = zoo
    foreign += [here("Quagga"), here("Nameless", group="another.group")]
    assert animals.names() == ["okapi", "quagga", "tapir"]
    assert animals.get("quagga") is Quagga


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("Missing", "AttributeError: module '.*' has no attribute 'Missing'"),
        ("Nameless", "ValueError: animal Nameless has no name"),
        ("OtherTapir", "ValueError: two animals are named 'tapir': in zoo_of_tests.tapir and in "),
    ],
)
def test_a_broken_entry_point_is_one_line_that_names_it_every_time(zoo, foreign, attribute, reason):
    _, animals = zoo
    foreign.append(here(attribute))
    name, value = attribute.lower(), f"{__name__}:{attribute}"
    for _ in range(2):
        with pytest.raises(
            ConvSurgeonError,
            match=rf"^the animal '{name}' of another package \({value}\) cannot be loaded: {reason}"
            ".*; repair or uninstall that package$",
        ):
            animals.names()


def test_without_a_group_no_entry_point_is_read(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("was asked for entry points"))
    plain = Registry("op", "convsurgeon.ops")
    assert plain.names() == []  # the files of that folder register elsewhere


def test_the_ops_read_their_entry_point_group():
    assert ops._registry.ENTRY_POINT_GROUP == "convsurgeon.ops"


@dataclass(frozen=True)
class Options:
    unit: ClassVar[str] = "channels"
    groups: int = 8
    rate: float = 0.5
    kind: Literal["energy", "fixed"] = "energy"
    order: Literal[1, 2, 4] = 1
    bias: bool = True
    label: str = "x"
    mutual: float | None = None


def parse(values):
    return parse_options(Options, values, owner="shift")


def test_none_and_an_empty_mapping_are_the_defaults():
    assert parse(None) == parse({}) == Options()


def test_an_instance_comes_back_as_it_is():
    given = Options(groups=3)
    assert parse(given) is given


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("groups", 4, 4),
        ("groups", "4", 4),
        ("groups", "-4", -4),
        ("rate", 0.25, 0.25),
        ("rate", 1, 1.0),
        ("rate", "1", 1.0),
        ("rate", "1e-3", 1e-3),
        ("kind", "fixed", "fixed"),
        ("order", 2, 2),
        ("order", "4", 4),
        ("bias", False, False),
        ("bias", "false", False),
        ("bias", "True", True),
        ("label", "8", "8"),
        ("label", "", ""),
        ("mutual", None, None),
        ("mutual", "none", None),
        ("mutual", "0.05", 0.05),
        ("mutual", 1, 1.0),
    ],
)
def test_a_value_becomes_what_the_field_says(name, given, expected):
    value = getattr(parse({name: given}), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("groups", "many", "of type int, got 'many'"),
        ("groups", "4.0", "of type int, got '4.0'"),
        ("groups", 4.0, "of type int, got 4.0"),
        ("groups", True, "of type int, got True"),
        ("groups", None, "of type int, got None"),
        ("groups", "none", "of type int, got 'none'"),
        ("groups", "", "of type int, got ''"),
        ("rate", "fast", "of type float, got 'fast'"),
        ("rate", True, "of type float, got True"),
        ("kind", "random", "one of energy, fixed, got 'random'"),
        ("kind", ["fixed"], r"one of energy, fixed, got \['fixed'\]"),
        ("order", "3", "one of 1, 2, 4, got '3'"),
        ("order", True, "one of 1, 2, 4, got True"),
        ("bias", "no", "of type bool, got 'no'"),
        ("bias", 1, "of type bool, got 1"),
        ("label", 8, "of type str, got 8"),
        ("mutual", "much", "of type float or none, got 'much'"),
    ],
)
def test_a_value_of_the_wrong_type_says_what_is_right(name, given, says):
    with pytest.raises(OptionError, match=rf"^shift: option {name} must be {says}$"):
        parse({name: given})


def test_an_unknown_option_says_what_there_is():
    with pytest.raises(OptionError) as caught:
        parse({"group": 8})
    assert str(caught.value) == (
        "shift has no option 'group'. Did you mean 'groups'? Options: groups, rate, kind, order, bias, label, mutual."
    )
    with pytest.raises(OptionError, match=r"^shift has no option 'unit'\. Options: groups"):
        parse({"unit": "taps"})


def test_an_option_where_there_are_none():
    @dataclass(frozen=True)
    class Nothing:
        pass

    with pytest.raises(OptionError, match=r"^bsconv has no option 'groups'\. Options: none\.$"):
        parse_options(Nothing, {"groups": 8}, owner="bsconv")


@pytest.mark.parametrize("given", [8, "groups=8", ["groups=8"], object])
def test_what_is_no_mapping_is_refused(given):
    with pytest.raises(OptionError, match=r"^shift: options must be a mapping or Options, got "):
        parse(given)


def test_the_mapping_is_left_alone():
    given = {"groups": "4"}
    parse(given)
    assert given == {"groups": "4"}


def test_pairs_of_a_flag():
    assert parse_pairs(["groups=8", "kind = fixed", "label=a=b", "groups=4", "label="], flag="--option") == {
        "groups": "4",
        "kind": "fixed",
        "label": "",
    }
    assert parse_pairs(["label=a=b"], flag="--option") == {"label": "a=b"}
    assert parse_pairs([], flag="--option") == {}


@pytest.mark.parametrize("item", ["groups", "=8", "", "groups 8", " =8"])
def test_a_pair_that_is_none(item):
    with pytest.raises(OptionError, match=f"^--option '{item}' must be of the form NAME=VALUE$"):
        parse_pairs([item], flag="--option")
