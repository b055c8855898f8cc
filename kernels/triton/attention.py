"""Fused causal attention with an online softmax, forward and backward.

    s[i, j] = scale * q[i] . k[j]  for j <= i + Tk - Tq      o[i] = sum_j softmax(s[i])[j] v[j]

The score matrix lives only as tiles in registers; what the backward needs of it is one number per
row, lse[i] = log sum_j exp(s[i, j]). All exponentials are powers of two: log2(e) is folded into
the scale. A program owns one tile of rows and visits only the tiles that the diagonal leaves
visible, first those wholly in the past, unmasked, then the few that the diagonal crosses. The
derivation, with the backward's, is in docs/attention.md.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size   bh = b * H + h
"""

import torch
import triton
import triton.language as tl

from .configs import attention_config, input_precision
from .lang import LN2, LOG2E, LOWEST, NEG_INF, dropout_keep, load_rows, store_rows


@triton.jit
def _attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr,               # (B, T, H, D), contiguous in D
    o_ptr,                             # (B, Tq, H, D), contiguous
    lse_ptr,                           # (B, H, Tq), float32, natural log
    seed_ptr,                          # (1,), int64; unread without dropout
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    H, Tq, Tk,
    scale_log2,                        # softmax_scale * log2(e)
    dropout_threshold, dropout_scale,  # keep where 24 random bits >= threshold; 1 / (1 - p)
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
    tiles = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // tiles
    # Heavy rows first: what a wave of programs leaves to the end is light.
    start_m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += (b * Tq * H + h) * D

    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, stride_qt, Tq, D, BLOCK_D, True)
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    past_end, end = _visible_keys(start_m, Tq, Tk, BLOCK_M, BLOCK_N)
    for DIAGONAL in tl.static_range(2):
        for start_n in range(past_end if DIAGONAL else 0, end if DIAGONAL else past_end, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            # s = q k^T
            k = load_rows(k_ptr, offs_n, stride_kt, Tk, D, BLOCK_D, DIAGONAL == 1)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
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
                keep = dropout_keep(seed, bh, offs_m, start_n, BLOCK_N, dropout_threshold)
                p = tl.where(keep, p, 0.0)
            # acc = alpha acc + p v
            v = load_rows(v_ptr, offs_n, stride_vt, Tk, D, BLOCK_D, DIAGONAL == 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    if DROPOUT:
        acc *= dropout_scale
    store_rows(o_ptr, acc / l[:, None], offs_m, H * D, Tq, D, BLOCK_D)
    lse = (m * scale_log2 + tl.log2(l)) * LN2
    tl.store(lse_ptr + bh.to(tl.int64) * Tq + offs_m, lse, mask=offs_m < Tq)


@triton.jit
def _attn_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr,       # (B, T, H, D), contiguous in D
    o_ptr, lse_ptr,                    # as the forward left them
    dq_ptr,                            # (B, Tq, H, D), contiguous in D
    delta_ptr,                         # (B, H, Tq), float32, out: the dk dv pass reads it
    seed_ptr,
    stride_dob, stride_dot, stride_doh,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_dqb, stride_dqt, stride_dqh,
    H, Tq, Tk,
    scale, scale_log2, dropout_threshold, dropout_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of query rows against the keys they see, in the forward's order. With p from lse,

    delta = rowsum(o * do)    dp = do v^T    ds = p * (dp - delta)    dq = scale sum_j ds k
    """
    tiles = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // tiles
    start_m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    do_ptr += b * stride_dob + h * stride_doh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += (b * Tq * H + h) * D
    dq_ptr += b * stride_dqb + h * stride_dqh

    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, offs_m, stride_qt, Tq, D, BLOCK_D, True)
    do = load_rows(do_ptr, offs_m, stride_dot, Tq, D, BLOCK_D, True)
    o = load_rows(o_ptr, offs_m, H * D, Tq, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    row_ptrs = bh.to(tl.int64) * Tq + offs_m
    tl.store(delta_ptr + row_ptrs, delta, mask=offs_m < Tq)
    lse_log2 = tl.load(lse_ptr + row_ptrs, mask=offs_m < Tq, other=0.0) * LOG2E
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    past_end, end = _visible_keys(start_m, Tq, Tk, BLOCK_M, BLOCK_N)
    for DIAGONAL in tl.static_range(2):
        for start_n in range(past_end if DIAGONAL else 0, end if DIAGONAL else past_end, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            # p = exp(scale q k^T - lse)
            k = load_rows(k_ptr, offs_n, stride_kt, Tk, D, BLOCK_D, DIAGONAL == 1)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(s * scale_log2 - lse_log2[:, None])
            if DIAGONAL:
                p = tl.where(offs_n[None, :] <= offs_m[:, None] + (Tk - Tq), p, 0.0)
            # ds = p * (do v^T - delta)
            v = load_rows(v_ptr, offs_n, stride_vt, Tk, D, BLOCK_D, DIAGONAL == 1)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = dropout_keep(seed, bh, offs_m, start_n, BLOCK_N, dropout_threshold)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            ds = p * (dp - delta[:, None])
            # dq += ds k
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    store_rows(dq_ptr, dq * scale, offs_m, stride_dqt, Tq, D, BLOCK_D)


@triton.jit
def _attn_bwd_dkdv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr,       # (B, T, H, D), contiguous in D
    lse_ptr, delta_ptr,                # (B, H, Tq), float32
    dk_ptr, dv_ptr,                    # (B, Tk, H, D), contiguous in D
    seed_ptr,
    stride_dob, stride_dot, stride_doh,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_dkb, stride_dkt, stride_dkh,
    stride_dvb, stride_dvt, stride_dvh,
    H, Tq, Tk,
    scale, scale_log2, dropout_threshold, dropout_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,             # query rows read per step
    BLOCK_N: tl.constexpr,             # key rows owned by this program
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of key rows against the queries that see them, tiles transposed: (keys, queries).

        dv = sum_i p^T do    ds = p * (dp - delta)    dk = scale sum_i ds^T q

    k q^T is computed as such; transposing q k^T afterwards has given wrong code on Hopper.
    """
    tiles = tl.cdiv(Tk, BLOCK_N)
    bh = tl.program_id(0) // tiles
    start_n = (tl.program_id(0) % tiles) * BLOCK_N  # early keys, seen by most, come first
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    do_ptr += b * stride_dob + h * stride_doh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh
    lse_ptr += bh.to(tl.int64) * Tq
    delta_ptr += bh.to(tl.int64) * Tq

    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, stride_kt, Tk, D, BLOCK_D, True)
    v = load_rows(v_ptr, offs_n, stride_vt, Tk, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    seed = tl.load(seed_ptr) if DROPOUT else 0

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
            q = load_rows(q_ptr, offs_m, stride_qt, Tq, D, BLOCK_D, True)
            lse_log2 = tl.load(lse_ptr + offs_m, mask=offs_m < Tq, other=0.0) * LOG2E
            s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            p_t = tl.exp2(s_t * scale_log2 - lse_log2[None, :])
            if not PAST:
                p_t = tl.where(offs_n[:, None] <= offs_m[None, :] + (Tk - Tq), p_t, 0.0)
            # dv += p^T do
            do = load_rows(do_ptr, offs_m, stride_dot, Tq, D, BLOCK_D, True)
            if DROPOUT:
                keep = dropout_keep(seed, bh, offs_m, start_n, BLOCK_N, dropout_threshold)
                keep_t = tl.trans(keep)
                dropped_t = tl.where(keep_t, p_t * dropout_scale, 0.0)
            else:
                dropped_t = p_t
            dv = tl.dot(dropped_t.to(do.dtype), do, dv, input_precision=PRECISION)
            # ds^T = p^T * (v do^T - delta)
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < Tq, other=0.0)
            dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            if DROPOUT:
                dp_t = tl.where(keep_t, dp_t * dropout_scale, 0.0)
            ds_t = p_t * (dp_t - delta[None, :])
            # dk += ds^T q
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)

    store_rows(dk_ptr, dk * scale, offs_n, stride_dkt, Tk, D, BLOCK_D)
    store_rows(dv_ptr, dv, offs_n, stride_dvt, Tk, D, BLOCK_D)


