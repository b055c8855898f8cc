"""Triton's interpreter, repaired and with checks, to test GPU kernels without a GPU.

With TRITON_INTERPRET=1 a kernel runs on numpy, one program after another. The interpreter that
Triton ships (3.6 to 3.7.1) adds and multiplies the *bit patterns* of bfloat16, lets stray pointers
read the heap, and spends most of its time re-patching triton.language at every nested call.
`install()` makes it

exact    bfloat16 is stored as bits, computed in float32 and rounded once, to nearest even, as
         torch does; fp32 products asked for in TF32 lose their low 13 bits, as on the GPU; float
         arguments are float32 tensors, and tl.maximum ignores NaN, as on the GPU
strict   each of these raises KernelFault, which names the kernel, the program and the address:
         a load or store outside the storages the launch was given; an element stored by two
         programs, or stored by one and read by another; an int32 that overflows; a grid that CUDA
         refuses. So does Triton's own error for a tl.dot with a side below 16. A lane that is
         masked off and has no `other` is undefined on a GPU: here it reads NaN, or 0x5A bytes
fast     the language is patched once per launch, launches copy nothing, shapes are made once

Each replacement subclasses Triton's class:

    floats.py     bfloat16 and float32, bits and numbers
    memory.py     the memory that a launch may access, and its accesses
    builder.py    arithmetic, loads and stores
    semantic.py   promotion, broadcasting, overflow
    executor.py   launches, and the language inside them
"""

import dataclasses

import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

from . import executor, semantic
from .builder import MIN_DOT, Builder
from .memory import KernelFault

__all__ = ["InterpreterError", "KernelFault", "install"]


def install(*, races=True):
    """Replaces Triton's interpreter by the repaired one, for the rest of the process."""
    if not isinstance(tl.sum, stock.InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    executor.Executor.races = races
    if stock.GridExecutor is executor.Executor:
        return
    builder = stock.interpreter_builder
    builder.__class__ = Builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
    builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (MIN_DOT, MIN_DOT, MIN_DOT)
    stock.interpreter_semantic.__class__ = semantic.Semantic
    semantic.install()
    executor.install()
