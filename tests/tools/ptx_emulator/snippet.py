"""Runs a few lines of PTX as a kernel; the tests use it to run one instruction.

    run("add.s32 %d0, %a0, %a1;", "s32", ("s32", [1, 2]), ("s32", [3, 4]))      # → [[4, 6]]

A thread has one element of each input in %a0, %a1, ..., and leaves its results in %d0, ...
"""

import numpy as np

from .launch import Launch, launch
from .memory import Memory, poison
from .parser import Module
from .registers import DTYPES
from .syntax import BYTES

HEADER = ".version 8.7\n.target sm_80\n.address_size 64\n"


def kernel(body: str, params: int = 0, declarations: str = "", module: str = "") -> str:
    """The text of a kernel k with `params` 64-bit parameters and the registers %p, %h, %r, %d and
    %f; %tid is a thread's number, and %in0, ... are the parameters."""
    names = ", ".join(f".param .u64 k_param_{i}" for i in range(params))
    load = "\n".join(f"    ld.param.u64 %in{i}, [k_param_{i}];" for i in range(params))
    return f"""{HEADER}{module}
.visible .entry k({names})
{{
    .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %x<32>; .reg .f32 %f<16>;
    .reg .b32 %tid; .reg .b64 %in<{params + 1}>;
    {declarations}
    mov.u32 %tid, %tid.x;
{load}
{body}
    ret;
}}
"""


def execute(text: str, *arrays, block=32, grid=1, shared_bytes=0, **options) -> Launch:
    """Runs k with the arrays' addresses as its parameters."""
    addresses = [a.ctypes.data for a in arrays]
    memory = Memory.of(*arrays)
    return launch(Module(text), "k", (grid,), (block,), addresses, memory, shared_bytes, **options)


def run(body: str, results: str, *inputs, block: int | None = None) -> list[np.ndarray]:
    """Returns one array per kind in `results`; each thread gets one element per input."""
    arrays, lines, registers = [], [], []
    kinds = results.split()
    for i, (kind, values) in enumerate(inputs):
        array = np.asarray(values)
        if array.dtype != DTYPES[kind]:
            array = _bits(values, kind)
        arrays.append(np.ascontiguousarray(array))
        lines.append(_transfer("ld", f"%a{i}", i, kind))
        registers.append(f".reg .{_register(kind)} %a{i};")
    threads = block or max(a.size for a in arrays)
    arrays = [np.ascontiguousarray(np.resize(a, threads)) for a in arrays]
    outputs = [
        poison(np.empty(threads, DTYPES[kind] if kind != "pred" else np.uint32)) for kind in kinds
    ]
    after = []
    for i, kind in enumerate(kinds):
        registers.append(f".reg .{_register(kind)} %d{i};")
        if kind == "pred":
            registers.append(f".reg .b32 %e{i};")
            after.append(f"selp.b32 %e{i}, 1, 0, %d{i};")
        name, kind = (f"%e{i}", "b32") if kind == "pred" else (f"%d{i}", kind)
        after.append(_transfer("st", name, len(inputs) + i, kind))
    text = kernel("\n".join([*lines, body, *after]), len(arrays) + len(kinds), " ".join(registers))
    execute(text, *arrays, *outputs, block=threads, canary=False)
    return outputs


def _bits(values, kind):
    """Converts numbers, or the bits of floating-point numbers if given as integers."""
    dtype = np.dtype(DTYPES[kind])
    if dtype.kind == "f" and all(isinstance(v, int) for v in values):
        return np.array(values, f"u{dtype.itemsize}").view(dtype)
    if dtype.kind == "f":
        return np.array(values, dtype)
    mask = (1 << 8 * dtype.itemsize) - 1
    return np.array([int(v) & mask for v in values], f"u{dtype.itemsize}").view(dtype)


def _register(kind):
    return (
        "b16"
        if BYTES[kind] == 1 and kind != "pred"
        else f"b{8 * BYTES[kind]}"
        if kind != "pred"
        else kind
    )


def _transfer(op, register, i, kind):
    word, size = f"b{8 * BYTES[kind]}", BYTES[kind]
    at = f"mul.wide.u32 %x0, %tid, {size}; add.s64 %x1, %in{i}, %x0;"
    if op == "ld":
        return f"{at} ld.global.{word} {register}, [%x1];"
    return f"{at} st.global.{word} [%x1], {register};"
