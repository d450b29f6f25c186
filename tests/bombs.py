"""Files of a few kB that ask for gigabytes or hours. `python tests/bombs.py FOLDER` loads each in a tight space."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from convsurgeon import storage
from convsurgeon.errors import ConvSurgeonError

LIMIT_MB = 100
Writer = Callable[[Path], None]


def integer(value: int) -> bytes:
    """The opcode that pushes an int of any size."""
    content = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(content)]) + content


def text(value: str) -> bytes:
    """The opcode that pushes a string."""
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def tuple_of(*items: bytes) -> bytes:
    """Opcodes that push a tuple."""
    return b"(" + b"".join(items) + b"t"


def call(name: str, *args: bytes) -> bytes:
    """Opcodes that push the result of calling a global."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + tuple_of(*args) + b"R"


def tensor(count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Opcodes that push a float tensor, on a storage of so many numbers."""
    storage_id = tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), integer(count))
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage_id + b"Q",
        integer(offset),
        tuple_of(*map(integer, size)),
        tuple_of(*map(integer, stride)),
        b"\x89",
        call("collections.OrderedDict"),
    )


def dict_of(key: bytes, value: bytes) -> bytes:
    """Opcodes that push a dict of one entry."""
    return b"}" + key + value + b"s"


def doubled(levels: int, inner: bytes = b"N") -> bytes:
    """Opcodes that push a tuple of two times a tuple of two times ..."""
    return inner + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


def module(cls: str, state: bytes) -> bytes:
    """Opcodes that push a module with that state."""
    owner, _, attribute = cls.rpartition(".")
    return f"c{owner}\n{attribute}\n)\x81".encode("latin-1") + state + b"b"


def archive(content: bytes, *, compression: int = zipfile.ZIP_STORED, count: int = 4) -> Writer:
    """What `torch.save` would write around a pickle, with one record of a few numbers."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("net/data.pkl", b"\x80\x02" + content + b".")
            file.writestr("net/byteorder", b"little")
            file.writestr("net/data/0", bytes(4 * count))
            file.writestr("net/version", b"3\n")

    return write


def legacy(count: int) -> Writer:
    """The format from before 1.6, with a storage of so many numbers and nothing behind it."""

    def write(path: Path) -> None:
        torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"K\x04N", integer(count) + b"N"))

    return write


def student(name: str, **args: object) -> Writer:
    """A student without a tensor to speak of, of an architecture with these arguments."""

    def write(path: Path) -> None:
        record = json.dumps({"source": {"name": name, "args": args}})
        metadata = {"format": "convsurgeon-student", "version": "1", "record": record}
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata=metadata)

    return write


def content(data: bytes) -> Writer:
    """A file of these bytes."""
    return lambda path: path.write_bytes(data) and None


def absurd_directory(path: Path) -> None:
    """A zip whose end promises a table of contents of four gigabytes."""
    archive(b"}")(path)
    data = path.read_bytes()
    path.write_bytes(data[:-22] + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 2, 0, 0))


def overlapping(path: Path) -> None:
    """An archive whose table of contents names one large record ten times."""
    archive(b"}", count=1000)(path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        start = file.start_dir
    directory = data[start:-22]
    found = directory.index(b"net/data/0") - 46
    one = directory[found : found + 46 + len(b"net/data/0")]
    more = b"".join(one.replace(b"net/data/0", b"net/data/%d" % n) for n in range(1, 10))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 13, 13, len(directory + more), start, 0)
    path.write_bytes(data[:start] + directory + more + end)


ENDLESS = b"}" + b"".join(
    text(key) + value + b"s"
    for key, value in {
        "_all_weights": b"]]Naa",
        "num_layers": integer(10**9),
        "bidirectional": b"\x89",
        "bias": b"\x88",
        "proj_size": integer(0),
    }.items()
)
PARTS = b"}" + b"".join(text(part) + b"}s" for part in ("_parameters", "_buffers", "_modules"))

