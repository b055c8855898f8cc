"""LayerNorm over the last dimension, alone or fused with the residual addition before it.

    mean = sum(x) / C    rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)    xhat = (x - mean) * rstd
    y    = xhat * weight + bias

Memory-bound, so each element is read once and written once: a tile of whole rows stays in
registers between the two passes of the statistics. The backward walks the rows with one resident
set of programs, keeps its share of the weight gradients in registers, and leaves one float32 row
per program to be summed: no atomics, the same bits every time. docs/layer_norm.md derives it.

    N rows   C row length   BLOCK_C the next power of two
"""

import torch
import triton
import triton.language as tl

from .lang import Matrix
from .launch import launch
from .partial import sum_partial
from .tiles import cdiv, layer_norm_config, resident_programs

# No FMA contraction: in a sum of products over the lanes of a warp, each lane would round its own
# product differently from the others. The lanes would then hold different sums, and which of them a
# store keeps is not defined.
NO_FMA = {"enable_fp_fusion": False}


@triton.jit
def _layer_norm_fwd_kernel(
    x, residual,                       # Matrices (N, C); residual is read only with ADD
    weight_ptr, bias_ptr,              # (C,)
    y_ptr, s_ptr,                      # (N, C), contiguous; s = x + residual only with ADD
    stats_ptr,                         # (2, N), float32: mean, rstd
    N, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Two passes over rows in registers. The centred sum of squares does not cancel the way
    E[x^2] - mean^2 does when |mean| >> std; lanes past C add nothing to it. A row is a tuple of
    blocks of BLOCK_C columns, so that C = 768 has no empty lanes."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    zeros = tl.zeros((ROWS, BLOCK_C), tl.float32)
    total = zeros
    row = ()
    for i in tl.static_range(BLOCKS):
        s = _load_block(x, offs_row, i, N, C, BLOCK_C)
        if ADD:
            # The norm sees s as it is stored, so that the backward recomputes the same xhat.
            stored = s + _load_block(residual, offs_row, i, N, C, BLOCK_C)
            stored = stored.to(s_ptr.dtype.element_ty)
            _store_block(s_ptr, stored, offs_row, i, N, C, BLOCK_C)
            s = stored.to(tl.float32)
        total += s
        row = row + (s,)
    # mean, rstd. What the centred row still sums to is the rounding of the first mean.
    first_mean = tl.sum(total, axis=1) / C
    total, squares = zeros, zeros
    for i in tl.static_range(BLOCKS):
        centred = row[i] - first_mean[:, None]
        if C % BLOCK_C:
            inside = i * BLOCK_C + tl.arange(0, BLOCK_C) < C
            centred = tl.where(inside[None, :], centred, 0.0)
        total += centred
        squares = tl.fma(centred, centred, squares)
    rest = tl.sum(total, axis=1) / C
    mean = first_mean + rest
    variance = tl.sum(squares, axis=1) / C - rest * rest
    rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)  # NaN stays NaN
    # y = xhat * weight + bias
    for i in tl.static_range(BLOCKS):
        offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        weight = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        xhat = (row[i] - mean[:, None]) * rstd[:, None]
        y = tl.fma(xhat, weight[None, :], bias[None, :])
        _store_block(y_ptr, y, offs_row, i, N, C, BLOCK_C)
    tl.store(stats_ptr + offs_row, mean, mask=offs_row < N)
    tl.store(stats_ptr + N + offs_row, rstd, mask=offs_row < N)


