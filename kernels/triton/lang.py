"""Value functions: what the kernels share, written once.

Each takes and returns tiles in registers; the kernels decide what to load, keep and store. A tensor
that is read through strides reaches a kernel as one tuple, its pointer and its strides.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SQRT_2_PI = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
NEG_INF = tl.constexpr(float("-inf"))
# A maximum of float32 that starts here, not at -inf, leaves exp(s - m) = 0 where all s are -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


class View(NamedTuple):
    """A tensor (B, T, H, D), contiguous in D."""

    ptr: object
    stride_b: int
    stride_t: int
    stride_h: int


class Matrix(NamedTuple):
    """A tensor (N, C), contiguous in C."""

    ptr: object
    stride: int  # of a row


@triton.jit
def head_of(view, b, h):
    """A pointer to row 0 of head (b, h) of a View; rows are view.stride_t apart."""
    return view.ptr + b * view.stride_b + h * view.stride_h


@triton.jit
def load_rows(
    ptr, offs_row, stride, n_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows `offs_row` of an (n_rows, D) matrix as a (rows, BLOCK_D) tile, 0 outside the matrix.

    Without MASKED every row is known to exist. Offsets are 64-bit: a row stride may pass 2^31.
    """
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_row[:, None].to(tl.int64) * stride + offs_d[None, :]
    if MASKED:
        tile = tl.load(ptrs, mask=(offs_row < n_rows)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_rows(ptr, tile, offs_row, stride, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The part of a (rows, BLOCK_D) tile that lies inside an (n_rows, D) matrix."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_row[:, None].to(tl.int64) * stride + offs_d[None, :]
    mask = (offs_row < n_rows)[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu(x):
    """0.5 x (1 + tanh(u)) = x g with g = 1 / (1 + e), e = exp(-2 u).

    This form keeps its relative accuracy in the left tail, where 1 + tanh(u) cancels.
    """
    return x / (1.0 + _gelu_exp(x))


@triton.jit
def gelu_grad(x):
    """d gelu / dx = g + 2 x du/dx (1 - g) g, where 1 - g = e g: the difference would cancel."""
    top = tl.minimum(x, 10.0, propagate_nan=tl.PropagateNan.ALL)  # from here on exactly 1
    e = _gelu_exp(top)
    g = 1.0 / (1.0 + e)
    two_x_du = top * (2.0 * SQRT_2_PI + 6.0 * 0.044715 * SQRT_2_PI * (top * top))
    grad = g + two_x_du * ((e * g) * g)
    # Further out e overflows, and the gradient is 0 to 35 digits.
    return tl.where(x < -10.0, 0.0, grad)


@triton.jit
def _gelu_exp(x):
    """exp(-2 u), u = sqrt(2/pi) (x + 0.044715 x^3), as a power of two."""
    return tl.exp2(x * (-2.0 * LOG2E * SQRT_2_PI - 2.0 * 0.044715 * LOG2E * SQRT_2_PI * (x * x)))


@triton.jit
def dropout_keep(seed, bh, offs_m, start_n, BLOCK_N: tl.constexpr, threshold):
    """(rows, BLOCK_N) mask of the probabilities that dropout keeps: see reference.dropout_keep.

    One Philox call yields four neighbouring columns; start_n is a multiple of 4.
    """
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    column = zero + (start_n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    row = zero + offs_m[:, None]
    w0, w1, w2, w3 = tl.philox(seed, column, row, zero + bh, zero, 7)
    # join puts its two parts on a new last axis: [.., x, y] is word 2 x + y
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    return (word >> 8).to(tl.int32) >= threshold