BOMBS: dict[str, Writer] = {
    "bytearray.pt": archive(call("builtins.bytearray", integer(2**31 - 1))),
    "encode.pt": archive(call("_codecs.encode", text("a"), text("idna"))),
    "called tensor.pt": archive(call("torch.Tensor", integer(20_000), integer(20_000))),
    "created tensor.pt": archive(b"ctorch\nFloatTensor\n" + tuple_of(integer(2**30)) + b"\x81"),
    "built tensor.pt": archive(call("torch.Tensor") + tuple_of(b"N", integer(0), b")", b")") + b"b"),
    "called storage.pt": archive(call("torch.storage.UntypedStorage", integer(2**32))),
    "called module.pt": archive(call("torch.nn.modules.linear.Linear", integer(20_000), integer(20_000))),
    "quantized.pt": archive(call("torch._utils._rebuild_qtensor", integer(1))),
    "sparse.pt": archive(call("torch._utils._rebuild_sparse_tensor", integer(1), b")")),
    "expanded.pt": archive(dict_of(text("a"), tensor(4, (10**6, 10**6), (0, 0)))),
    "many views.pt": archive(b"](" + tensor(4, (2**20, 4), (0, 1)) * 30 + b"e"),
    "too large.pt": archive(dict_of(text("a"), tensor(4, (10**9,), (1,)))),
    "too far.pt": archive(dict_of(text("a"), tensor(4, (2,), (2**61,)))),
    "overflow.pt": archive(dict_of(text("a"), tensor(4, (2**33, 2**33), (1, 1)))),
    "negative.pt": archive(dict_of(text("a"), tensor(4, (4,), (-1,), offset=3))),
    "record too small.pt": archive(dict_of(text("a"), tensor(2**30, (2**30,), (1,)))),
    "long text.pt": archive(b"X" + struct.pack("<I", 2**32 - 1) + b"a"),
    "far memo.pt": archive(b"Nr" + struct.pack("<I", 2**32 - 1) + b"j" + struct.pack("<I", 2**32 - 2)),
    "key.pt": archive(dict_of(doubled(60), b"N")),
    "nested key.pt": archive(dict_of(b"N" + b"\x85" * 5_000, b"N")),
    "set.pt": archive(call("builtins.set", b"]" + doubled(60) + b"a")),
    "called tuple.pt": archive(doubled(60) + b")R"),
    "created from a tuple.pt": archive(doubled(60) + b")\x81"),
    "recurrent.pt": archive(module("torch.nn.modules.rnn.LSTM", ENDLESS)),
    "record.pt": archive(
        module(
            "torch.nn.modules.linear.Identity",
            PARTS + text("convsurgeon_record") + dict_of(text("a"), doubled(60)) + b"s",
        )
    ),
    "cycle.pt": archive(
        b"ctorch.nn.modules.linear\nIdentity\n)\x81q\x01"
        + PARTS
        + text("_modules")
        + dict_of(text("a"), b"h\x01")
        + b"sb"
    ),
    "compressed.pt": archive(text("a" * 5_000_000), compression=zipfile.ZIP_DEFLATED),
    "absurd directory.pt": absurd_directory,
    "overlapping.pt": overlapping,
    "old.pt": legacy(10**9),
    "old negative.pt": legacy(-1),
    "header.safetensors": content(struct.pack("<Q", 2**63) + b'{"a":1}'),
    "long header.safetensors": content(struct.pack("<Q", 10**8) + b'{"a":1}'),
    "shape.safetensors": content(
        struct.pack("<Q", 80) + b'{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}}'.ljust(80)
    ),
    "nested header.safetensors": content(struct.pack("<Q", 9000) + b'{"a":' + b"[" * 8995),
    "large network.safetensors": student("torchvision:regnet_y_128gf"),
    "many classes.safetensors": student("torchvision:resnet18", num_classes=10**6),
    "more classes.safetensors": student("torchvision:resnet18", num_classes=10**12),
    "deep.safetensors": student("timm:resnet18", layers=[10**6] * 4, channels=[1, 1, 1, 1]),
    "infinite.safetensors": student("torchvision:densenet121", drop_rate=1e300 * 1e10),
    "long list.safetensors": student("torchvision:resnet18", layers=[1] * 1500),
}


def peak() -> float:
    """Megabytes of memory that this process ever had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main(folder: Path) -> None:
    """Load all files, and print as JSON for each what it was refused with, seconds, and megabytes over the start."""
    torch.set_num_threads(1)
    import timm

    for name in ("torchvision:resnet18", "timm:resnet18"):
        storage.load(name, model_args={"num_classes": 2})
    assert timm.is_model("resnet18")
    # what ordinary use has taken is not counted: memory that it gave back is used again
    held = torch.zeros(int(max(0.0, peak() - now()) * 1e6 / 4) + 1)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * LIMIT_MB * 10**6,) * 2)
    for file in sorted(folder.iterdir()):
        start, before = time.monotonic(), peak()
        try:
            storage.load(file)
            said = "loaded"
        except ConvSurgeonError as error:
            said = str(error)
        print(json.dumps({"file": file.name, "said": said, "s": time.monotonic() - start, "MB": peak() - before}))
    del held


def now() -> float:
    """Megabytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main(Path(sys.argv[1]))
