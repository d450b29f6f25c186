"""Exported programs that were edited so that loading them would run something: nothing runs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import Digits, edit, export, places_in, read_records, strings_in, write_records
from torch import nn

from convsurgeon import storage
from convsurgeon.errors import ConvSurgeonError, ModelError, UntrustedFileError
from convsurgeon.storage import _program_archive, _program_grammar
from convsurgeon.storage._program_grammar import (
    ForbiddenError,
    UnsupportedError,
    check_expression,
    check_operator,
    check_tree,
    clean_program,
)

CONFIG = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLE = "data/sample_inputs/model.pt"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program of a small network with a free batch size, and so with shape expressions."""
    return export(Digits().eval(), tmp_path / "net.pt2")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file or folder that a payload would make."""
    return tmp_path / "ran"


def shell(mark: Path) -> str:
    """Return Python source that makes the file by a shell command."""
    return f"__import__('os').system('touch {mark}')"


class Payload:
    """Pickles as a call that makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


def refused(path: Path, error: type[Exception] = UntrustedFileError) -> str:
    """Return what loading `path` is refused with; it must be one line that names the file."""
    with pytest.raises(error) as caught:
        storage.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 600
    return message


def set_expressions(text: str) -> Callable[[dict[str, Any]], None]:
    """Put `text` in the place of every shape expression."""

    def change(document: dict[str, Any]) -> None:
        places = [(container, key) for container, key in strings_in(document) if key == "expr_str"]
        assert places
        for container, key in places:
            container[key] = text

    return change


def first_call(document: dict[str, Any]) -> dict[str, Any]:
    """Return the first call of an operator."""
    call: dict[str, Any] = document["graph_module"]["graph"]["nodes"][0]
    return call


class TestExpressions:
    def test_a_shell_command_runs_only_if_trusted(self, program: Path, mark: Path) -> None:
        edit(program, set_expressions(shell(mark)))
        assert "the shape expression" in refused(program)
        assert "--trust" in refused(program)
        assert not mark.exists()
        with pytest.raises(ModelError):  # the payload is real: it runs, and gives no expression
            storage.load(program, trust=True)
        assert mark.exists()

    @pytest.mark.parametrize(
        "text",
        [
            "Symbol('s0').__class__",
            "Symbol(__import__('os'))",
            "Symbol('__import__')",
            "Symbol('s0', positive=print())",
            "Symbol('s0', **{})",
            "Float('1e999999999', precision=53)",
            "Float('0.5', precision=10**9)",
            "Integer(9**9**9)",
            "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
            "Pow(Pow(Symbol('s0'), Integer(8)), Integer(8))",
            "9**9**9",
            f"Integer({10**30})",
            "lambda: 0",
            "[0 for x in s0]",
            "s0 if s0 else s0",
            "s0.diff",
            "s0[0]",
            "f'{s0}'",
            "eval('1')",
            "factorial(Integer(1000000))",
            "Lambda(Symbol('s0'), Integer(1))",
            "(s0 := 1)",
            "s0\n+1",
            "print",
            "'s0'",
            "",
            "Add()",
            "Max(" * 300 + "s0" + ")" * 300,
            "Add(" + "s0, " * 1000 + "s0)",
            "-" * 100_000 + "1",
        ],
    )
    def test_only_arithmetic_of_sizes_is_an_expression(self, text: str) -> None:
        with pytest.raises(ForbiddenError):
            check_expression(text)

    @pytest.mark.parametrize(
        "text",
        [
            "Symbol('s77', positive=True, integer=True)",
            "Add(Mul(Integer(3), Symbol('s17', positive=True, integer=True)), Integer(-1))",
            "Mul(Rational(1, 2), ToFloat(Symbol('u0', integer=True)))",
            "Max(Integer(1), TruncToInt(Mul(Float('0.5', precision=53), ToFloat(Symbol('s0', integer=True)))))",
            "Pow(Max(Integer(1), FloorDiv(Symbol('s0', positive=True, integer=True), Integer(2))), Integer(2))",
            "ModularIndexing(Symbol('s0', integer=True), Integer(1), Integer(4))",
            "StrictLessThan(Symbol('s0', integer=True), Integer(4))",
            "2 * s0 + 1",
            "s0 // 2 >= 3",
        ],
    )
    def test_what_torch_writes_is_kept(self, text: str) -> None:
        assert check_expression(text) == text


