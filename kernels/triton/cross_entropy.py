"""Cross-entropy of logits rows against one target each, forward, backward, and both in place.

    m     = max_v x[v]    l = sum_v exp(x[v] - m)
    loss  = log(l) + (m - x[target])
    dx[v] = (exp(x[v] - m) / l - [v = target]) dloss

Label smoothing e puts (1 - e) [v = target] + e / V in place of [v = target], and so in the loss
(1 - e) x[target] + e mean(x) in place of x[target].

One program owns a row, reads it once with an online maximum and sum, and keeps these two numbers;
the softmax is never stored. lse = m + log(l) as one number would round away the digits of log(l)
where logits are large. The in-place form overwrites the row with its gradient while it is still in
cache: kernels/linear_cross_entropy.py gives it a chunk of logits that nobody else sees.

Targets index memory that may change after they were validated. No address depends on one outside
[0, V); its row's loss and gradient are NaN.

    N rows   V vocabulary   BLOCK_V logits read per step
"""

import torch
import triton
import triton.language as tl

from .lang import LN2, LOG2E, NEG_INF
from .tiles import cross_entropy_config


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,                        # (N, V), contiguous in V; with GRAD its gradient, in place
    targets_ptr,                       # (N,), int64
    losses_ptr,                        # (N,), float32; 0 where the target is ignored
    m_ptr, l_ptr,                      # (N,), float32, out
    stride_row, V, V_padded, ignore_index, smoothing,
    BLOCK_V: tl.constexpr, GRAD: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """A row carries m = max x and l = sum exp(x - m) across its blocks; to smooth, sum x too."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index

    m = NEG_INF
    l = 0.0
    total = 0.0
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + offs, mask=offs < V, other=NEG_INF).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # a block of -inf so far: exp gives 0
        l = l * tl.exp2((m - shift) * LOG2E) + tl.sum(tl.exp2((x - shift) * LOG2E), axis=0)
        m = m_new
        if SMOOTH:
            total += tl.sum(tl.where(offs < V, x, 0.0), axis=0)
    inside = (target >= 0) & (target < V)
    x_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(m_ptr + row, m)
    tl.store(l_ptr + row, l)
    loss = tl.log2(l) * LN2 + (m - x_target)
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing * (tl.log2(l) * LN2 + (m - total / V))
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))

    if GRAD:
        # Every lane reads its logits before it overwrites them; the barrier keeps the store from
        # passing another lane's read of x[target].
        tl.debug_barrier()
        dloss = tl.where(inside, 1.0, float("nan"))
        _store_gradient(
            logits_ptr, logits_ptr, target, counts, m, l, dloss, V, V_padded, smoothing,
            BLOCK_V, SMOOTH,
        )  # fmt: skip


@triton.jit
def _cross_entropy_bwd_kernel(
    dlosses_ptr, stride_dlosses,       # (N,), float32
    logits_ptr,                        # (N, V), contiguous in V
    targets_ptr, m_ptr, l_ptr,         # (N,)
    dlogits_ptr,                       # (N, V), contiguous in V; may be logits_ptr
    stride_row, stride_drow, V, ignore_index, smoothing,
    BLOCK_V: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    m = tl.load(m_ptr + row)
    l = tl.load(l_ptr + row)
    dloss = tl.load(dlosses_ptr + row * stride_dlosses)
    dloss = tl.where((target >= 0) & (target < V), dloss, float("nan"))
    _store_gradient(
        logits_ptr + row * stride_row, dlogits_ptr + row * stride_drow,
        target, target != ignore_index, m, l, dloss, V, V, smoothing, BLOCK_V, SMOOTH,
    )  # fmt: skip


@triton.jit
def _store_gradient(
    logits_ptr, dlogits_ptr, target, counts, m, l, dloss, V, V_padded, smoothing,
    BLOCK_V: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """dx = (softmax - onehot) dloss, 0 in an ignored row and in the columns that pad V."""
    scale = 1.0 / l
    for start in range(0, V_padded, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + offs, mask=offs < V, other=NEG_INF).to(tl.float32)
        p = tl.exp2((x - m) * LOG2E) * scale
        if SMOOTH:
            p -= smoothing / V
            dx = tl.where(offs == target, p - (1.0 - smoothing), p) * dloss
        else:
            dx = tl.where(offs == target, p - 1.0, p) * dloss
        dx = tl.where(counts & (offs < V), dx, 0.0)
        tl.store(dlogits_ptr + offs, dx.to(dlogits_ptr.dtype.element_ty), mask=offs < V_padded)


def cross_entropy_fwd(logits, targets, ignore_index, smoothing):
    """losses (N,) and stats (2, N), m and l, float32; logits (N, V), targets (N,)."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return _forward(logits, targets, ignore_index, smoothing, logits.shape[1], grad=False)


def cross_entropy_fwd_bwd_(logits, targets, ignore_index, smoothing, V):
    """losses (N,) float32; overwrites logits (N, V_padded) with d losses / d logits, 0 beyond V."""
    return _forward(logits, targets, ignore_index, smoothing, V, grad=True)[0]


def cross_entropy_bwd(dlosses, logits, targets, stats, ignore_index, smoothing):
    """dlogits (N, V), contiguous."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return _backward(dlosses, logits, targets, stats, ignore_index, smoothing, dlogits)


def cross_entropy_bwd_(dlosses, logits, targets, stats, ignore_index, smoothing):
    """The same, written over logits."""
    _backward(dlosses, logits, targets, stats, ignore_index, smoothing, logits)


def _forward(logits, targets, ignore_index, smoothing, V, grad):
    N = logits.shape[0]
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    stats = torch.empty((2, N), dtype=torch.float32, device=logits.device)
    if N > 0:
        _cross_entropy_fwd_kernel[(N,)](
            logits, targets, losses, *stats,
            logits.stride(0), V, logits.shape[1], ignore_index, smoothing,
            GRAD=grad, SMOOTH=smoothing > 0,
            **cross_entropy_config("fwd_bwd" if grad or smoothing else "fwd")._asdict(),
        )  # fmt: skip
    return losses, stats


def _backward(dlosses, logits, targets, stats, ignore_index, smoothing, dlogits):
    N, V = logits.shape
    if N > 0:
        _cross_entropy_bwd_kernel[(N,)](
            dlosses, dlosses.stride(0), logits, targets, *stats, dlogits,
            logits.stride(0), dlogits.stride(0), V, ignore_index, smoothing,
            SMOOTH=smoothing > 0, **cross_entropy_config("bwd")._asdict(),
        )  # fmt: skip
    return dlogits
