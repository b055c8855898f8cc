"""Spoils files from a seed, in every way that broken and hostile files are; test_hostile.py feeds
them to the readers.

A mutation maps bytes to bytes. JSON mutations change the content, so that most of their files pass
the parser; byte mutations change anything.
"""

import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30]
NUMBERS = [0, -1, 1, 2, 3, 7, 255, 65536, *HUGE, *(-n for n in HUGE), 1.5, -0.0, 1e308, 1e-320]
TEXTS = [
    "",
    "gpt2",
    "../x",
    "/etc/passwd",
    "a\nb",
    "\ud800",
    "\U0010ffff",
    "\0",
    "F32",
    "I64",
    "é" * 99,
]


class Raw(str):
    """Text that is written into the JSON verbatim."""


RAW = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "0x10", "tru", "", "'a'"),
    *("[" * 100_000, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[1,]", "\\u0041"),
]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if out:
            out[place(len(out), rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def place(size: int, rng: random.Random) -> int:
    """A random position; half of the time near the beginning, where headers are."""
    return rng.randrange(size if rng.random() < 0.5 else min(size, 200))


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b"\xff", b"{", data)) * rng.choice((1, 7, 8))


def insert(data: bytes, rng: random.Random) -> bytes:
    at = place(len(data) + 1, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8))) + data[at:]


def delete(data: bytes, rng: random.Random) -> bytes:
    at = place(len(data) + 1, rng)
    return data[:at] + data[at + rng.choice((1, 4, 8, 100)) :]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Swaps two fields."""
    width = rng.choice((1, 4, 8, 32))
    i, j = sorted(place(max(len(data) - width, 1), rng) for _ in range(2))
    if j < i + width:
        return data[width:] + data[:width]
    return (
        data[:i]
        + data[j : j + width]
        + data[i + width : j]
        + data[i : i + width]
        + data[j + width :]
    )


def number(data: bytes, rng: random.Random) -> bytes:
    """Writes a huge or odd number of 4 or 8 bytes, at a multiple of its size."""
    width, form = rng.choice(((4, "<I"), (8, "<Q")))
    at = place(max(len(data) - width, 1), rng) // width * width
    value = rng.choice(NUMBERS[:9] + HUGE) if rng.random() < 0.8 else -rng.choice(HUGE)
    mask = 2 ** (8 * width) - 1
    return data[:at] + struct.pack(form, int(value) & mask) + data[at + width :]


BYTES = (flip_bits, truncate, extend, insert, delete, swap, number)


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(BYTES)(data, rng)


def of_json(data: bytes, rng: random.Random) -> bytes:
    """Makes one to three changes to the content of a JSON text, sometimes to its bytes."""
    if rng.random() < 0.2:
        return of_bytes(data, rng)
    return dumps(spoil(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def spoil(found: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = _spoil_once(found, rng)
    return found


def _spoil_once(found: Any, rng: random.Random) -> Any:
    """The value with one value, key, or pair of values changed, at any depth."""
    if isinstance(found, dict) and found and rng.random() < 0.9:
        key = rng.choice(list(found))
        what = rng.random()
        if what < 0.6:
            return {**found, key: _spoil_once(found[key], rng)}
        if what < 0.7:
            return {k: v for k, v in found.items() if k != key}
        if what < 0.8:
            other = rng.choice(list(found))
            return {**found, key: found[other], other: found[key]}
        new = rng.choice((key + "x", "transformer." + key, "h." * 99, *TEXTS))
        return (
            Twice(found, key)
            if what < 0.9
            else {(new if k == key else k): v for k, v in found.items()}
        )
    if isinstance(found, list) and found and rng.random() < 0.7:
        at = rng.randrange(len(found))
        return [*found[:at], _spoil_once(found[at], rng), *found[at + 1 :]]
    if isinstance(found, int) and rng.random() < 0.3:
        return found + rng.choice((-1, 1, 8, 2**31))
    return rng.choice(
        (rng.choice(NUMBERS), rng.choice(TEXTS), Raw(rng.choice(RAW)), None, True, [], {}, [[1]])
    )


class Twice(dict):
    """An object with a duplicate key."""

    def __init__(self, found: dict, key: str):
        super().__init__(found)
        self.key = key


def dumps(found: Any) -> str:
    """JSON, including Raw and Twice."""
    if isinstance(found, Raw):
        return str(found)
    if isinstance(found, dict):
        pairs = [*found.items(), *([(found.key, 1)] if isinstance(found, Twice) else [])]
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in pairs) + "}"
    if isinstance(found, list):
        return "[" + ",".join(map(dumps, found)) + "]"
    return json.dumps(found)


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes the header, as JSON or in the fields that we write; its length usually stays
    right."""
    if rng.random() < 0.3:
        return of_bytes(data, rng)
    length = struct.unpack_from("<Q", data)[0]
    found, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    described = found.get("__metadata__", {})
    if "gpt2" in described and rng.random() < 0.6:
        described["gpt2"] = dumps(spoil(json.loads(described["gpt2"]), rng))
        header = json.dumps(found).encode()
    else:
        header = dumps(spoil(found, rng)).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", rng.choice((len(header),) * 9 + (2**63,))) + header + rest


