"""Targets and lengths that change after validation: no kernel may compute an address from them.

Their memory belongs to the caller. A NumPy array behind targets was refilled between the forward
and the backward, and the process died with a segmentation fault; a replayed CUDA graph reads the
values at the time of the replay.
"""

import pytest
import torch
from util import DEVICE, bits_equal, guarded

from gpt2 import kernels
from gpt2.kernels import dispatch

V = 37
OUTSIDE = (10**9, -(10**9), V, -1, 2**63 - 1, -(2**63), 2**32 + 1, -(2**32) + 1)


def draw(rows):
    targets = torch.randint(V, (rows,), device=DEVICE)
    targets[2] = -100
    return targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_targets_change_before_the_backward(op, smoothing, kernel_backend):
    """Rows with targets outside the vocabulary get NaN, which the trainer refuses; other rows are
    right. linear_cross_entropy with reduction "none" reads its targets again in the backward."""
    targets = draw(3 + len(OUTSIDE))
    shapes = {"cross_entropy": [(len(targets), V)], "linear_cross_entropy": [(len(targets), 8)]}
    x = torch.randn(*shapes[op][0], device=DEVICE, requires_grad=True)
    weight = [torch.randn(V, 8, device=DEVICE)] if op == "linear_cross_entropy" else []

    def loss():
        options = {"reduction": "none", "label_smoothing": smoothing}
        with kernels.use(kernel_backend):
            return getattr(kernels, op)(x, *weight, targets, **options).sum()

    (right,) = torch.autograd.grad(loss(), x)
    late = loss()
    targets.data[3:] = torch.tensor(OUTSIDE, device=DEVICE)
    (grad,) = torch.autograd.grad(late, x)
    assert bits_equal(grad[:3], right[:3]) and bool(grad[3:].isnan().all())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_pass_meets_targets_outside(smoothing, kernel_backend):
    """A raw op validates nothing: losses and gradients are NaN for rows with targets outside, 0 for
    ignored rows, and the columns that pad the vocabulary are 0."""
    targets, padded = draw(3 + len(OUTSIDE)), V + 3
    targets[3:] = torch.tensor(OUTSIDE, device=DEVICE)
    targets[2] = -100
    with kernels.use(kernel_backend):
        row_kernel = dispatch.module(kernel_backend, "cross_entropy")
    logits = guarded(torch.randn(len(targets), padded, device=DEVICE))
    options = -100, smoothing

    losses, stats = row_kernel.cross_entropy_fwd(logits[:, :V], targets, *options)
    dlosses = torch.ones_like(losses)
    grad = row_kernel.cross_entropy_bwd(dlosses, logits[:, :V], targets, stats, *options)
    over = logits.clone()
    row_kernel.cross_entropy_bwd_(dlosses, over[:, :V], targets, stats, *options)
    at_once = logits.clone()
    losses_at_once = row_kernel.cross_entropy_fwd_bwd_(at_once, targets, *options, V)

    assert not at_once[:2, V:].any() and bits_equal(over[:, V:], logits[:, V:])
    for loss, dx in ((losses, grad), (losses, over[:, :V]), (losses_at_once, at_once[:, :V])):
        assert bool(loss[:2].isfinite().all()) and bool(loss[3:].isnan().all()) and loss[2] == 0
        assert bool(dx[:2].isfinite().all()) and bool(dx[3:].isnan().all()) and not dx[2].any()


def test_lengths_outside_the_cache(kernel_backend):
    """A CUDA graph cannot validate its lengths: a sequence with a length outside [0, T] gets NaN,
    and nothing beyond its cache is read."""
    B, T, H, D = 2 + len(OUTSIDE), V, 2, 16
    q, k, v = (guarded(torch.randn(B, n, H, D, device=DEVICE)) for n in (1, T, T))
    lengths = torch.tensor([T, 0, *(n + (n == V) for n in OUTSIDE)], device=DEVICE)
    with kernels.use(kernel_backend):
        launcher = dispatch.module(kernel_backend, "decode_attention").decode_attention
        want = kernels.decode_attention(q[:2], k[:2], v[:2], lengths[:2])
    o = launcher(q, k, v, lengths, 0.25)
    assert bits_equal(o[:2], want) and bool(o[2:].isnan().all())
