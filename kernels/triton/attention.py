"""Fused causal attention with an online softmax, forward and backward.

    s[i, j] = scale * q[i] . k[j]  for j <= i + Tk - Tq      o[i] = sum_j softmax(s[i])[j] v[j]

The score matrix lives only as tiles in registers; what the backward needs of it is one number per
row, lse[i] = log sum_j exp(s[i, j]). All exponentials are powers of two: log2(e) is folded into
the scale. A program owns one tile of rows and visits only the tiles that the diagonal leaves
visible, first those wholly in the past, unmasked, then the few that the diagonal crosses. The
derivation, with the backward's, is in docs/attention.md.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size   bh = b * H + h
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .lang import (
    LN2,
    LOG2E,
    LOWEST,
    NEG_INF,
    View,
    dropout_keep,
    head_of,
    load_rows,
    store_rows,
)
from .launch import launch
from .partial import sum_partial
from .tiles import attention_config, cdiv, input_precision, next_power_of_2


class Scores(NamedTuple):
    """What every kernel knows of the scores s = q k^T and of their dropout."""

    seed_ptr: object  # (1,), int64; unread without dropout
    H: int
    Tq: int
    Tk: int
    scale: float
    scale_log2: float  # scale * log2(e)
    dropout_threshold: int  # keep where 24 random bits >= threshold
    dropout_scale: float  # 1 / (1 - p)


@triton.jit
def _attn_fwd_kernel(
    q, k, v,                           # Views (B, T, H, D)
    o_ptr,                             # (B, Tq, H, D), contiguous
    lse_ptr,                           # (B, H, Tq), float32, natural log
    scores,                            # Scores
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,             # query rows owned by this program
    BLOCK_N: tl.constexpr,             # key rows read per step
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass over the keys. With s the unscaled product and e(x) = exp(scale x), a query row
    carries across key tiles

        m = max_j s[i, j]    l = sum_j e(s[i, j] - m)    acc = sum_j e(s[i, j] - m) v[j]

    A tile that raises m scales the old l and acc by alpha = e(m_old - m_new).
    At the end o = acc / l and lse = scale m + log(l).
    """
    H, Tq, Tk, scale_log2 = scores.H, scores.Tq, scores.Tk, scores.scale_log2
    bh, b, h, start_m, past_end, end = _owned_queries(scores, BLOCK_M, BLOCK_N)
    q_ptr, k_ptr, v_ptr = head_of(q, b, h), head_of(k, b, h), head_of(v, b, h)
    o_ptr += (b * Tq * H + h) * D

    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q_ptr, offs_m, q.stride_t, Tq, D, BLOCK_D, True)
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    seed = tl.load(scores.seed_ptr) if DROPOUT else 0

    for DIAGONAL in tl.static_range(2):
        for start_n in range(past_end if DIAGONAL else 0, end if DIAGONAL else past_end, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            # s = q k^T
            k_tile = load_rows(k_ptr, offs_n, k.stride_t, Tk, D, BLOCK_D, DIAGONAL == 1)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if DIAGONAL:
                s = tl.where(offs_n[None, :] <= offs_m[:, None] + (Tk - Tq), s, NEG_INF)
            # p = exp(s - m). Subtracting before scaling is exact at the maximum; a fused
            # s * scale - m is not, and overflows where scores are huge.
            m_new = tl.maximum(m, tl.max(s, axis=1))
            p = tl.exp2((s - m_new[:, None]) * scale_log2)
            alpha = tl.exp2((m - m_new) * scale_log2)
            l = l * alpha + tl.sum(p, axis=1)
            m = m_new
            if DROPOUT:
                keep = dropout_keep(seed, bh, offs_m, start_n, BLOCK_N, scores.dropout_threshold)
                p = tl.where(keep, p, 0.0)
            # acc = alpha acc + p v
            v_tile = load_rows(v_ptr, offs_n, v.stride_t, Tk, D, BLOCK_D, DIAGONAL == 1)
            p = p.to(v_tile.dtype)
            acc = tl.dot(p, v_tile, acc * alpha[:, None], input_precision=PRECISION)

    if DROPOUT:
        acc *= scores.dropout_scale
    store_rows(o_ptr, acc / l[:, None], offs_m, H * D, Tq, D, BLOCK_D)
    lse = (m * scale_log2 + tl.log2(l)) * LN2
    tl.store(lse_ptr + bh.to(tl.int64) * Tq + offs_m, lse, mask=offs_m < Tq)


@triton.jit
def _attn_bwd_dq_kernel(
    do, q, k, v,                       # Views (B, T, H, D)
    o_ptr, lse_ptr,                    # as the forward left them
    dq,                                # View (B, Tq, H, D)
    delta_ptr,                         # (B, H, Tq), float32, out: the dk dv pass reads it
    sums_ptr,                          # (B tiles, H, D), float32: the sum of each dq tile; or None
    scores,                            # Scores
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of query rows against the keys they see, in the forward's order. With p from lse,

    delta = rowsum(o * do)    dp = do v^T    ds = p * (dp - delta)    dq = scale sum_j ds k
    """
    H, Tq, Tk = scores.H, scores.Tq, scores.Tk
    bh, b, h, start_m, past_end, end = _owned_queries(scores, BLOCK_M, BLOCK_N)
    do_ptr, q_ptr = head_of(do, b, h), head_of(q, b, h)
    k_ptr, v_ptr = head_of(k, b, h), head_of(v, b, h)
    o_ptr += (b * Tq * H + h) * D

    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q_ptr, offs_m, q.stride_t, Tq, D, BLOCK_D, True)
    do_tile = load_rows(do_ptr, offs_m, do.stride_t, Tq, D, BLOCK_D, True)
    o_tile = load_rows(o_ptr, offs_m, H * D, Tq, D, BLOCK_D, True)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), axis=1)
    row_ptrs = bh.to(tl.int64) * Tq + offs_m
    tl.store(delta_ptr + row_ptrs, delta, mask=offs_m < Tq)
    lse_log2 = tl.load(lse_ptr + row_ptrs, mask=offs_m < Tq, other=0.0) * LOG2E
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    seed = tl.load(scores.seed_ptr) if DROPOUT else 0

    for DIAGONAL in tl.static_range(2):
        for start_n in range(past_end if DIAGONAL else 0, end if DIAGONAL else past_end, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            # p = exp(scale q k^T - lse)
            k_tile = load_rows(k_ptr, offs_n, k.stride_t, Tk, D, BLOCK_D, DIAGONAL == 1)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            p = tl.exp2(s * scores.scale_log2 - lse_log2[:, None])
            if DIAGONAL:
                p = tl.where(offs_n[None, :] <= offs_m[:, None] + (Tk - Tq), p, 0.0)
            # ds = p * (do v^T - delta)
            v_tile = load_rows(v_ptr, offs_n, v.stride_t, Tk, D, BLOCK_D, DIAGONAL == 1)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
            if DROPOUT:
                keep = dropout_keep(seed, bh, offs_m, start_n, BLOCK_N, scores.dropout_threshold)
                dp = tl.where(keep, dp * scores.dropout_scale, 0.0)
            ds = p * (dp - delta[:, None])
            # dq += ds k
            dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)

    dq_tile *= scores.scale
    store_rows(head_of(dq, b, h), dq_tile, offs_m, dq.stride_t, Tq, D, BLOCK_D)
    if sums_ptr is not None:
        row = b * tl.cdiv(Tq, BLOCK_M) + start_m // BLOCK_M
        _store_sum(sums_ptr, dq_tile, row * H + h, D, BLOCK_D)


@triton.jit
def _attn_bwd_dkdv_kernel(
    do, q, k, v,                       # Views (B, T, H, D)
    lse_ptr, delta_ptr,                # (B, H, Tq), float32
    dk, dv,                            # Views (B, Tk, H, D)
    sums_ptr,                          # (2, B tiles, H, D), float32: the same of dk, dv; or None
    scores,                            # Scores
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,             # query rows read per step
    BLOCK_N: tl.constexpr,             # key rows owned by this program
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of key rows against the queries that see them, tiles transposed: (keys, queries).

        dv = sum_i p^T do    ds = p * (dp - delta)    dk = scale sum_i ds^T q

    k q^T is computed as such; transposing q k^T afterwards has given wrong code on Hopper.
    """
    H, Tq, Tk = scores.H, scores.Tq, scores.Tk
    tiles = tl.cdiv(Tk, BLOCK_N)
    bh = tl.program_id(0) // tiles
    start_n = (tl.program_id(0) % tiles) * BLOCK_N  # early keys, seen by most, come first
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    do_ptr, q_ptr = head_of(do, b, h), head_of(q, b, h)
    k_ptr, v_ptr = head_of(k, b, h), head_of(v, b, h)
    lse_ptr += bh.to(tl.int64) * Tq
    delta_ptr += bh.to(tl.int64) * Tq

    offs_n = start_n + tl.arange(0, BLOCK_N)
    k_tile = load_rows(k_ptr, offs_n, k.stride_t, Tk, D, BLOCK_D, True)
    v_tile = load_rows(v_ptr, offs_n, v.stride_t, Tk, D, BLOCK_D, True)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    seed = tl.load(scores.seed_ptr) if DROPOUT else 0

    # Row i sees key j from i = j - (Tk - Tq) on: the first tile that sees any key of ours, and
    # the first that sees them all.
    start = tl.maximum(start_n - (Tk - Tq), 0) // BLOCK_M * BLOCK_M
    past_start = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M) * BLOCK_M
    past_start = tl.minimum(past_start, Tq)
    for PAST in tl.static_range(2):
        for start_m in range(past_start if PAST else start, Tq if PAST else past_start, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            # p^T = exp(scale k q^T - lse). Rows past the end read q = do = lse = delta = 0, and
            # add nothing.
            q_tile = load_rows(q_ptr, offs_m, q.stride_t, Tq, D, BLOCK_D, True)
            lse_log2 = tl.load(lse_ptr + offs_m, mask=offs_m < Tq, other=0.0) * LOG2E
            s_t = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            p_t = tl.exp2(s_t * scores.scale_log2 - lse_log2[None, :])
            if not PAST:
                p_t = tl.where(offs_n[:, None] <= offs_m[None, :] + (Tk - Tq), p_t, 0.0)
            # dv += p^T do
            do_tile = load_rows(do_ptr, offs_m, do.stride_t, Tq, D, BLOCK_D, True)
            if DROPOUT:
                keep = dropout_keep(seed, bh, offs_m, start_n, BLOCK_N, scores.dropout_threshold)
                keep_t = tl.trans(keep)
                dropped_t = tl.where(keep_t, p_t * scores.dropout_scale, 0.0)
            else:
                dropped_t = p_t
            dropped_t = dropped_t.to(do_tile.dtype)
            dv_tile = tl.dot(dropped_t, do_tile, dv_tile, input_precision=PRECISION)
            # ds^T = p^T * (v do^T - delta)
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < Tq, other=0.0)
            dp_t = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            if DROPOUT:
                dp_t = tl.where(keep_t, dp_t * scores.dropout_scale, 0.0)
            ds_t = p_t * (dp_t - delta[None, :])
            # dk += ds^T q
            dk_tile = tl.dot(ds_t.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)

    dk_tile *= scores.scale
    store_rows(head_of(dk, b, h), dk_tile, offs_n, dk.stride_t, Tk, D, BLOCK_D)
    store_rows(head_of(dv, b, h), dv_tile, offs_n, dv.stride_t, Tk, D, BLOCK_D)
    if sums_ptr is not None:  # rows past Tk are 0: no query sees them
        row = b * tiles + tl.program_id(0) % tiles
        _store_sum(sums_ptr, dk_tile, row * H + h, D, BLOCK_D)
        past_dk = tl.num_programs(0).to(tl.int64) * D
        _store_sum(sums_ptr + past_dk, dv_tile, row * H + h, D, BLOCK_D)


@triton.jit
def _store_sum(sums_ptr, tile, at, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of a tile's rows, as row `at` of D."""
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(sums_ptr + at * D + offs_d, tl.sum(tile, axis=0), mask=offs_d < D)


@triton.jit
def _owned_queries(scores, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(bh, b, h, start_m, past_end, end): a program's head, its first query, and the keys that its
    queries see. Key tiles below past_end are visible to every query, those below end to some."""
    tiles = tl.cdiv(scores.Tq, BLOCK_M)
    bh = tl.program_id(0) // tiles
    # Heavy rows first: what a wave of programs leaves to the end is light.
    start_m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (bh // scores.H).to(tl.int64), (bh % scores.H).to(tl.int64)
    first_seen = start_m + 1 + scores.Tk - scores.Tq  # keys that the first row sees
    past_end = first_seen // BLOCK_N * BLOCK_N
    end = tl.minimum(first_seen - 1 + BLOCK_M, scores.Tk)
    return bh, b, h, start_m, past_end, end


def attention_fwd(q, k, v, softmax_scale, dropout_p, seed):
    """o (B, Tq, H, D) contiguous, in q's dtype; lse (B, H, Tq) float32."""
    B, Tq, H, D = q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = q.new_empty((B, Tq, H, D))
    lse = q.new_empty((B, H, Tq), dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    tile = attention_config("fwd", D, q.dtype, dropout_p > 0.0, q.device)
    launch(
        _attn_fwd_kernel, (B * H * cdiv(Tq, tile.BLOCK_M), 1, 1),
        view_of(q), view_of(k), view_of(v), o, lse,
        _scores(q, k, softmax_scale, dropout_p, lse if seed is None else seed),
        **_constants(q, dropout_p), **tile._asdict(),
    )  # fmt: skip
    return o, lse


def attention_bwd(do, q, k, v, o, lse, softmax_scale, dropout_p, seed):
    """dq, dk, dv, contiguous, in the dtype and shape of q, k, v."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _attention_bwd(do, q, k, v, o, lse, dq, dk, dv, softmax_scale, dropout_p, seed, None)
    return dq, dk, dv


def attention_qkv_fwd(qkv, n_head, softmax_scale, dropout_p, seed):
    """o (B, T, C) and lse (B, H, T); the kernel reads qkv (B, T, 3C) through its strides."""
    o, lse = attention_fwd(*_split_qkv(qkv, n_head), softmax_scale, dropout_p, seed)
    return o.view(*qkv.shape[:2], qkv.shape[2] // 3), lse


def attention_qkv_bwd(do, qkv, o, lse, n_head, softmax_scale, dropout_p, seed, sum_dtype=None):
    """dqkv (B, T, 3C), contiguous: each pass writes its part of the one packed gradient. With
    sum_dtype also its sum over B and T, (3C,): the gradient of the projection's bias."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    heads = *qkv.shape[:2], n_head, qkv.shape[2] // (3 * n_head)
    do, o = _rows(do).view(heads), _rows(o).view(heads)
    inputs, gradients = _split_qkv(qkv, n_head), _split_qkv(dqkv, n_head)
    options = softmax_scale, dropout_p, seed
    if sum_dtype is None:
        _attention_bwd(do, *inputs, o, lse, *gradients, *options, None)
        return dqkv
    total = qkv.new_zeros(qkv.shape[2:], dtype=sum_dtype)
    _attention_bwd(do, *inputs, o, lse, *gradients, *options, total)
    return dqkv, total


def _attention_bwd(do, q, k, v, o, lse, dq, dk, dv, softmax_scale, dropout_p, seed, total):
    """Writes dq, dk and dv, and unless total is None their sums over B and T into it, (3 H D,)."""
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    if dk.numel() == 0:
        return
    delta = torch.empty_like(lse)
    do, q, k, v = _rows(do), _rows(q), _rows(k), _rows(v)
    scores = _scores(q, k, softmax_scale, dropout_p, lse if seed is None else seed)
    inputs = view_of(do), view_of(q), view_of(k), view_of(v)
    C, sums = H * D, None
    constants = _constants(q, dropout_p)
    if Tq > 0:
        tile = attention_config("bwd_dq", D, q.dtype, dropout_p > 0.0, q.device)
        tiles = cdiv(Tq, tile.BLOCK_M)
        if total is not None:
            sums = lse.new_empty((1, B * tiles, C))
        launch(
            _attn_bwd_dq_kernel, (B * H * tiles, 1, 1),
            *inputs, o, lse, view_of(dq), delta, sums, scores,
            **constants, **tile._asdict(),
        )  # fmt: skip
        if total is not None:
            sum_partial(sums, total[:C])
    tile = attention_config("bwd_dkdv", D, q.dtype, dropout_p > 0.0, q.device)
    tiles = cdiv(Tk, tile.BLOCK_N)
    if total is not None:
        sums = lse.new_empty((2, B * tiles, C))
    launch(
        _attn_bwd_dkdv_kernel, (B * H * tiles, 1, 1),
        *inputs, lse, delta, view_of(dk), view_of(dv), sums, scores,
        **constants, **tile._asdict(),
    )  # fmt: skip
    if total is not None:
        sum_partial(sums, total[C:].view(2, C))


def _rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def view_of(x):
    stride_b, stride_t, stride_h, _ = x.stride()
    return View(x, stride_b, stride_t, stride_h)


def _split_qkv(qkv, n_head):
    B, T, C3 = qkv.shape
    return _rows(qkv).view(B, T, 3, n_head, C3 // (3 * n_head)).unbind(2)  # views (B, T, H, D)


def _scores(q, k, softmax_scale, dropout_p, seed):
    # One scale_log2 for both passes, to the last bit: lse and the scores it is subtracted from
    # agree.
    return Scores(
        seed_ptr=seed,
        H=q.shape[2],
        Tq=q.shape[1],
        Tk=k.shape[1],
        scale=softmax_scale,
        scale_log2=softmax_scale * LOG2E.value,
        dropout_threshold=round(dropout_p * 2**24),
        dropout_scale=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
    )


def _constants(q, dropout_p):
    D = q.shape[-1]
    return {
        "D": D,
        "BLOCK_D": next_power_of_2(D),
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": input_precision(q.dtype),
    }
