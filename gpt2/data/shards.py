"""Token shards on disk: two layouts of uint16 ids, read through a memory map.

    nanoGPT   only the ids
    llm.c     256 int32 (magic 20240520, version 1, number of ids, zeros), then the ids

A nanoGPT shard is never mistaken for an llm.c shard: read as ids, the magic contains 55448, which
is outside GPT-2's vocabulary.
"""

import mmap
from pathlib import Path

import numpy as np

from .. import files
from ..errors import InputError, quoted

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
MAX_TOKENS = 2**31 - 1  # in one llm.c shard: its count is an int32
_FAMILY = range(20240000, 20300000)  # llm.c's magics are dates; only MAGIC is supported here


def read(path: Path, vocab_size: int) -> np.ndarray:
    """The ids of a shard, (N,) uint16, memory-mapped.

    Raises InputError, naming the file, if its header or size is wrong or an id is not below
    vocab_size.
    """
    try:
        file = files.open_regular(path)
    except OSError as e:
        raise InputError(f"data {quoted(path)} cannot be read: {e.strerror}") from e
    with file:
        size = files.size_of(file)
        if size == 0:
            raise InputError(f"data {quoted(path)} is empty")
        if size % 2:
            raise InputError(
                f"data {quoted(path)} must hold uint16 ids, got an odd size, {size} bytes"
            )
        start = file.read(HEADER_BYTES)
        header = np.frombuffer(start[: len(start) // 4 * 4], dtype="<i4")
        has_header = header.size > 0 and header[0] in _FAMILY
        if has_header:
            _check_header(path, header, size)
        memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    tokens = np.frombuffer(memory, dtype="<u2", offset=HEADER_BYTES if has_header else 0)
    if vocab_size < 65536:
        _check_ids(path, tokens, vocab_size)
    if hasattr(memory, "madvise"):  # random windows: read-ahead made each 500 times slower
        memory.madvise(mmap.MADV_RANDOM)
    return tokens


def reaches(tokens: np.ndarray, bound: int) -> bool:
    """Whether any id is at least bound. Reading stops at the first such block."""
    start, step = 0, 2**14
    while start < len(tokens):
        if tokens[start : start + step].max() >= bound:
            return True
        start, step = start + step, 2**24
    return False


def write(path: Path, tokens: np.ndarray) -> None:
    """Writes ids below 65536 as an llm.c shard."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with files.writing(path), path.open("wb") as file:
        file.write(header.tobytes())
        tokens.astype("<u2", copy=False).tofile(file)


def _check_header(path: Path, header: np.ndarray, size: int) -> None:
    name = quoted(path)
    if header[0] != MAGIC:
        raise InputError(f"data {name} must have llm.c's magic {MAGIC}, got {header[0]}")
    if size < HEADER_BYTES:
        raise InputError(f"data {name} must have a header of {HEADER_BYTES} bytes, got {size}")
    if header[1] != VERSION:
        raise InputError(f"data {name} must have version {VERSION}, got {header[1]}")
    count = int(header[2])
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise InputError(
            f"data {name} must hold as many ids as its header says, {count}, "
            f"got {(size - HEADER_BYTES) // 2}"
        )


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    step = 2**24  # ids checked at a time
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        if part.max() >= vocab_size:
            at = int(np.argmax(part >= vocab_size))
            raise InputError(
                f"data {quoted(path)} must hold ids below vocab_size {vocab_size}, "
                f"got {part[at]} at position {start + at}"
            )
