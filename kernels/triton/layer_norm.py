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

from .lang import Matrix, load_rows, store_rows
from .tiles import layer_norm_config, resident_programs

# No FMA contraction: in a sum of products over the lanes of a warp, each lane would round its own
# product differently from the others. The lanes would then hold different sums, and which of them a
# store keeps is not defined.
NO_FMA = {"enable_fp_fusion": False}


@triton.jit
def _layer_norm_fwd_kernel(
    x, residual,                       # Matrices (N, C); residual is read only with ADD
    weight_ptr, bias_ptr,              # (C,)
    y_ptr, s_ptr,                      # (N, C), contiguous; s = x + residual only with ADD
    mean_ptr, rstd_ptr,                # (N,), float32
    N, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Two passes over a tile in registers. The centred sum of squares does not cancel the way
    E[x^2] - mean^2 does when |mean| >> std; lanes past C add nothing to it."""
    offs_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    s = load_rows(x.ptr, offs_row, x.stride, N, C, BLOCK_C, True).to(tl.float32)
    if ADD:
        r = load_rows(residual.ptr, offs_row, residual.stride, N, C, BLOCK_C, True)
        # The norm sees s as it is stored, so that the backward recomputes the same xhat.
        stored = (s + r.to(tl.float32)).to(s_ptr.dtype.element_ty)
        store_rows(s_ptr, stored, offs_row, C, N, C, BLOCK_C)
        s = stored.to(tl.float32)
    # mean, rstd. What the centred row still sums to is the rounding of the first mean.
    first_mean = tl.sum(s, axis=1) / C
    centred = tl.where((offs_c < C)[None, :], s - first_mean[:, None], 0.0)
    rest = tl.sum(centred, axis=1) / C
    mean = first_mean + rest
    variance = tl.sum(centred * centred, axis=1) / C - rest * rest
    rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)  # NaN stays NaN
    # y = xhat * weight + bias
    weight = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    xhat = (s - mean[:, None]) * rstd[:, None]
    y = tl.fma(xhat, weight[None, :], bias[None, :])
    store_rows(y_ptr, y, offs_row, C, N, C, BLOCK_C)
    tl.store(mean_ptr + offs_row, mean, mask=offs_row < N)
    tl.store(rstd_ptr + offs_row, rstd, mask=offs_row < N)


@triton.jit
def _layer_norm_bwd_kernel(
    dy, ds,                            # Matrices (N, C); ds, the gradient of s, only with ADD
    x,                                 # Matrix (N, C), what the norm saw
    weight_ptr,                        # (C,)
    mean_ptr, rstd_ptr,                # (N,), float32
    dx_ptr, dresidual_ptr,             # (N, C), contiguous; dresidual only with MIXED
    dw_partial_ptr, db_partial_ptr,    # (programs, C), float32
    N,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, ADD: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """With wdy = dy * weight,

        dx = rstd (wdy - mean_C(wdy) - xhat mean_C(wdy xhat)) + ds    dw += dy xhat    db += dy

    Rows past N and lanes past C read dy = weight = 0, so every product there is 0.
    """
    offs_c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK_C), tl.float32)
    db = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        offs_row = start + tl.arange(0, ROWS)
        x_tile = load_rows(x.ptr, offs_row, x.stride, N, C, BLOCK_C, True).to(tl.float32)
        dy_tile = load_rows(dy.ptr, offs_row, dy.stride, N, C, BLOCK_C, True).to(tl.float32)
        mean = tl.load(mean_ptr + offs_row, mask=offs_row < N, other=0.0)
        rstd = tl.load(rstd_ptr + offs_row, mask=offs_row < N, other=0.0)
        xhat = (x_tile - mean[:, None]) * rstd[:, None]
        wdy = dy_tile * weight[None, :]
        # dx
        mean_wdy = tl.sum(wdy, axis=1) / C
        mean_wdy_xhat = tl.sum(wdy * xhat, axis=1) / C
        dx = rstd[:, None] * (wdy - mean_wdy[:, None] - xhat * mean_wdy_xhat[:, None])
        if ADD:
            dx += load_rows(ds.ptr, offs_row, ds.stride, N, C, BLOCK_C, True).to(tl.float32)
        store_rows(dx_ptr, dx, offs_row, C, N, C, BLOCK_C)
        if MIXED:
            store_rows(dresidual_ptr, dx, offs_row, C, N, C, BLOCK_C)
        # dw, db
        dw += dy_tile * xhat
        db += dy_tile
    partial = tl.program_id(0) * C + offs_c
    tl.store(dw_partial_ptr + partial, tl.sum(dw, axis=0), mask=offs_c < C)
    tl.store(db_partial_ptr + partial, tl.sum(db, axis=0), mask=offs_c < C)


def layer_norm_fwd(x, weight, bias, eps):
    """y (..., C) contiguous, in x's dtype, and stats (2, N) float32: mean and rstd."""
    y, _, stats = _forward(x, None, weight, bias, eps)
    return y, stats


def add_layer_norm_fwd(x, residual, weight, bias, eps):
    """layer_norm(s), s = x + residual, and stats of s."""
    return _forward(x, residual, weight, bias, eps)


def layer_norm_bwd(dy, ds, x, weight, stats):
    """dx (..., C) contiguous, which also takes the residual's gradient ds where there is one, and
    (2, C) in weight's dtype: the gradients of weight and bias."""
    return _backward(dy, ds, x, weight, stats, None)


def mixed_layer_norm_bwd(dy, ds, s, weight, stats):
    """For s = x + residual of another dtype than x: the same dx, in dy's dtype, and again as
    dresidual, in s's; then the gradients of weight and bias."""
    dresidual = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dx, dparams = _backward(dy, ds, s, weight, stats, dresidual)
    return dx, dresidual, dparams


def _backward(dy, ds, x, weight, stats, dresidual):
    C = x.shape[-1]
    x2, dy2 = _matrix(x), _matrix(dy)
    ds2 = dy2 if ds is None else _matrix(ds)
    dx = torch.empty(x.shape, dtype=dy.dtype, device=x.device)
    N = x2.ptr.shape[0]
    if N == 0:
        return dx, weight.new_zeros((2, C))
    tile = layer_norm_config("bwd", C)
    # A float32 row beside one of 16 bits: on sm_90 one warp has no registers for both at C = 768.
    warps = tile.num_warps if dresidual is None else min(2 * tile.num_warps, 16)
    programs = resident_programs(x.device, triton.cdiv(N, tile.ROWS), tile.per_sm)
    partial = torch.empty((2, programs, C), dtype=torch.float32, device=x.device)
    _layer_norm_bwd_kernel[(programs,)](
        dy2, ds2, x2, weight, *stats, dx, dx if dresidual is None else dresidual, *partial, N,
        C=C, BLOCK_C=triton.next_power_of_2(C), ROWS=tile.ROWS, ADD=ds is not None,
        MIXED=dresidual is not None, num_warps=warps, **NO_FMA,
    )  # fmt: skip
    return dx, partial.sum(1).to(weight.dtype)


def _forward(x, residual, weight, bias, eps):
    C = x.shape[-1]
    x2 = _matrix(x)
    residual2 = x2 if residual is None else _matrix(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = y
    if residual is not None:
        s = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    N = x2.ptr.shape[0]
    stats = torch.empty((2, x.shape[:-1].numel()), dtype=torch.float32, device=x.device)
    if N > 0:
        tile = layer_norm_config("fwd", C)
        _layer_norm_fwd_kernel[(triton.cdiv(N, tile.ROWS),)](
            x2, residual2, weight, bias, y, s, *stats, N, eps,
            C=C, BLOCK_C=triton.next_power_of_2(C), ROWS=tile.ROWS, ADD=residual is not None,
            num_warps=tile.num_warps, **NO_FMA,
        )  # fmt: skip
    return y, s, stats


def _matrix(x):
    """x (..., C) as a Matrix, without a copy wherever strides allow. C = 0: no rows."""
    C = x.shape[-1]
    x = x.reshape(-1, C) if C else x.reshape(0, 0)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Matrix(x, x.stride(0))
