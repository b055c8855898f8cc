"""GPT-2's GELU, the tanh form, alone or with the bias of the linear layer before it.

    y = gelu(x + bias)    dx = dy * gelu'(x + bias)    dbias = sum over rows of dx

Memory-bound: x is read once and y written once, and nothing but x is kept for the backward. The
bias gradient is summed as in layer_norm: a resident set of programs, one float32 row each.
"""

import torch
import triton
import triton.language as tl

from .lang import gelu, gelu_grad
from .launch import launch
from .partial import sum_partial
from .tiles import (
    GELU_BLOCK,
    GELU_WARPS,
    bias_gelu_config,
    bias_gelu_residents,
    cdiv,
    resident_programs,
)


@triton.jit
def _gelu_fwd_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, gelu(x).to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _gelu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offs, (dy * gelu_grad(x)).to(dx_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr,            # (N, C) contiguous, (C,), (N, C) contiguous
    N, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c, mask_c, bias = _bias_block(bias_ptr, C, BLOCK_C)
    offs, mask = _row_tile(tl.program_id(0) * ROWS, offs_c, mask_c, N, C, ROWS)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias
    tl.store(y_ptr + offs, gelu(x).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr,   # (N, C) contiguous but bias (C,)
    dbias_partial_ptr,                 # (programs, C), float32
    N, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j) walks every num_programs(0)-th tile of rows within column block j."""
    offs_c, mask_c, bias = _bias_block(bias_ptr, C, BLOCK_C)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        offs, mask = _row_tile(start, offs_c, mask_c, N, C, ROWS)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # 0 past the end
        dx = dy * gelu_grad(x)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx
    partial = tl.program_id(0) * C + offs_c
    tl.store(dbias_partial_ptr + partial, tl.sum(dbias, axis=0), mask=mask_c)


@triton.jit
def _bias_block(bias_ptr, C, BLOCK_C: tl.constexpr):
    """Columns and mask of column block program_id(1), and its bias (1, BLOCK_C)."""
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    return offs_c, offs_c < C, bias[None, :]


@triton.jit
def _row_tile(start, offs_c, mask_c, N, C, ROWS: tl.constexpr):
    """Offsets and mask of ROWS rows in a column block."""
    offs_row = start + tl.arange(0, ROWS)
    offs = offs_row[:, None].to(tl.int64) * C + offs_c[None, :]
    return offs, (offs_row < N)[:, None] & mask_c[None, :]


def gelu_fwd(x):
    """gelu(x), contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if (n := x.numel()) > 0:
        grid = (cdiv(n, GELU_BLOCK), 1, 1)
        launch(_gelu_fwd_kernel, grid, x, y, n, BLOCK=GELU_BLOCK, num_warps=GELU_WARPS)
    return y


def gelu_bwd(dy, x):
    """dx, contiguous."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if (n := x.numel()) > 0:
        grid = (cdiv(n, GELU_BLOCK), 1, 1)
        launch(_gelu_bwd_kernel, grid, dy, x, dx, n, BLOCK=GELU_BLOCK, num_warps=GELU_WARPS)
    return dx


def bias_gelu_fwd(x, bias):
    """gelu(x + bias), contiguous; x (..., C), bias (C,)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() > 0:
        C = bias.numel()
        N = x.numel() // C
        tile = bias_gelu_config(C)
        grid = (cdiv(N, tile.ROWS), cdiv(C, tile.BLOCK_C), 1)
        launch(_bias_gelu_fwd_kernel, grid, x, bias, y, N, C, **tile._asdict())
    return y


def bias_gelu_bwd(dy, x, bias):
    """dx, contiguous, and dbias in bias's dtype."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(bias)
    C = bias.numel()
    N = x.numel() // C
    tile = bias_gelu_config(C)
    columns = cdiv(C, tile.BLOCK_C)
    per_sm, maxnreg = bias_gelu_residents(x.dtype)
    programs = resident_programs(x.device, cdiv(N, tile.ROWS), per_sm, columns)
    partial = x.new_empty((1, programs, C), dtype=torch.float32)
    launch(
        _bias_gelu_bwd_kernel, (programs, columns, 1),
        dy, x, bias, dx, partial, N, C, **tile._asdict(), maxnreg=maxnreg,
    )  # fmt: skip
    return dx, sum_partial(partial, torch.empty_like(bias, memory_format=torch.contiguous_format))
