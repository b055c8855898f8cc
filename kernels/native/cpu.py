"""The CPU backend: the kernels of csrc/cpu, for the instruction set of this machine.

The library is built at the first call that needs it (libraries.py), and contains every instruction
set. The fastest one that this machine supports is used, or the one that GPT2_KERNELS_ISA names
(scalar, avx2, avx512, avx512_bf16). Importing this module loads nothing.
"""

import os

import torch

from ..linear_cross_entropy import Chunks
from ..matmul import has_fast_matmul
from ..tracing import cached_untraced, untraced
from . import libraries

MAX_HEAD_SIZE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """The reason why the kernels do not support this call, or None (see dispatch.py)."""
    if device.type != "cpu":
        return f"needs a CPU tensor, got one on {device.type}"
    reason = _library_reason()
    if reason is not None:
        return reason
    if dtype == torch.float64 and _isa() != "scalar":
        return "float64 needs the scalar kernels: set GPT2_KERNELS_ISA=scalar"
    if dtype not in (*DTYPES, torch.float64):
        return f"dtype {dtype} is not one of float32, bfloat16, float16"
    if op in ("attention", "decode_attention") and size > MAX_HEAD_SIZE:
        return f"head size {size} is larger than {MAX_HEAD_SIZE}"
    return None


def logits_chunks(dtype: torch.dtype) -> Chunks:
    """The layout for linear_cross_entropy. On a CPU, rows of odd length are not slower, but small
    matrix products are. Without fast 16-bit products, float32 is used (matmul.py)."""
    return Chunks(align=1, tile=128, least=1, wide=not has_fast_matmul(dtype, "cpu"))


def module(op: str):
    """The operators of the library. Each has the signature of the raw op of the same name."""
    return torch.ops.gpt2_kernels_cpu


@untraced
def _isa() -> str:
    return torch.ops.gpt2_kernels_cpu.isa()


@cached_untraced
def _library_reason() -> str | None:
    """Loads the library and applies GPT2_KERNELS_ISA. Returns the reason if that fails, else
    None."""
    reason = libraries.load("cpu")
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
            "this CPU has neither AVX2 nor AVX-512: GPT2_KERNELS_ISA=scalar uses the slow kernels"
        )
    return None