@triton.jit
def _layer_norm_bwd_kernel(
    dy, ds,                            # Matrices (N, C); ds, the gradient of s, only with ADD
    x,                                 # Matrix (N, C), what the norm saw
    weight_ptr,                        # (C,)
    stats_ptr,                         # (2, N), float32: mean, rstd
    dx_ptr, dresidual_ptr,             # (N, C), contiguous; dresidual only with MIXED
    partial_ptr,                       # (2 or 3, programs, C), float32: dw, db, with SUM_DX dx
    N,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
    ADD: tl.constexpr, MIXED: tl.constexpr, SUM_DX: tl.constexpr,
):  # fmt: skip
    """With wdy = dy * weight,

        dx = rstd (wdy - mean_C(wdy) - xhat mean_C(wdy xhat)) + ds    dw += dy xhat    db += dy

    and with SUM_DX the sum of dx over rows: the bias gradient of the linear layer whose output was
    added. A row is a tuple of blocks, as in the forward. The next rows are loaded meanwhile
    (STAGES). Outside the matrix everything is 0.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    zeros = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dw, db, dx_sum = (zeros,) * BLOCKS, (zeros,) * BLOCKS, (zeros,) * BLOCKS
    weight = ()
    for i in tl.static_range(BLOCKS):
        offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        weight_i = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        weight = weight + (weight_i[None, :],)
    programs = tl.num_programs(0)
    for start in tl.range(tl.program_id(0) * ROWS, N, programs * ROWS, num_stages=STAGES):
        offs_row = start + tl.arange(0, ROWS)
        mean = tl.load(stats_ptr + offs_row, mask=offs_row < N, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + N + offs_row, mask=offs_row < N, other=0.0)[:, None]
        # mean_C(wdy), mean_C(wdy xhat)
        sum_wdy, sum_wdy_xhat = zeros, zeros
        dys, xhats = (), ()
        for i in tl.static_range(BLOCKS):
            dy_i = _load_block(dy, offs_row, i, N, C, BLOCK_C)
            xhat = (_load_block(x, offs_row, i, N, C, BLOCK_C) - mean) * rstd
            wdy = dy_i * weight[i]
            sum_wdy += wdy
            sum_wdy_xhat = tl.fma(wdy, xhat, sum_wdy_xhat)
            dys, xhats = dys + (dy_i,), xhats + (xhat,)
        mean_wdy = (tl.sum(sum_wdy, axis=1) / C)[:, None]
        mean_wdy_xhat = (tl.sum(sum_wdy_xhat, axis=1) / C)[:, None]
        # dx, dw, db
        next_dw, next_db, next_dx_sum = (), (), ()
        for i in tl.static_range(BLOCKS):
            dx = rstd * (dys[i] * weight[i] - mean_wdy - xhats[i] * mean_wdy_xhat)
            if ADD:
                dx += _load_block(ds, offs_row, i, N, C, BLOCK_C)
            _store_block(dx_ptr, dx, offs_row, i, N, C, BLOCK_C)
            if MIXED:
                _store_block(dresidual_ptr, dx, offs_row, i, N, C, BLOCK_C)
            next_dw = next_dw + (tl.fma(dys[i], xhats[i], dw[i]),)
            next_db = next_db + (db[i] + dys[i],)
            if SUM_DX:
                next_dx_sum = next_dx_sum + (dx_sum[i] + dx,)
        dw, db = next_dw, next_db
        if SUM_DX:
            dx_sum = next_dx_sum
    for i in tl.static_range(BLOCKS):
        offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        row_ptr = partial_ptr + tl.program_id(0) * C + offs_c
        tl.store(row_ptr, tl.sum(dw[i], axis=0), mask=offs_c < C)
        tl.store(row_ptr + programs * C, tl.sum(db[i], axis=0), mask=offs_c < C)
        if SUM_DX:
            tl.store(row_ptr + 2 * programs * C, tl.sum(dx_sum[i], axis=0), mask=offs_c < C)


@triton.jit
def _block(offs_row, i, n_rows, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """(columns, mask) of block i of some rows, (1, BLOCK_C) and (rows, BLOCK_C)."""
    offs_c = (i * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (offs_row < n_rows)[:, None]
    if C % BLOCK_C == 0:
        return offs_c, mask & (offs_c >= 0)
    return offs_c, mask & (offs_c < C)


@triton.jit
def _load_block(x, offs_row, i, n_rows, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Block i of rows of a Matrix, in float32; 0 outside the matrix."""
    offs_c, mask = _block(offs_row, i, n_rows, C, BLOCK_C)
    ptrs = x.ptr + offs_row[:, None].to(tl.int64) * x.stride + offs_c
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_block(ptr, tile, offs_row, i, n_rows, C: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c, mask = _block(offs_row, i, n_rows, C, BLOCK_C)
    ptrs = ptr + offs_row[:, None].to(tl.int64) * C + offs_c
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


def layer_norm_fwd(x, weight, bias, eps):
    """y (..., C) contiguous, in x's dtype, and stats (2, N) float32: mean and rstd."""
    y, _, stats = _forward(x, None, weight, bias, eps)
    return y, stats


def add_layer_norm_fwd(x, residual, weight, bias, eps):
    """layer_norm(s), s = x + residual, and stats of s."""
    return _forward(x, residual, weight, bias, eps)


def layer_norm_bwd(dy, ds, x, weight, stats, sum_dx=False):
    """dx (..., C) contiguous, which also takes the residual's gradient ds where there is one, and
    (2, C) in weight's dtype: the gradients of weight and bias. With sum_dx a third row, the sum of
    dx over all rows."""
    return _backward(dy, ds, x, weight, stats, None, sum_dx)


def mixed_layer_norm_bwd(dy, ds, s, weight, stats, sum_dx=False):
    """For s = x + residual of another dtype than x: the same dx, in dy's dtype, and again as
    dresidual, in s's; then the gradients of weight and bias, and with sum_dx the sum of dx."""
    dresidual = torch.empty_like(s, memory_format=torch.contiguous_format)
    dx, dparams = _backward(dy, ds, s, weight, stats, dresidual, sum_dx)
    return dx, dresidual, dparams


def _backward(dy, ds, x, weight, stats, dresidual, sum_dx):
    C = x.shape[-1]
    x2, dy2 = _matrix(x), _matrix(dy)
    ds2 = dy2 if ds is None else _matrix(ds)
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    N, sums = stats.shape[1], 3 if sum_dx else 2
    if dx.numel() == 0:
        return dx, weight.new_zeros((sums, C))
    tile = layer_norm_config("bwd", C)
    programs = resident_programs(x.device, cdiv(N, tile.ROWS), tile.per_sm)
    partial = stats.new_empty((sums, programs, C))
    launch(
        _layer_norm_bwd_kernel, (programs, 1, 1),
        dy2, ds2, x2, weight, stats, dx, dx if dresidual is None else dresidual, partial, N,
        C=C, BLOCK_C=tile.BLOCK_C, ROWS=tile.ROWS, STAGES=tile.num_stages, ADD=ds is not None,
        MIXED=dresidual is not None, SUM_DX=sum_dx, num_warps=tile.num_warps, **NO_FMA,
    )  # fmt: skip
    return dx, sum_partial(partial, weight.new_empty((sums, C)))


def _forward(x, residual, weight, bias, eps):
    C = x.shape[-1]
    x2 = _matrix(x)
    residual2 = x2 if residual is None else _matrix(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = y
    if residual is not None:
        s = torch.empty_like(residual, memory_format=torch.contiguous_format)
    N = x.shape[:-1].numel()
    stats = x.new_empty((2, N), dtype=torch.float32)
    if y.numel() > 0:
        tile = layer_norm_config("fwd", C)
        launch(
            _layer_norm_fwd_kernel, (cdiv(N, tile.ROWS), 1, 1),
            x2, residual2, weight, bias, y, s, stats, N, float(eps),
            C=C, BLOCK_C=tile.BLOCK_C, ROWS=tile.ROWS, ADD=residual is not None,
            num_warps=tile.num_warps, **NO_FMA,
        )  # fmt: skip
    return y, s, stats


def _matrix(x):
    """x (..., C) as a Matrix, without a copy wherever strides allow."""
    C = x.shape[-1]
    if x.is_contiguous():
        return Matrix(x, C)
    x = x.reshape(-1, C) if C else x.reshape(0, 0)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Matrix(x, x.stride(0))