class TestNames:
    @pytest.mark.parametrize(
        ("target", "error"),
        [
            ("torch.os.system", ForbiddenError),
            ("torch.serialization.load", ForbiddenError),
            ("torch.ops.aten.__class__.mro", ForbiddenError),
            ("torch.ops.aten.from_file.default", ForbiddenError),
            ("torch.ops.load_library", ForbiddenError),
            ("torch.ops.aten.conv2d.default.__call__", ForbiddenError),
            ("torch.ops.mylib.op.default", ForbiddenError),
            ("torch.ops.aten.no_such_operator.default", UnsupportedError),
            ("torch.ops.higher_order.cond", UnsupportedError),
            ("_operator.methodcaller", ForbiddenError),
            ("math.__loader__", ForbiddenError),
            ("#mylib:op", ForbiddenError),
            ("builtins.exec", ForbiddenError),
        ],
    )
    def test_only_operators_on_tensors_and_sizes_are_called(self, target: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            check_operator(target)

    def test_a_function_of_the_standard_library_is_no_operator(self, program: Path, mark: Path) -> None:
        def change(document: dict[str, Any]) -> None:
            call = first_call(document)
            call["target"] = "torch.os.system"
            call["inputs"] = [{"name": "", "arg": {"as_string": f"touch {mark}"}, "kind": 1}]

        edit(program, change)
        assert "torch.os.system" in refused(program)
        assert not mark.exists()

    def test_a_name_is_no_source_code(self, program: Path, mark: Path) -> None:
        def change(document: dict[str, Any]) -> None:
            text = json.dumps(document).replace('"conv2d"', json.dumps(f"a = {shell(mark)}; b"))
            document.update(json.loads(text))

        edit(program, change)
        assert "the name" in refused(program)
        assert not mark.exists()

    @pytest.mark.parametrize("key", ["parameter_name", "buffer_name"])
    def test_a_path_has_no_quotes(self, program: Path, key: str) -> None:
        def change(document: dict[str, Any]) -> None:
            container, _ = next(place for place in strings_in(document) if place[1] == key)
            container[key] = 'a"), print("ran"), ("'

        edit(program, change)
        assert "the name" in refused(program)

    def test_each_string_may_be_a_payload(self, program: Path, mark: Path) -> None:
        document = json.loads(read_records(program)["models/model.json"])
        payload = shell(mark)
        passed = set()
        for index, (_, key) in enumerate(list(strings_in(document))):
            edited = copy.deepcopy(document)
            container, key = list(strings_in(edited))[index]
            container[key] = payload
            try:
                cleaned = json.dumps(clean_program(edited))
            except (ForbiddenError, UnsupportedError):
                continue
            passed.add(key)
            # where torch reads it, it is only a text
            assert payload not in cleaned or key == "nn_module_stack"
        assert passed <= {"nn_module_stack", "stack_trace", "torch_fn", "torch_version", "fqn", "type", *range(9)}
        edit(program, lambda document: _set_everywhere(document, "nn_module_stack", payload))
        with pytest.raises(ModelError):
            storage.load(program)
        assert not mark.exists()

    def test_guards_are_not_read(self, program: Path, mark: Path, tmp_path: Path) -> None:
        edit(program, lambda document: document.update(guards_code=[shell(mark)]))
        network = storage.load(program)
        network(torch.zeros(2, 3, 9, 9))
        storage.load(storage.save(network, tmp_path / "again.pt2"))
        assert not mark.exists()


def _set_everywhere(document: dict[str, Any], key: str, value: str) -> None:
    for container, name in list(strings_in(document)):
        if name == key:
            container[name] = value


class TestNesting:
    @pytest.mark.parametrize(
        "context",
        [
            {"__enum__": True, "fqn": "antigravity:x", "name": "y"},
            [{"__enum__": True, "fqn": "antigravity:x", "name": "y"}],
            [[1]],
            3,
        ],
    )
    def test_nothing_is_imported(self, context: object) -> None:
        node = {"type": "builtins.dict", "context": json.dumps(context), "children_spec": []}
        with pytest.raises(ForbiddenError):
            check_tree(json.dumps([1, node]))
        assert "antigravity" not in sys.modules

    @pytest.mark.parametrize("kind", ["collections.defaultdict", "collections.namedtuple", "mynet.Output"])
    def test_other_classes_are_named(self, kind: str, program: Path) -> None:
        node = {"type": kind, "context": json.dumps({"default_factory_module": "antigravity"}), "children_spec": []}

        def change(document: dict[str, Any]) -> None:
            document["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, node])

        edit(program, change)
        assert f"a {kind} among its inputs or outputs" in refused(program, ModelError)
        assert "antigravity" not in sys.modules

    def test_a_deep_one_is_refused(self, program: Path) -> None:
        def change(document: dict[str, Any]) -> None:
            document["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = "[1, " + "[" * 100_000

        edit(program, change)
        assert "the nesting" in refused(program)


class TestPickles:
    def test_in_the_example_inputs(self, program: Path, mark: Path, tmp_path: Path) -> None:
        torch.save(((Payload(mark),), {}), tmp_path / "sample.pt")
        write_records(program, {**read_records(program), SAMPLE: (tmp_path / "sample.pt").read_bytes()})
        assert "mkdir" in refused(program)
        assert not mark.exists()

    def test_without_an_archive_around_it(self, program: Path, mark: Path) -> None:
        write_records(program, {**read_records(program), SAMPLE: pickle.dumps(Payload(mark))})
        refused(program, ModelError)
        assert not mark.exists()

    @pytest.mark.parametrize(("folder", "record"), [("weights", CONFIG), ("constants", CONSTANTS)])
    def test_in_the_place_of_a_tensor(
        self, program: Path, mark: Path, tmp_path: Path, folder: str, record: str
    ) -> None:
        torch.save(Payload(mark), tmp_path / "payload.pt")
        prefix = {"weights": "weight_", "constants": "tensor_"}[folder]
        records = read_records(program)
        write_records(program, {**records, f"data/{folder}/{prefix}99": (tmp_path / "payload.pt").read_bytes()})
        meta = json.loads(records[CONFIG])["config"]["fc.bias"]["tensor_meta"]

        def change(document: dict[str, Any]) -> None:
            entry = {"path_name": f"{prefix}99", "is_param": False, "use_pickle": True, "tensor_meta": meta}
            document["config"]["fc.bias"] = entry

        edit(program, change, record=record)
        assert "fc.bias, which is no plain tensor" in refused(program)
        assert not mark.exists()
        with pytest.raises(ModelError):  # the payload is real
            storage.load(program, trust=True)
        assert mark.exists()

    @pytest.mark.parametrize("prefix", ["custom_obj_0", "opaque_obj_0", "../weights/weight_0"])
    def test_as_an_object_of_a_custom_class(self, program: Path, mark: Path, prefix: str) -> None:
        write_records(program, {**read_records(program), f"data/constants/{prefix}": pickle.dumps(Payload(mark))})

        def change(document: dict[str, Any]) -> None:
            entry = {"path_name": prefix, "is_param": False, "use_pickle": False, "tensor_meta": None}
            document["config"]["thing"] = entry

        edit(program, change, record=CONSTANTS)
        assert "thing, which is no plain tensor" in refused(program)
        assert not mark.exists()

    def test_of_all_weights_as_older_versions_wrote_them(self, program: Path, mark: Path, tmp_path: Path) -> None:
        network = storage.load(program)
        expected = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        records = read_records(program)
        for what in (expected, {"fc.bias": Payload(mark)}, [1]):
            torch.save(what, tmp_path / "weights.pt")
            write_records(program, {**records, "data/weights/model.pt": (tmp_path / "weights.pt").read_bytes()})
            if what is expected:
                loaded = storage.load(program).state_dict()
                assert loaded.keys() == expected.keys()
                assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
            else:
                refused(program)
        assert not mark.exists()


class TestSizes:
    def test_a_truncated_archive(self, program: Path) -> None:
        content = program.read_bytes()
        for size in (len(content) // 2, len(content) - 30, 100):
            program.write_bytes(content[:size])
            assert "damaged" in refused(program, ModelError)

    def test_every_record_is_missed(self, program: Path) -> None:
        records = read_records(program)
        needed = [name for name in records if name.startswith(("models/", "data/weights/", "data/constants"))]
        for name in needed:
            write_records(program, {key: content for key, content in records.items() if key != name})
            assert "is damaged" in refused(program, ModelError)

    def test_a_zip_bomb(self, program: Path) -> None:
        bomb = {**read_records(program), "data/weights/weight_0": bytes(50_000_000)}
        write_records(program, bomb, compress=True)
        assert program.stat().st_size < 200_000
        assert "compressed records" in refused(program)

    def test_records_that_lie_in_one_another(self, program: Path) -> None:
        with zipfile.ZipFile(program, "a") as archive:
            for index in range(200):  # the table of contents names the same bytes again and again
                again = copy.copy(archive.getinfo(archive.namelist()[0]))
                again.filename = f"net/again{index}"
                again.file_size = again.compress_size = 100_000
                archive.filelist.append(again)
            archive._didModify = True
        assert "larger than the file" in refused(program)

    def test_a_header_that_promises_more_than_there_is(self, program: Path) -> None:
        content = bytearray(program.read_bytes())
        end = content.rindex(b"PK\x05\x06")
        struct.pack_into("<I", content, end + 12, 0xFFFFFFF0)
        struct.pack_into("<Q", content, content.rindex(b"PK\x06\x06") + 40, 2**60)
        program.write_bytes(content)
        assert "damaged" in refused(program, ModelError)

    @pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "1" * 100_000, "[]", "nonsense", "\xff"])
    def test_a_table_that_is_none(self, program: Path, text: str) -> None:
        write_records(program, {**read_records(program), "models/model.json": text.encode("latin-1")})
        assert "is damaged" in refused(program, ModelError)

    @pytest.mark.parametrize("content", [b"", b"abcd"])
    def test_a_small_file_makes_no_large_tensor(self, program: Path, content: bytes) -> None:
        write_records(program, {**read_records(program), "data/weights/weight_0": content})

        def change(document: dict[str, Any]) -> None:
            meta = document["config"]["stem.weight"]["tensor_meta"]
            meta["sizes"] = [{"as_int": 10**6}, {"as_int": 10**6}]
            meta["strides"] = [{"as_int": 0}, {"as_int": 0}]

        assert json.loads(read_records(program)[CONFIG])["config"]["stem.weight"]["path_name"] == "weight_0"
        edit(program, change, record=CONFIG)
        assert "a tensor of 1000000000000 numbers" in refused(program)

    @pytest.mark.parametrize("record", ["models/model.json", CONFIG])
    def test_a_table_with_anything_anywhere(self, program: Path, record: str) -> None:
        junk = (None, -1, 2**63, 1.5, "", "x", "fc.bias", [], {}, {"as_int": 3}, "torch.ops.aten.relu.default")
        rng, records = random.Random(0), read_records(program)
        refusals: list[str] = []
        for _ in range(40):
            document = json.loads(records[record])
            container, key = rng.choice(list(places_in(document)))
            container[key] = rng.choice(junk)
            write_records(program, {**records, record: json.dumps(document).encode()})
            try:
                storage.load(program)
            except ModelError as error:
                refusals.append(str(error))
        assert 5 < len(refusals) < 40
        assert not any("\n" in refusal for refusal in refusals)

    def test_two_records_of_one_name(self, program: Path) -> None:
        with zipfile.ZipFile(program, "a") as archive:
            name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr(name, b"{}")
        assert "two records" in refused(program)


class TestOthers:
    def test_compiled_code_is_no_graph(self, program: Path) -> None:
        write_records(program, {**read_records(program), "data/aotinductor/model/net.so": b"\x7fELF"})
        assert "compiled code" in refused(program, ModelError)

    def test_a_string_in_an_unknown_place(self, program: Path) -> None:
        edit(program, lambda document: document["graph_module"].update(code="import os"))
        assert "'import os' under 'code'" in refused(program)

    def test_torch_sees_nothing_that_was_not_checked(self, program: Path, tmp_path: Path) -> None:
        extra = {**read_records(program), "extra/other.txt": b"?", "models/other.json": b"{", "data/x": b"?"}
        buffer, record = _program_archive.check_archive(write_records(program, extra))
        (tmp_path / "checked.pt2").write_bytes(buffer.getvalue())
        names = set(read_records(tmp_path / "checked.pt2"))
        assert not names & {"extra/other.txt", "models/other.json", "data/x"}
        assert record is None

    @pytest.mark.parametrize("text", ["{", "[]", '{"format": "other", "version": 1, "record": {}}'])
    def test_a_damaged_record_of_ours(self, program: Path, text: str) -> None:
        write_records(program, {**read_records(program), "extra/convsurgeon.json": text.encode()})
        assert "is damaged: its convsurgeon.json" in refused(program, ModelError)

    def test_a_record_of_a_later_version(self, program: Path) -> None:
        text = json.dumps({"format": "convsurgeon-program", "version": 2, "record": {}})
        write_records(program, {**read_records(program), "extra/convsurgeon.json": text.encode()})
        assert "has version 2 of the program format" in refused(program, ModelError)

    def test_a_damaged_convention_in_a_pickle_imports_nothing(self, tmp_path: Path) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3))
        node = {"type": "builtins.dict", "context": '[{"__enum__": 1, "fqn": "antigravity:x"}]', "children_spec": []}
        net.__dict__["convsurgeon_record"] = {"program": {"tree": json.dumps([1, node]), "leaves": [], "ranges": {}}}
        with pytest.raises(ConvSurgeonError, match="damaged"):
            storage.save(net, tmp_path / "net.pt2")
        assert "antigravity" not in sys.modules
        assert not list(tmp_path.iterdir())

    def test_the_grammar_lets_everything_else_through(self, program: Path) -> None:
        document = json.loads(read_records(program)["models/model.json"])
        cleaned = clean_program(document)
        assert cleaned["graph_module"]["signature"] == document["graph_module"]["signature"]
        assert cleaned["range_constraints"] == document["range_constraints"]
        assert len(_program_grammar._STRINGS) > 5