def of_lines(data: bytes, rng: random.Random) -> bytes:
    """Drops, duplicates, moves, lengthens or renumbers lines of text."""
    if rng.random() < 0.4:
        return of_bytes(data, rng)
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] = lines[at] * 2000
        case 4:
            lines[at] = lines[at].split(b" ")[0] + b" " + str(rng.choice(HUGE)).encode()
        case 5:
            lines[at] = b" ".join(reversed(lines[at].split(b" ")))
    return b"\n".join(lines)


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Joins the start of one file to the end of another, cut anywhere or at the same offset."""
    at = place(len(data) + 1, rng)
    return data[:at] + other[at if rng.random() < 0.5 else place(len(other) + 1, rng) :]


PICKLED = [
    *(b"}", b"]", b")", b"(", b"N", b"0", b"2", b"t", b"u", b"s", b"e", b"a", b"R", b"b", b"Q"),
    *(b"\x85", b"\x86", b"\x87", b"\x81", b"\x93", b"q\0", b"h\0", b"j\0\0\0\0", b"r\0\0\0\x7f"),
    *(b"cos\nsystem\n", b"ctorch\nload\n", b"c__main__\nGPTConfig\n", b"X\1\0\0\0k"),
    *(b"\x8a\x08" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"I1\n", b"L9L\n"),
]


def of_pickle(data: bytes, rng: random.Random) -> bytes:
    """Inserts, multiplies or drops opcodes, or changes bytes."""
    if rng.random() < 0.5:
        return of_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        code = b"".join(rng.choices(PICKLED, k=rng.choice((1, 2, 3))))
        data = data[:at] + code * rng.choice((1, 1, 1, 2, 50, 20_000)) + data[at:]
    return data


def of_archive(data: bytes, rng: random.Random) -> bytes:
    """Changes the pickle in an archive of torch.save, with its checksum, or another part, or
    bytes."""
    if rng.random() < 0.4:
        return of_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = rng.randrange(len(parts))
    if rng.random() < 0.8:
        at = next(i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
    name, content = parts[at]
    match rng.randrange(12):
        case 0:
            del parts[at]
        case 1:
            parts.append((name.upper(), content))
        case 2:
            parts[at] = (rng.choice(parts)[0], content)
        case _:
            parts[at] = (name, of_pickle(content, rng))
    with io.BytesIO() as file, warnings.catch_warnings(action="ignore"):  # names may be duplicates
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in parts:
                archive.writestr(name, content)
        return file.getvalue()


Mutation = Callable[[bytes, random.Random], bytes]
