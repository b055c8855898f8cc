"""The CPU backend: the kernels of csrc/cpu, for the instruction set of this machine.

The library is built at the first call that asks for it (native.py), and holds every instruction
set; the fastest that runs here serves, or the one that GPT2_KERNELS_ISA names (scalar, avx2,
avx512, avx512_bf16). Importing this module loads nothing.
"""

import functools
import os

import torch

from . import native

MAX_HEAD_SIZE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """None where the kernels can serve `op`, else the reason (see dispatch.py)."""
    if device.type != "cpu":
        return f"needs a CPU tensor, this one is on {device.type}"
    reason = _library_reason()
    if reason is not None:
        return reason
    if dtype == torch.float64 and _isa() != "scalar":
        return "float64 has kernels in the scalar set alone: GPT2_KERNELS_ISA=scalar"
    if dtype not in (*DTYPES, torch.float64):
        return f"dtype {dtype} is not one of float32, bfloat16, float16"
    if op in ("attention", "decode_attention") and size > MAX_HEAD_SIZE:
        return f"head size {size} is larger than {MAX_HEAD_SIZE}"
    return None


def module(op: str):
    """The operators of the library: each has the signature of the launcher of its name."""
    return torch.ops.gpt2_kernels_cpu


def _library_reason() -> str | None:
    return _cached_library_reason()


def _isa() -> str:
    return torch.ops.gpt2_kernels_cpu.isa()


for _function in (_library_reason, _isa):
    _function._dynamo_marked_constant = True  # see dispatch._say_once


@functools.cache
def _cached_library_reason() -> str | None:
    """Loads the library and applies GPT2_KERNELS_ISA."""
    reason = native.load("cpu")
    if reason is not None:
        return reason
    library = torch.ops.gpt2_kernels_cpu
    wanted, here = os.environ.get("GPT2_KERNELS_ISA", ""), library.isas().split()
    if wanted:
        if wanted not in here:
            return f"GPT2_KERNELS_ISA={wanted}: this machine runs {', '.join(here)}"
        library.use_isa(wanted)
    elif here == ["scalar"]:
        return (
            "this CPU has neither AVX2 nor AVX-512: GPT2_KERNELS_ISA=scalar takes the slow kernels"
        )
    return None