@triton.jit
def _visible_keys(start_m, Tq, Tk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(past_end, end): tiles below past_end are visible to every row of ours, below end to some."""
    first_seen = start_m + 1 + Tk - Tq  # keys that the first row sees
    return first_seen // BLOCK_N * BLOCK_N, tl.minimum(first_seen - 1 + BLOCK_M, Tk)


def attention_fwd(q, k, v, softmax_scale, dropout_p, seed):
    """o (B, Tq, H, D) contiguous, in q's dtype; lse (B, H, Tq) float32."""
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    tile = attention_config("fwd", D, q.dtype, dropout_p > 0.0, q.device)
    _attn_fwd_kernel[(B * H * triton.cdiv(Tq, tile.BLOCK_M),)](
        q, k, v, o, lse, lse if seed is None else seed,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H, Tq, Tk,
        softmax_scale * LOG2E.value, *_dropout_args(dropout_p),
        **_constants(q, tile, dropout_p),
    )  # fmt: skip
    return o, lse


def attention_bwd(do, q, k, v, o, lse, softmax_scale, dropout_p, seed):
    """dq, dk, dv, contiguous, in the dtype and shape of q, k, v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _attention_bwd(do, q, k, v, o, lse, dq, dk, dv, softmax_scale, dropout_p, seed)
    return dq, dk, dv


def attention_qkv_fwd(qkv, n_head, softmax_scale, dropout_p, seed):
    """o (B, T, C) and lse (B, H, T); the kernel reads qkv (B, T, 3C) through its strides."""
    o, lse = attention_fwd(*_split_qkv(qkv, n_head), softmax_scale, dropout_p, seed)
    return o.flatten(2), lse


def attention_qkv_bwd(do, qkv, o, lse, n_head, softmax_scale, dropout_p, seed):
    """dqkv (B, T, 3C), contiguous: each pass writes its part of the one packed gradient."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    do, o = (x.unflatten(-1, (n_head, -1)) for x in (do, o))
    inputs, gradients = _split_qkv(qkv, n_head), _split_qkv(dqkv, n_head)
    _attention_bwd(do, *inputs, o, lse, *gradients, softmax_scale, dropout_p, seed)
    return dqkv


def _attention_bwd(do, q, k, v, o, lse, dq, dk, dv, softmax_scale, dropout_p, seed):
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    if dk.numel() == 0:
        return
    do, q, k, v = _rows(do), _rows(q), _rows(k), _rows(v)
    delta = torch.empty_like(lse)
    seed_arg = lse if seed is None else seed
    strides = [s for x in (do, q, k, v) for s in x.stride()[:3]]
    # scale_log2 is the forward's to the last bit: lse and the scores it is subtracted from agree.
    scale_log2 = softmax_scale * LOG2E.value
    scalars = (H, Tq, Tk, softmax_scale, scale_log2, *_dropout_args(dropout_p))
    if Tq > 0:
        tile = attention_config("bwd_dq", D, q.dtype, dropout_p > 0.0, q.device)
        _attn_bwd_dq_kernel[(B * H * triton.cdiv(Tq, tile.BLOCK_M),)](
            do, q, k, v, o, lse, dq, delta, seed_arg, *strides, *dq.stride()[:3], *scalars,
            **_constants(q, tile, dropout_p),
        )  # fmt: skip
    tile = attention_config("bwd_dkdv", D, q.dtype, dropout_p > 0.0, q.device)
    _attn_bwd_dkdv_kernel[(B * H * triton.cdiv(Tk, tile.BLOCK_N),)](
        do, q, k, v, lse, delta, dk, dv, seed_arg,
        *strides, *dk.stride()[:3], *dv.stride()[:3], *scalars,
        **_constants(q, tile, dropout_p),
    )  # fmt: skip


def _rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _split_qkv(qkv, n_head):
    return _rows(qkv).unflatten(-1, (3, n_head, -1)).unbind(2)  # views (B, T, H, D)


def _dropout_args(p):
    return round(p * 2**24), 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _constants(q, tile, dropout_p):
    D = q.shape[-1]
    return dict(
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        DROPOUT=dropout_p > 0.0,
        PRECISION=input_precision(q.dtype),
        **tile._asdict(),
    )
