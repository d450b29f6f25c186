"""The public face: names, signatures, and what an import costs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import convsurgeon as cs

ROOT = Path(__file__).parent.parent

PROMISED = {
    "survey": (["model"], ["example_inputs"]),
    "plan": (
        ["model", "to"],
        ["keep", "only", "mapping", "options", "filter_fn", "example_inputs"],
    ),
    "rewrite": (
        ["model", "to"],
        ["keep", "only", "mapping", "options", "filter_fn", "example_inputs"],
    ),
    "distill": (
        ["teacher", "student", "train", "val"],
        ["method", "objective", "epochs", "run_dir"],
    ),
    "export": (["student", "path"], ["example_inputs"]),
    "evaluate": (["model", "data"], ["teacher"]),
    "load": (["source"], ["weights", "trust"]),
    "save": (["student", "path"], ["force"]),
}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("name", [name for name in cs.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_explains_itself(name: str) -> None:
    found = getattr(cs, name)
    assert found.__doc__
    assert name in dir(cs)


def test_there_is_no_other_name() -> None:
    with pytest.raises(AttributeError, match="module 'convsurgeon' has no attribute 'ditsill'"):
        cs.ditsill  # noqa: B018
    assert set(PROMISED) <= set(cs.__all__)
    assert len(set(cs.__all__)) == len(cs.__all__)


@pytest.mark.parametrize("name", list(PROMISED))
def test_promised_signatures(name: str) -> None:
    positional, named = PROMISED[name]
    parameters = inspect.signature(getattr(cs, name)).parameters
    before = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    after = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert before == positional
    assert set(named) <= set(after)


def test_promised_defaults() -> None:
    assert inspect.signature(cs.plan).parameters["to"].default == "depthwise"
    assert inspect.signature(cs.rewrite).parameters["to"].default == "depthwise"
    assert inspect.signature(cs.distill).parameters["method"].default == "joint"
    assert inspect.signature(cs.distill).parameters["objective"].default == "kd"


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import sys, convsurgeon; convsurgeon.errors.ConvSurgeonError; dir(convsurgeon); print('torch' in sys.modules)"
    )
    assert python(code).strip() == "False"


def test_a_name_that_is_used_imports_what_it_needs_and_no_training() -> None:
    code = "import sys, convsurgeon as cs; cs.rewrite; print('torch' in sys.modules, 'accelerate' in sys.modules)"
    assert python(code).strip() == "True False"


def test_a_verb_is_not_shadowed_by_a_module_of_its_name() -> None:
    rooms = {module.name for module in pkgutil.iter_modules(cs.__path__)}
    verbs = {name for name in cs.__all__ if name in PROMISED}
    assert not rooms & verbs
    for room in rooms - {"cli", "demo"}:
        importlib.import_module(f"convsurgeon.{room}")
    assert all(callable(getattr(cs, name)) for name in verbs)


def test_every_error_is_in_the_tree_that_is_drawn() -> None:
    drawn = set(re.findall(r"\b(\w+Error)\b", cs.errors.__doc__ or ""))
    raised = {
        name for name, value in vars(cs.errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert drawn == raised
    assert all(issubclass(getattr(cs.errors, name), cs.errors.ConvSurgeonError) for name in raised)


def test_one_version_number() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("version", cs.__version__) == cs.__version__
    places = [
        path for path in (ROOT / "convsurgeon").rglob("*.py") if re.search(r"^__version__ =", path.read_text(), re.M)
    ]
    assert [path.name for path in places] == ["__init__.py"]


def test_ops_are_found_by_the_name_of_their_class() -> None:
    assert cs.ops.ShiftConv2d is cs.ops.get("shift")
    with pytest.raises(AttributeError, match="NoConv2d"):
        cs.ops.NoConv2d  # noqa: B018


def test_classes_are_named_after_their_op() -> None:
    for name in cs.ops.names():
        cls = cs.ops.get(name)
        plain = name.replace("_", "")
        assert cls.__name__.lower() == f"{plain}{'' if 'conv' in plain else 'conv'}2d"
        assert cls.__module__.rpartition(".")[2] == name
