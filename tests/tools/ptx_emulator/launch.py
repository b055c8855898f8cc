"""Runs a launch: checks its sizes and parameters, then executes its blocks chunk by chunk.

The blocks of a launch are independent, so a chunk has only as many as fit numpy's arrays in cache.
"""

import dataclasses
import itertools

import numpy as np

from . import access, compare, control, convert, floats, integers, tensor, warp  # noqa: F401
from .coverage import coverage
from .flow import Program
from .memory import Memory
from .parser import Module
from .syntax import Kernel
from .threads import Machine

CHUNK_BYTES = 64 << 20  # of registers
CHUNK_THREADS = 8192
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_SHARED = 163 << 10  # bytes of a block, on sm_80


@dataclasses.dataclass
class Counts:
    """Counts of a launch. A warp instruction is one that at least one thread of a warp executed."""

    thread_instructions: int = 0
    warp_instructions: int = 0
    global_bytes_read: int = 0
    global_bytes_written: int = 0
    bank_conflicts: int = 0  # wavefronts beyond the possible minimum, if counted
    mma: int = 0  # warp instructions
    barriers: int = 0  # of blocks


@dataclasses.dataclass
class Launch:
    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: np.ndarray
    memory: Memory
    shared_bytes: int
    canary: bool
    banks: bool
    counts: Counts = dataclasses.field(default_factory=Counts)


def launch(
    module: Module, name: str, grid, block, args, memory: Memory,
    shared_bytes: int = 0, *, canary: bool = True, banks: bool = False,
) -> Launch:  # fmt: skip
    """Runs a kernel to its end. Raises Findings at the first instruction that breaks a rule.

    args: one value per parameter, or all of them as bytes, in PTX's layout. shared_bytes: the
    launch's dynamic shared memory. canary=False: reading unwritten global memory is no finding.
    banks=True: also counts bank conflicts, which is slower.
    """
    kernel = module.kernels[name]
    grid, block = (tuple([*size, 1, 1][:3]) for size in (grid, block))
    _check_sizes(kernel, grid, block)
    if kernel.program is None:
        kernel.program = Program(kernel)
    program = kernel.program
    run = Launch(
        kernel, grid, block, _pack(kernel, args), memory,
        program.dynamic_start + shared_bytes, canary, banks,
    )  # fmt: skip
    if program.dynamic_start + shared_bytes > MAX_SHARED:
        raise ValueError(f"{name}: more than {MAX_SHARED} bytes of shared memory")
    executed = coverage.of(kernel)
    blocks = np.prod(grid, dtype=np.int64)
    threads = -(-int(np.prod(block)) // 32) * 32
    widest = max(8 * len(program.slots.recipes) // 2, 1)
    chunk = max(1, min(CHUNK_BYTES // widest, CHUNK_THREADS) // threads)
    own = [(data.ctypes.data, data.nbytes) for data in module.data.values()]
    with np.errstate(all="ignore"), memory.also(own):
        for first in range(0, int(blocks), chunk):
            numbers = np.arange(first, min(first + chunk, int(blocks)))
            Machine(run, program, numbers, executed).run()
    return run


def _check_sizes(kernel, grid, block):
    for what, size, most in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        if not all(1 <= n <= limit for n, limit in zip(size, most, strict=True)):
            raise ValueError(f"{kernel.name}: {what} {size}; CUDA allows 1 to {most}")
    threads = int(np.prod(block))
    if threads > kernel.max_threads or (kernel.block_size and block != kernel.block_size):
        raise ValueError(
            f"{kernel.name}: block {block}, but it was compiled for "
            f"{kernel.block_size or kernel.max_threads} threads"
        )


def _pack(kernel, args):
    """The parameters as bytes."""
    size = max((p.offset + p.nbytes for p in kernel.params), default=0)
    raw = np.zeros(size + 8, np.uint8)
    if isinstance(args, (bytes, bytearray)):
        raw[: len(args)] = np.frombuffer(args, np.uint8)
        return raw
    for param, value in itertools.zip_longest(kernel.params, args):
        if param is None or value is None:
            raise ValueError(f"{kernel.name} has {len(kernel.params)} parameters, not {len(args)}")
        if isinstance(value, int):
            value = (value % (1 << 8 * param.nbytes)).to_bytes(param.nbytes, "little")
        elif isinstance(value, float):
            value = np.dtype(f"f{param.nbytes}").type(value).tobytes()
        elif not isinstance(value, (bytes, bytearray)):
            value = value.tobytes()
        if len(value) != param.nbytes:
            raise ValueError(f"{param.name} has {param.nbytes} bytes, not {len(value)}")
        raw[param.offset : param.offset + param.nbytes] = np.frombuffer(value, np.uint8)
    return raw
