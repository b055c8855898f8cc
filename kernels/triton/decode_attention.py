"""Attention of one new token per sequence over a cache, split over its keys.

    o = softmax(scale q k^T over the first lengths[b] keys) v

One query against one head's keys is a pass over memory with little else: a program per head would
leave most of the GPU idle. So a program takes SPLIT keys and leaves

    m = max_j s[j]      l = sum_j exp(scale (s[j] - m))      acc = sum_j exp(scale (s[j] - m)) v[j]

and a second kernel adds the splits of a head in their order, each scaled by exp(scale (m_i - m)).
Where splits begin depends on nothing but the position: a row has the same bits in any batch and in
a cache of any size. The grid covers the whole cache, splits beyond a length return at once, and
nothing about the lengths is known on the host: a CUDA graph replays it for every token.

    B batch   T rows of the cache   H heads   D head size   bh = b * H + h
"""

import torch
import triton
import triton.language as tl

from .attention import _rows, view_of
from .lang import LOG2E, LOWEST, NEG_INF, head_of, load_rows
from .launch import launch
from .tiles import DECODE_BLOCK_N, DECODE_SPLIT, DECODE_WARPS, cdiv, next_power_of_2


@triton.jit
def _decode_attention_kernel(
    q,                                 # View (B, 1, H, D)
    k, v,                              # Views (B, T, H, D)
    acc_ptr,                           # (B * H, splits, D), float32
    stats_ptr,                         # (B * H, splits, 2), float32: m, l
    lengths_ptr,                       # (B,), int64
    T, H, splits,
    scale_log2,                        # softmax_scale * log2(e)
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,             # keys read per step
    SPLIT: tl.constexpr,               # keys owned by this program
):  # fmt: skip
    """One split of one head: m, l and acc of its keys, by the online softmax."""
    at = tl.program_id(0).to(tl.int64)
    split, bh = at % splits, at // splits
    b, h = bh // H, bh % H
    length = tl.load(lengths_ptr + b)
    length = tl.where(length <= T, length, 0)  # no address depends on one outside the cache
    if split * SPLIT >= length:
        return
    offs_d = tl.arange(0, BLOCK_D)
    q_row = tl.load(head_of(q, b, h) + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    k_ptr, v_ptr = head_of(k, b, h), head_of(v, b, h)

    m = tl.full((), LOWEST, tl.float32)
    l = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    end = tl.minimum((split + 1) * SPLIT, length)
    for start in range(split * SPLIT, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        # s = q k^T
        k_tile = load_rows(k_ptr, offs_n, k.stride_t, end, D, BLOCK_D, True)
        s = tl.sum(q_row[None, :] * k_tile.to(tl.float32), axis=1)
        s = tl.where(offs_n < end, s, NEG_INF)
        m_new = tl.maximum(m, tl.max(s, axis=0))
        p = tl.exp2((s - m_new) * scale_log2)
        alpha = tl.exp2((m - m_new) * scale_log2)
        l = l * alpha + tl.sum(p, axis=0)
        m = m_new
        # acc = acc alpha + p v
        v_tile = load_rows(v_ptr, offs_n, v.stride_t, end, D, BLOCK_D, True)
        acc = acc * alpha + tl.sum(p[:, None] * v_tile.to(tl.float32), axis=0)

    tl.store(acc_ptr + at * D + offs_d, acc, mask=offs_d < D)
    tl.store(stats_ptr + 2 * at, m)
    tl.store(stats_ptr + 2 * at + 1, l)


@triton.jit
def _decode_attention_sum_kernel(
    acc_ptr, stats_ptr, lengths_ptr,   # as above
    o_ptr,                             # (B * H, D)
    T, H, splits, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """o = sum_i a_i acc_i / sum_i a_i l_i, carried as the online softmax carries tiles; zeros
    where a sequence has no keys, NaN for a length outside the cache."""
    bh = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + bh // H)
    inside = (length >= 0) & (length <= T)
    used = tl.cdiv(tl.where(inside, length, 0), SPLIT)
    offs_d = tl.arange(0, BLOCK_D)
    m = tl.full((), LOWEST, tl.float32)
    l = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(0, used):
        at = bh * splits + split
        m_i = tl.load(stats_ptr + 2 * at)
        l_i = tl.load(stats_ptr + 2 * at + 1)
        acc_i = tl.load(acc_ptr + at * D + offs_d, mask=offs_d < D, other=0.0)
        m_new = tl.maximum(m, m_i)
        alpha, beta = tl.exp2((m - m_new) * scale_log2), tl.exp2((m_i - m_new) * scale_log2)
        l = l * alpha + l_i * beta
        acc = acc * alpha + acc_i * beta
        m = m_new
    o = tl.where(used > 0, acc / l, tl.where(inside, 0.0, float("nan")))
    tl.store(o_ptr + bh * D + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < D)


def decode_attention(q, k_cache, v_cache, lengths, softmax_scale):
    """o (B, 1, H, D) contiguous, in q's dtype."""
    (B, _, H, D), T = q.shape, k_cache.shape[1]
    q, k, v = _rows(q), _rows(k_cache), _rows(v_cache)
    o = torch.empty((B, 1, H, D), dtype=q.dtype, device=q.device)
    splits = cdiv(T, DECODE_SPLIT)
    acc = torch.empty((B * H, splits, D), dtype=torch.float32, device=q.device)
    stats = torch.empty((B * H, splits, 2), dtype=torch.float32, device=q.device)
    lengths = lengths.contiguous()
    scale_log2 = softmax_scale * LOG2E.value
    block = {"D": D, "BLOCK_D": max(16, next_power_of_2(D)), "SPLIT": DECODE_SPLIT}
    if acc.numel():
        launch(
            _decode_attention_kernel, (B * H * splits, 1, 1),
            view_of(q), view_of(k), view_of(v), acc, stats, lengths, T, H, splits, scale_log2,
            **block, BLOCK_N=DECODE_BLOCK_N, num_warps=DECODE_WARPS,
        )  # fmt: skip
    if o.numel():
        launch(
            _decode_attention_sum_kernel, (B * H, 1, 1),
            acc, stats, lengths, o, T, H, splits, scale_log2, **block, num_warps=1,
        )  # fmt: skip
    return o
