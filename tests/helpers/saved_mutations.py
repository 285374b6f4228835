"""Saved results, damaged in numbered ways: for the tests of what is read from files."""

import json
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from helpers.memory_limit import memory

HOSTILE = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 10**400, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "pixels", "\ud800", "a" * 1000, "../../etc", [], {}, [[]], [None],
    [1, 2], [-3, 2], [0, 10**9], {"x": 1}, {"": {}},
]  # fmt: skip
SHAPES = [
    [], [0], [-1], [1], [2**40], [2**62, 2**62], [0, 2**62], [2**63, 0], [2**64], [0, 0, 10**7],
    [1] * 70, [True], ["3"], None, 3, {},
]  # fmt: skip
TYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U64", "BOOL", "C64", "F4",
         "F8_E8M0", "F6_E2M3", "X", "", None, 3]  # fmt: skip


def parts(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header and its data."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    """A file of such parts."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_metadata(data: bytes, entry: str, text: str) -> bytes:
    """The file with other metadata."""
    header, tensors = parts(data)
    return joined({**header, "__metadata__": {entry: text}}, tensors)


def nodes(value: object) -> Iterator[tuple[object, object]]:
    """Each place of a JSON value: what holds it, and its name or number there."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from nodes(value[key])


def mutation(data: bytes, entry: str, seed: int) -> tuple[str, bytes]:
    """A kind of damage, and the file with it.

    Args:
        data: of a file that can be read.
        entry: of its metadata.
        seed: which damage.
    """
    draw = random.Random(seed)
    kinds = (flipped, cut, content, content, content, content, tensors, tensors, tensors)
    kind = kinds[seed % len(kinds)]
    return kind.__name__, kind(data, entry, draw)


def flipped(data: bytes, entry: str, draw: random.Random) -> bytes:
    """Some bits, mostly of the header."""
    changed = bytearray(data)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(draw.choice([1, 1, 2, 5, 50])):
        place = draw.randrange(header if draw.random() < 0.8 else len(data))
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, entry: str, draw: random.Random) -> bytes:
    """The end, the middle or the announced length."""
    header = 8 + struct.unpack("<Q", data[:8])[0]
    return draw.choice(
        [
            data[: draw.randrange(len(data))],
            data[: draw.randrange(header)],
            data[: draw.randrange(9)],
            data + bytes(draw.randrange(1, 100)),
            data[:header] + data[header + draw.randrange(1, 50) :],
            struct.pack("<Q", draw.choice([0, 1, header, 2**24, 2**32, 2**63, 2**64 - 1]))
            + data[8:],
            data[:8] + draw.randbytes(header - 8) + data[header:],
        ]
    )  # fmt: skip


def content(data: bytes, entry: str, draw: random.Random) -> bytes:
    """One or two values of the metadata: replaced, removed, doubled, renamed, exchanged, nested."""
    header, _ = parts(data)
    whole = json.loads(header["__metadata__"][entry])
    for _ in range(draw.choice([1, 1, 1, 2])):
        holder, key = draw.choice(list(nodes(whole)))
        way = draw.randrange(7)
        if way <= 2:
            holder[key] = draw.choice(HOSTILE)
        elif way == 3:
            del holder[key]
        elif way == 4 and isinstance(holder, dict):
            holder[draw.choice(["x", "", "index", str(key) + "#2"])] = holder.pop(key)
        elif way == 5:
            other, place = draw.choice(list(nodes(whole)))
            holder[key], other[place] = json.loads(json.dumps([other[place], holder[key]]))
        elif isinstance(holder, list):
            holder.insert(draw.randrange(len(holder) + 1), json.loads(json.dumps(holder[key])))
        else:
            holder[key] = {"x": holder[key], "streams": [holder[key]] * 2}
    text = json.dumps(whole)
    wild = draw.random()
    if wild < 0.1:
        text = draw.choice(["[" * 200_000, '{"a":' * 100_000, "9" * 5000, "", "null", "[]", "NaN"])
    elif wild < 0.15:
        text = '{"version": 1, "content": ' + "[" * 100_000 + "]" * 100_000 + "}"
    elif wild < 0.2:
        text = text.replace('"content"', '"content": 1, "content"')
    return with_metadata(data, entry, text)


def tensors(data: bytes, entry: str, draw: random.Random) -> bytes:
    """The names, types, shapes and offsets of the tensors."""
    header, values = parts(data)
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.sample(names, 2)
    way = draw.randrange(8)
    if way == 0:
        header[one], header[other] = header[other], header[one]
    elif way == 1:
        header[draw.choice(["x", "", "[]", '["matrix"]', one + " ", "a" * 10_000])] = header.pop(
            one
        )
    elif way == 2:
        header[one]["dtype"] = draw.choice(TYPES)
    elif way == 3:
        header[one]["shape"] = draw.choice([*SHAPES, header[one]["shape"][::-1]])
    elif way == 4:
        offsets = [0, 8, -1, 2**40, 2**63, *header[other]["data_offsets"]]
        header[one]["data_offsets"] = draw.sample(offsets, draw.choice([2, 2, 2, 1]))
    elif way == 5:  # without elements, so that no bytes bound its axes
        header[one] = {"dtype": "F32", "shape": draw.choice(SHAPES), "data_offsets": [0, 0]}
    elif way == 6:
        start, end = header.pop(one)["data_offsets"]
        values = values[:start] + values[end:]
        for name in header.keys() - {"__metadata__"}:
            offsets = header[name]["data_offsets"]
            header[name]["data_offsets"] = [o - (end - start) * (o >= end) for o in offsets]
    else:
        twice = json.dumps({one: header[one]})[1:-1]
        return joined(json.dumps(header)[:-1].encode() + f", {twice}}}".encode(), values)
    return joined(header, values)


def check(kind: type, path: Path) -> bool:
    """Whether a file is read, which then is a result that can be used; else it is refused by name.

    Raises:
        AssertionError: if the result cannot be used, or the message does not name the file.
    """
    try:
        found = kind.load(path)
    except ValueError as error:
        said = str(error)
        assert type(error) is ValueError, type(error)  # noqa: PT017
        assert str(path) in said, said
        assert len(said) < 1500, len(said)
        return False
    assert type(found) is kind
    assert repr(found)
    for stream in getattr(found, "streams", ()):
        for other in found.streams:
            examples, rows, columns = found.matrix(stream, other).shape
            assert (rows, columns) == (found.streams[stream].tokens, found.streams[other].tokens)
            assert examples >= 1
    again = path.with_suffix(".again")
    found.save(again)
    assert repr(kind.load(again)) == repr(found)
    return True


def large(data: bytes, most: int) -> Iterator[bytes]:
    """Files with headers of nearly `most` bytes, none of them a saved relevance."""
    header, values = parts(data)
    room = most - 10_000 - len(json.dumps(header))
    text = "x" * (room - 10_000)
    lists = '{"version": 1, "content": [' + "[]," * (room // 3) + "[]]}"
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for entry, metadata in (
        ("relevance", lists),
        ("relevance", "[" * room),
        ("relevance", json.dumps({"version": 1, "content": {text: 1}})),
        (text, "{}"),
    ):
        yield with_metadata(data, entry, metadata)
    yield joined({**header, **{f"x{i}": none for i in range(room // 70)}}, values)


def run(count: int) -> None:
    """Damage the saved results of this folder in so many ways each, print how many were read."""
    from captum_generic_attn import Comparison, Relevance
    from captum_generic_attn.files import tensors as saved

    found: dict[str, Counter[str]] = {}
    for kind in (Relevance, Comparison):
        entry = kind.__name__.lower()
        data = Path(entry).read_bytes()
        assert check(kind, Path(entry))
        path = Path(f"damaged {entry}")
        with memory(128):
            for seed in range(count):
                name, changed = mutation(data, entry, seed)
                path.write_bytes(changed)
                try:
                    read = check(kind, path)
                except BaseException as error:
                    raise AssertionError(f"{entry}, damage {seed} ({name})") from error
                found.setdefault(entry, Counter())["read" if read else "refused"] += 1
    path = Path("large relevance")
    for changed in large(Path("relevance").read_bytes(), saved.HEADER_LIMIT):
        path.write_bytes(changed)
        with memory(600):
            read = check(Relevance, path)
        found.setdefault("large", Counter())["read" if read else "refused"] += 1
    print(json.dumps(found))  # noqa: T201
