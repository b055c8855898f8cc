"""Cross-entropy of logits rows against one target each, forward, backward, and both in place.

    m     = max_v x[v]    l = sum_v exp(x[v] - m)
    loss  = log(l) + (m - x[target])
    dx[v] = (exp(x[v] - m) / l - [v = target]) dloss

Label smoothing e puts (1 - e) [v = target] + e / V in place of [v = target], and so in the loss
(1 - e) x[target] + e mean(x) in place of x[target].

One program owns a row and reads it once. Every group of LINE neighbours has an m and an l of its
own, so that no thread asks another before the row ends; the softmax is never stored. lse = m +
log(l) as one number would round away the digits of log(l) where logits are large. The in-place form
overwrites the row with its gradient, reading it again from cache: kernels/linear_cross_entropy.py
gives it a chunk of logits that nobody else sees.

Rows of an odd V begin anywhere. Their whole 16-byte lines are loaded and stored as such; the few
logits before and after are the row's edges.

Targets index memory that may change after they were validated. No address depends on one outside
[0, V); its row's loss and gradient are NaN.

    N rows   V vocabulary   BLOCK_V logits read per step   LINE logits in 16 bytes
"""

import torch
import triton
import triton.language as tl

from .lang import LN2, LOG2E, LOWEST, NEG_INF
from .launch import launch
from .tiles import cross_entropy_config


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,                        # (N, V), contiguous in V; with GRAD its gradient, in place
    targets_ptr,                       # (N,), int64
    losses_ptr,                        # (N,), float32; 0 where the target is ignored
    stats_ptr,                         # (2, N), float32, out: m and l; N programs
    stride_row, V, V_padded, ignore_index, smoothing,
    BLOCK_V: tl.constexpr, LINE: tl.constexpr, GRAD: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """A group carries m = max x and l = sum exp(x - m) across its lines; to smooth, sum x too."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index
    inside = (target >= 0) & (target < V)
    x_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)

    head, size = _whole_lines(logits_ptr, V, LINE)
    offs_edge, mask_edge = _edges(head, size, V, LINE)
    x_edge = tl.load(logits_ptr + offs_edge, mask=mask_edge, other=NEG_INF).to(tl.float32)
    lines_ptr = tl.multiple_of(logits_ptr + head, 16)
    m = tl.full((BLOCK_V // LINE,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_V // LINE,), tl.float32)
    total = tl.zeros((BLOCK_V // LINE,), tl.float32)
    whole = size // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        m, l, total = _add_lines(lines_ptr, start, size, m, l, total, BLOCK_V, LINE, SMOOTH, False)
    m, l, total = _add_lines(lines_ptr, whole, size, m, l, total, BLOCK_V, LINE, SMOOTH, True)

    # The groups and the edges together.
    m_group = m
    m = tl.maximum(tl.max(m_group, axis=0), tl.max(x_edge, axis=0))
    l = tl.sum(l * tl.exp2((m_group - m) * LOG2E), axis=0)
    l += tl.sum(tl.exp2((x_edge - m) * LOG2E), axis=0)
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + tl.num_programs(0) + row, l)
    loss = tl.log2(l) * LN2 + (m - x_target)
    if SMOOTH:
        mean = (tl.sum(total, axis=0) + tl.sum(tl.where(mask_edge, x_edge, 0.0), axis=0)) / V
        loss = (1.0 - smoothing) * loss + smoothing * (tl.log2(l) * LN2 + (m - mean))
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))

    if GRAD:
        dloss = tl.where(inside, 1.0, float("nan"))
        _store_gradient(
            logits_ptr, logits_ptr, target, x_target, counts, m, l, dloss, V, V_padded, smoothing,
            BLOCK_V, LINE, True,
        )  # fmt: skip


@triton.jit
def _cross_entropy_bwd_kernel(
    dlosses_ptr, stride_dlosses,       # (N,), float32
    logits_ptr,                        # (N, V), contiguous in V
    targets_ptr,                       # (N,)
    stats_ptr,                         # (2, N), float32: m and l; N programs
    dlogits_ptr,                       # (N, V), contiguous in V; may be logits_ptr
    stride_row, stride_drow, V, ignore_index, smoothing,
    BLOCK_V: tl.constexpr, LINE: tl.constexpr,
    SAME_LINES: tl.constexpr,          # rows of both begin at the same place of a 16-byte line
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < V)
    x_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    m = tl.load(stats_ptr + row)
    l = tl.load(stats_ptr + tl.num_programs(0) + row)
    dloss = tl.load(dlosses_ptr + row * stride_dlosses)
    dloss = tl.where(inside, dloss, float("nan"))
    _store_gradient(
        logits_ptr, dlogits_ptr + row * stride_drow,
        target, x_target, target != ignore_index, m, l, dloss, V, V, smoothing,
        BLOCK_V, LINE, SAME_LINES,
    )  # fmt: skip


@triton.jit
def _whole_lines(row_ptr, V, LINE: tl.constexpr):
    """(head, size): the row's whole 16-byte lines are its columns [head, head + size)."""
    past_line = (row_ptr.to(tl.int64) // (16 // LINE) % LINE).to(tl.int32)
    head = tl.minimum((LINE - past_line) % LINE, V)
    return head, tl.multiple_of((V - head) // LINE * LINE, LINE)


@triton.jit
def _edges(head, size, V, LINE: tl.constexpr):
    """The fewer than 2 LINE other columns of the row, as offsets and mask: those before, then those
    after its whole lines."""
    lane = tl.arange(0, 2 * LINE)
    after = head + size + lane - LINE
    return tl.where(lane < LINE, lane, after), tl.where(lane < LINE, lane < head, after < V)


@triton.jit
def _line_offsets(start, BLOCK_V: tl.constexpr, LINE: tl.constexpr):
    """A tile (BLOCK_V / LINE, LINE) of offsets from start: a row of it is one line."""
    return (start + tl.arange(0, BLOCK_V // LINE) * LINE)[:, None] + tl.arange(0, LINE)[None, :]


@triton.jit
def _add_lines(
    lines_ptr, start, size, m, l, total,
    BLOCK_V: tl.constexpr, LINE: tl.constexpr, SMOOTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """m, l and sum x of the groups, with BLOCK_V more logits; MASKED: with those below size."""
    offs = _line_offsets(start, BLOCK_V, LINE)
    if MASKED:
        x = tl.load(lines_ptr + offs, mask=offs < size, other=NEG_INF).to(tl.float32)
    else:
        x = tl.load(lines_ptr + offs).to(tl.float32)
    if SMOOTH:
        total += tl.sum(tl.where(offs < size, x, 0.0), axis=1)
    # m begins at a finite number: where all logits are -inf, exp(x - m) is 0.
    m_new = tl.maximum(m, tl.max(x, axis=1))
    l = l * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((x - m_new[:, None]) * LOG2E), axis=1)
    return m_new, l, total


@triton.jit
def _store_gradient(
    logits_ptr, dlogits_ptr, target, x_target, counts, m, l, dloss, V, V_padded, smoothing,
    BLOCK_V: tl.constexpr, LINE: tl.constexpr, SAME_LINES: tl.constexpr,
):  # fmt: skip
    """dx = (softmax - onehot) dloss, 0 in an ignored row and in the columns that pad V."""
    # Without the one-hot, dx = exp(x - m) scale + shift.
    scale = tl.where(counts, dloss / l, 0.0)
    shift = tl.where(counts, -dloss * (smoothing / V), 0.0)
    # In place, every thread has read x[target] by now; the barrier keeps another thread's store
    # from coming first.
    tl.debug_barrier()
    head, size = _whole_lines(logits_ptr, V, LINE)
    offs_edge, mask_edge = _edges(head, size, V, LINE)
    _store_softmax(logits_ptr, dlogits_ptr, offs_edge, mask_edge, counts, m, scale, shift)
    lines_ptr = tl.multiple_of(logits_ptr + head, 16)
    dlines_ptr = dlogits_ptr + head
    if SAME_LINES:
        dlines_ptr = tl.multiple_of(dlines_ptr, 16)
    for start in range(0, size, BLOCK_V):
        offs = _line_offsets(start, BLOCK_V, LINE)
        _store_softmax(lines_ptr, dlines_ptr, offs, offs < size, counts, m, scale, shift)
    for start in range(V, V_padded, 64):  # rarely more than the step
        offs_pad = start + tl.arange(0, 64)
        zeros = tl.zeros((64,), dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + offs_pad, zeros, mask=offs_pad < V_padded)
    # The target's own gradient replaces what its lane has stored.
    tl.debug_barrier()
    dx_target = tl.exp2((x_target - m) * LOG2E) * scale + (shift - (1.0 - smoothing) * dloss)
    stored = counts & (target >= 0) & (target < V)
    tl.store(dlogits_ptr + target, dx_target.to(dlogits_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _store_softmax(logits_ptr, dlogits_ptr, offs, mask, counts, m, scale, shift):
    """exp(x - m) scale + shift. The logits of an ignored row are not read: they may be NaN."""
    x = tl.load(logits_ptr + offs, mask=mask & counts, other=NEG_INF).to(tl.float32)
    dx = tl.exp2((x - m) * LOG2E) * scale + shift
    tl.store(dlogits_ptr + offs, dx.to(dlogits_ptr.dtype.element_ty), mask=mask)


def cross_entropy_fwd(logits, targets, ignore_index, smoothing):
    """losses (N,) and stats (2, N), m and l, float32; logits (N, V), targets (N,)."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return _forward(logits, targets, ignore_index, smoothing, logits.shape[1], grad=False)


def cross_entropy_fwd_bwd_(logits, targets, ignore_index, smoothing, V):
    """losses (N,) float32; overwrites logits (N, V_padded) with d losses / d logits, 0 beyond V."""
    return _forward(logits, targets, ignore_index, smoothing, V, grad=True)[0]


def cross_entropy_bwd(dlosses, logits, targets, stats, ignore_index, smoothing):
    """dlogits (N, V), contiguous, for dlosses (N,), or () if all are equal."""
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
        launch(
            _cross_entropy_fwd_kernel, (N, 1, 1),
            logits, targets, losses, stats,
            logits.stride(0), V, logits.shape[1], ignore_index, float(smoothing),
            LINE=16 // logits.element_size(), GRAD=grad, SMOOTH=smoothing > 0,
            **cross_entropy_config("fwd_bwd" if grad else "fwd")._asdict(),
        )  # fmt: skip
    return losses, stats


def _backward(dlosses, logits, targets, stats, ignore_index, smoothing, dlogits):
    N, V = logits.shape
    if N > 0:
        launch(
            _cross_entropy_bwd_kernel, (N, 1, 1),
            dlosses, dlosses.stride(0) if dlosses.dim() else 0, logits, targets, stats, dlogits,
            logits.stride(0), dlogits.stride(0), V, ignore_index, float(smoothing),
            LINE=16 // logits.element_size(), SAME_LINES=_same_lines(logits, dlogits),
            **cross_entropy_config("bwd")._asdict(),
        )  # fmt: skip
    return dlogits


def _same_lines(a, b):
    """Whether each row of a begins at the same place of a 16-byte line as the row of b."""
    strides = (a.stride(0) - b.stride(0)) * a.element_size()
    return (a.data_ptr() - b.data_ptr()) % 16 == 0 and strides % 16 == 0
