"""Files appear whole or not at all; a model's record is plain data that travels with it."""

import copy
import errno
import os
import pickle
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
from torch import nn

from convsurgeon.errors import OutputError
from convsurgeon.files import append_line, make_folder, refuse_to_overwrite, write_atomically, write_text
from convsurgeon.record import read_record, update_record


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_returned(tmp_path):
    path = tmp_path / "net.pt"
    assert write_atomically(path, lambda temporary: temporary.write_bytes(b"whole")) == path
    assert path.read_bytes() == b"whole"
    assert names(tmp_path) == ["net.pt"]


def test_a_name_may_be_a_string_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("note.txt", "ä")
    assert (tmp_path / "note.txt").read_bytes() == "ä".encode()


def test_it_is_written_beside_its_place_under_another_name_with_its_suffix(tmp_path):
    seen = []

    def write(temporary):
        seen.append(temporary)
        assert not (tmp_path / "net.onnx").exists()
        temporary.write_bytes(b"x")

    write_atomically(tmp_path / "net.onnx", write)
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".onnx"
    assert seen[0].name.startswith(".")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "net.pt"
    path.write_bytes(b"old")

    def write(temporary):
        temporary.write_bytes(b"half")
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["net.pt"]


def test_a_failure_is_told_even_if_the_writer_removed_its_file(tmp_path):
    def write(temporary):
        temporary.unlink()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_atomically(tmp_path / "net.pt", write)
    assert names(tmp_path) == []


def test_a_full_disk_is_an_output_error_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")

    def write(temporary):
        temporary.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"cannot write .*a\.json: No space left on device"):
        write_atomically(path, write)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.json", "before")]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(b"old")
    code = f"""
        import os, signal
        from convsurgeon.files import write_atomically
        def write(temporary):
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomically({str(path)!r}, write)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_has_the_mode_that_open_would_give_it(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "note.txt", "x")
        assert os.umask(umask) == umask  # it was put back
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "note.txt").stat().st_mode) == 0o666 & ~umask


def test_everything_is_synced_before_it_is_named(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append("sync"))
    replace = os.replace

    def rename(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "replace", rename)
    write_text(tmp_path / "note.txt", "x")
    assert steps == ["sync", "rename", "sync"]  # the file, then its name in the folder


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(OutputError) as caught:
        write_text(tmp_path, "x")
    assert str(caught.value) == f"{tmp_path} is a folder; give the name of a file to write"


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "missing" / "net.pt"
    with pytest.raises(OutputError) as caught:
        write_text(path, "x")
    assert str(caught.value) == f"cannot write {path}: No such file or directory (folder {path.parent})"


def test_nothing_is_overwritten_without_force(tmp_path):
    path = tmp_path / "net.pt"
    assert refuse_to_overwrite(path) == refuse_to_overwrite(str(path)) == path
    path.write_bytes(b"old")
    with pytest.raises(OutputError) as caught:
        refuse_to_overwrite(path)
    assert str(caught.value) == f"{path} exists already; choose another name or say --force"
    assert refuse_to_overwrite(path, force=True) == path
    assert path.read_bytes() == b"old"


def test_folders_are_made_with_their_parents(tmp_path):
    path = tmp_path / "a" / "b"
    assert make_folder(path) == make_folder(str(path)) == path
    assert path.is_dir()


@pytest.mark.parametrize("below", ["file", "file/folder"])
def test_a_folder_cannot_be_made_where_a_file_is(tmp_path, below):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=f"^cannot make the folder {tmp_path / below}: "):
        make_folder(tmp_path / below)


def test_lines_are_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"step": 1}')
    append_line(path, "ä")
    assert path.read_text(encoding="utf-8") == '{"step": 1}\nä\n'


def test_a_model_without_a_record_has_an_empty_one():
    assert read_record(nn.Identity()) == {}


def test_entries_are_added_replaced_and_removed():
    model = nn.Identity()
    update_record(model, source={"name": "torchvision:resnet18"}, classes=["a"])
    update_record(model, classes=["b", "c"], input_shape=[1, 3, 8, 8])
    assert read_record(model) == {
        "source": {"name": "torchvision:resnet18"},
        "classes": ["b", "c"],
        "input_shape": [1, 3, 8, 8],
    }
    update_record(model, source=None, missing=None)
    assert read_record(model) == {"classes": ["b", "c"], "input_shape": [1, 3, 8, 8]}


def test_what_is_read_is_a_copy():
    model = nn.Identity()
    update_record(model, classes=["a"])
    read_record(model)["classes"] = []
    assert read_record(model) == {"classes": ["a"]}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_record_travels_with_its_model_and_is_the_copys_own(duplicate):
    model = nn.Conv2d(2, 2, 3)
    update_record(model, classes=["a", "b"])
    copied = duplicate(model)
    assert read_record(copied) == {"classes": ["a", "b"]}
    update_record(copied, classes=["c"])
    assert read_record(model) == {"classes": ["a", "b"]}


def test_a_record_is_no_state_and_no_module():
    model = nn.Conv2d(2, 2, 3)
    update_record(model, classes=["a"])
    assert set(model.state_dict()) == {"weight", "bias"}
    assert list(model.named_children()) == []
