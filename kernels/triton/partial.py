"""Adds up the partial sums that the programs of a backward leave: (G, P, C) float32 to (G, C).

One program has BLOCK_C columns of one sum. Each of its lanes adds rows in a fixed order, then the
lanes are added in a fixed order: the same bits every time.
"""

import torch
import triton
import triton.language as tl

from .launch import launch
from .tiles import PARTIAL_BLOCK_C, PARTIAL_ROWS, PARTIAL_WARPS, cdiv


@triton.jit
def _sum_partial_kernel(
    partial_ptr,                       # (G, P, C), float32, contiguous
    out_ptr,                           # (G, C), contiguous
    P, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1).to(tl.int64)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, P, ROWS):
        offs_row = start + tl.arange(0, ROWS)
        ptrs = partial_ptr + (g * P + offs_row)[:, None] * C + offs_c[None, :]
        mask = (offs_row < P)[:, None] & (offs_c < C)[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0)
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + g * C + offs_c, out, mask=offs_c < C)


def sum_partial(partial: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes the sums over P of partial (G, P, C), contiguous and float32, to out, contiguous and
    of G C elements; returns out."""
    G, P, C = partial.shape
    launch(
        _sum_partial_kernel, (cdiv(C, PARTIAL_BLOCK_C), G, 1),
        partial, out, P, C,
        ROWS=PARTIAL_ROWS, BLOCK_C=PARTIAL_BLOCK_C, num_warps=PARTIAL_WARPS,
    )  # fmt: skip
    return out
