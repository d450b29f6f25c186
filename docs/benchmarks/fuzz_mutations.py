"""Ways to change a valid file: anywhere, or where its meaning is, with lengths and checksums put right."""

from __future__ import annotations

import collections
import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

PROGRAM = "models/model.json"
ODD_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**63, -(2**63), 10**30, 0.5, 1e300)
ODD_VALUES = (*ODD_NUMBERS, None, True, False, "", "a", "\n", "\ud800", "0", [], [[]], {}, {"a": 1}, [0] * 50)


def flip(data: bytes, chance: random.Random) -> bytes:
    """Change some bytes, splice, repeat or cut: without regard to what they mean."""
    mutated = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if not mutated:
            break
        at, other = chance.randrange(len(mutated)), chance.randrange(len(mutated))
        length = chance.randrange(1, 64)
        match chance.randrange(6):
            case 0:
                mutated[at] ^= 1 << chance.randrange(8)
            case 1:
                mutated[at] = chance.randrange(256)
            case 2:
                mutated[at : at + length] = mutated[other : other + length]
            case 3:
                mutated[at:at] = mutated[other : other + length]
            case 4:
                del mutated[at : at + length]
            case _:
                del mutated[at:]
    return bytes(mutated)


def mutate_pickle(data: bytes, chance: random.Random) -> bytes:
    """Change opcodes and their arguments: numbers, texts, the order; the pickle stays one for the most part."""
    steps = [(op, arg, position) for op, arg, position in pickletools.genops(data)]
    ends = [position for _, _, position in steps[1:]] + [len(data)]
    pieces = [data[position:end] for (_, _, position), end in zip(steps, ends, strict=True)]
    for _ in range(chance.choice((1, 1, 2, 3))):
        at, other = chance.randrange(len(pieces)), chance.randrange(len(pieces))
        match chance.randrange(6):
            case 0:
                del pieces[at]
            case 1:
                pieces[at] = pieces[other]
            case 2:
                pieces.insert(at, pieces[other])
            case 3:
                pieces[at] = chance.choice(pickletools.opcodes).code.encode("latin-1")
            case 4:
                pieces[at] = _pushing(chance.choice(ODD_VALUES))
            case _:
                numbers = [i for i, (op, _, _) in enumerate(steps) if op.name.startswith(("BININT", "BINUNICODE"))]
                pieces[min(chance.choice(numbers), len(pieces) - 1)] = _pushing(chance.choice(ODD_VALUES))
    return b"".join(pieces)


def _pushing(value: Any) -> bytes:
    """Return opcodes that torch's unpickler knows and that push a plain value."""
    if isinstance(value, bool) or value is None:
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        content = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return b"\x8a" + bytes([len(content)]) + content
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        content = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(content)) + content
    return b"]" if isinstance(value, list) else b"}"


def rezip(data: bytes, change: Callable[[bytes], bytes], record: str = "data.pkl") -> bytes:
    """Change one record of an archive, its pickle, and put the archive together again, checksums and all."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            changed.writestr(name, change(content) if name.endswith(record) else content)
    return buffer.getvalue()


def mutate_program(data: bytes, chance: random.Random) -> bytes:
    """Change the JSON of an exported program: its graph for the most part, what its weights are, or its record."""
    record = chance.choice((*[PROGRAM] * 6, "weights_config.json", "constants_config.json", "convsurgeon.json"))
    return rezip(data, lambda content: json.dumps(mutate_json(json.loads(content), chance)).encode(), record)


def mutate_json(value: Any, chance: random.Random) -> Any:
    """Change one value somewhere in JSON data, or a key."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.08:
        return chance.choice(ODD_VALUES)
    if isinstance(value, list):
        at = chance.randrange(len(value))
        match chance.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value[:at], value[at], *value[at:]]
            case _:
                return [*value[:at], mutate_json(value[at], chance), *value[at + 1 :]]
    key = chance.choice(list(value))
    match chance.randrange(10):
        case 0:
            return {name: item for name, item in value.items() if name != key}
        case 1:
            return {(f"{name}x" if name == key else name): item for name, item in value.items()}
        case 2:
            other = chance.choice(list(value))
            return {**value, key: value[other]}
        case _:
            return {**value, key: mutate_json(value[key], chance)}


def mutate_header(data: bytes, chance: random.Random) -> bytes:
    """Change the JSON in front of a safetensors file, or the JSON texts in its metadata, and fit the length."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    if chance.random() < 0.2:
        header = mutate_json(header, chance)
    else:
        key = chance.choice(("record", "record", "layout", "layout", "frozen", "version", "format"))
        inner = metadata[key] if key in ("version", "format") else json.loads(metadata[key])
        metadata[key] = json.dumps(mutate_json(inner, chance))
    try:
        text = json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate(kind: str, data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Return how a file was changed, `bytes` or `structure`, and the changed file."""
    if chance.random() < 0.5:
        if kind != "old state dict" and kind != "plan" and chance.random() < 0.5:
            return "bytes", _flipped_early(kind, data, chance)
        return "bytes", flip(data, chance)
    if kind in ("module", "state dict"):
        return "structure", rezip(data, lambda content: mutate_pickle(content, chance))
    if kind == "old state dict":
        heads = legacy_parts(data)
        return "structure", heads[0] + mutate_pickle(heads[1], chance) + heads[2]
    if kind == "student":
        return "structure", mutate_header(data, chance)
    if kind == "program":
        return "structure", mutate_program(data, chance)
    return "structure", json.dumps(mutate_json(json.loads(data), chance)).encode()


def _flipped_early(kind: str, data: bytes, chance: random.Random) -> bytes:
    """Change bytes where the meaning is: most of a file are weights."""
    if kind == "student":
        length = int.from_bytes(data[:8], "little") + 8
        return flip(data[:length], chance) + data[length:]
    return rezip(data, lambda content: flip(content, chance), PROGRAM if kind == "program" else "data.pkl")


def legacy_parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return what stands before, in and behind the fourth pickle of an old file."""
    stream = io.BytesIO(data)
    for _ in range(3):
        collections.deque(pickletools.genops(stream), maxlen=0)
    start = stream.tell()
    collections.deque(pickletools.genops(stream), maxlen=0)
    return data[:start], data[start : stream.tell()], data[stream.tell() :]


def core_of(kind: str, data: bytes) -> bytes:
    """Return the part of a file that is worth mutating."""
    if kind in ("module", "state dict", "program"):
        record = PROGRAM if kind == "program" else "data.pkl"
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return next(archive.read(name) for name in archive.namelist() if name.endswith(record))
    if kind == "old state dict":
        return legacy_parts(data)[1]
    if kind == "student":
        return data[8 : 8 + int.from_bytes(data[:8], "little")]
    return data


def around(kind: str, core: bytes, data: bytes) -> bytes:
    """Return a file with another such part, lengths and checksums put right."""
    if kind in ("module", "state dict", "program"):
        return rezip(data, lambda _: core, PROGRAM if kind == "program" else "data.pkl")
    if kind == "old state dict":
        parts = legacy_parts(data)
        return parts[0] + core + parts[2]
    if kind == "student":
        return struct.pack("<Q", len(core)) + core + data[8 + int.from_bytes(data[:8], "little") :]
    return core
