"""llm.c's `model.bin`: a header of 256 int32, then every weight in one dtype.

    magic 20240326, version (3: float32, 5: bfloat16), T, V, L, H, C, padded V, zeros
    wte (padded V, C), wpe (T, C), then one kind of weight after the other, each for all layers

Linear weights are (out, in), like ours. The token embedding is padded to a multiple of 128 rows.
The extra rows belong to no token: they are written as zeros and dropped when read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .. import files
from ..config import Config
from ..errors import InputError, quoted
from . import weights
from .weights import WTE, State

MAGIC, HEADER_BYTES, PADDING = 20240326, 256 * 4, 128
VERSIONS = {3: torch.float32, 5: torch.bfloat16}


def is_one(path: Path) -> bool:
    """Whether a file begins with llm.c's magic number."""
    with files.open_regular(path) as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_config(path: Path) -> Config:
    """The configuration in the header. Raises InputError, naming the file, unless the header is
    llm.c's and the file has exactly the size that the header implies."""
    with files.open_regular(path) as file:
        return _read_header(path, file)[0]


def read_state(path: Path, config: Config) -> State:
    """The weights, memory-mapped, in the file's dtype."""
    with files.open_regular(path) as file:
        _, rows, dtype = _read_header(path, file)
        numbers = np.memmap(file, "<f4" if dtype == torch.float32 else "<i2", "c", HEADER_BYTES)
    state, start = {}, 0
    for name, shape in _order(config, rows):
        size = int(np.prod(shape))
        state[name] = torch.from_numpy(numbers[start : start + size]).view(dtype).view(shape)
        start += size
    state[WTE] = state[WTE][: config.vocab_size]
    return {name: state[name] for name in weights.shapes(config)}


def write(config: Config, state: State, path: Path) -> None:
    """Writes path atomically. Raises InputError unless all weights are float32 or all are
    bfloat16."""
    dtypes = {tensor.dtype for tensor in state.values()}
    version = next((v for v, dtype in VERSIONS.items() if dtypes == {dtype}), None)
    if version is None:
        got = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InputError(f"llm.c's weights must all be float32 or all bfloat16, got {got}")
    rows = -(-config.vocab_size // PADDING) * PADDING
    header = np.zeros(256, dtype="<i4")
    header[:8] = (
        *(MAGIC, version, config.block_size, config.vocab_size),
        *(config.n_layer, config.n_head, config.n_embd, rows),
    )

    def write_file(temporary: Path) -> None:
        with temporary.open("wb") as file:
            header.tofile(file)
            for name, (n, *_) in _order(config, rows):
                tensor = state[name].contiguous()
                tensor.view(torch.uint8).numpy().tofile(file)
                np.zeros((n - len(tensor)) * tensor[0].nbytes, np.uint8).tofile(file)

    files.write_atomic(path, write_file)


def _read_header(path: Path, file: BinaryIO) -> tuple[Config, int, torch.dtype]:
    """The configuration, the number of rows of the padded embedding, and the dtype."""
    what = f"llm.c's {quoted(path)}"
    start = file.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES:
        raise InputError(f"{what} must have a header of 256 int32, got {len(start) // 4}")
    header = np.frombuffer(start, dtype="<i4")
    magic, version, T, V, L, H, C, rows = map(int, header[:8])
    if magic != MAGIC:
        raise InputError(f"{what} must have the magic {MAGIC}, got {magic}")
    if version not in VERSIONS:
        raise InputError(f"{what} must have version 3 (float32) or 5 (bfloat16), got {version}")
    try:
        config = Config(T, V, L, H, C)
    except ValueError as e:
        raise InputError(f"{what}: {e}") from e
    if rows < V:
        raise InputError(f"{what} must have a padded vocabulary of at least {V}, got {rows}")
    count = rows * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    size, expected = files.size_of(file), HEADER_BYTES + count * VERSIONS[version].itemsize
    if size != expected:
        raise InputError(f"{what} must have {expected} bytes, as its header says, got {size}")
    weights.check_depth(what, L, size)
    return config, rows, VERSIONS[version]


def _order(config: Config, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every weight in file order: by kind, then by layer."""
    expected = {**weights.shapes(config), WTE: (rows, config.n_embd)}
    first = "transformer.h.0."
    for name, shape in expected.items():
        if not name.startswith("transformer.h."):
            yield name, shape
        elif name.startswith(first):
            for i in range(config.n_layer):
                yield f"transformer.h.{i}.{name.removeprefix(first)}", shape
