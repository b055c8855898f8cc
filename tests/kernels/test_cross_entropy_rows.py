"""cross_entropy's kernels on rows that lie anywhere in memory, and on more of them than blocks."""

import math

import pytest
import torch
import torch.nn.functional as F
from inputs import tensor
from util import DEVICE, DTYPES, assert_close_to, bits_equal

from gpt2.kernels import dispatch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [3, 20, 8211])
def test_rows_that_begin_anywhere(V, dtype, kernel_backend):
    """At each place of a 16-byte line, between columns of NaN that nobody may read or change."""
    kernel = dispatch.module(kernel_backend, "cross_entropy")
    N, width = 9, V + 3 + V % 2  # an odd width: the next row begins one place on
    targets = torch.arange(N, device=DEVICE) * (V - 1) // (N - 1)
    whole = torch.full((N, width), math.nan, dtype=DTYPES[dtype], device=DEVICE)
    rows = whole[:, 1 : 1 + V]
    rows.copy_(tensor(N, V))
    exact = rows.double().requires_grad_()
    want = F.cross_entropy(exact, targets, reduction="none")
    (dlogits,) = torch.autograd.grad(want.sum(), exact)

    plain = F.cross_entropy(rows.float(), targets, reduction="none")

    losses, stats = kernel.cross_entropy_fwd(rows, targets, -1, 0.0)
    apart = kernel.cross_entropy_bwd(torch.ones_like(losses), rows, targets, stats, -1, 0.0)
    fused = kernel.cross_entropy_fwd_bwd_(rows, targets, -1, 0.0, V)
    for got in (losses, fused):
        assert_close_to(want, got, plain, "losses", factor=2)
    for got in (apart, rows):
        assert_close_to(dlogits, got, dlogits.to(got.dtype), "dlogits", factor=3)
    assert whole[:, 0].isnan().all() and whole[:, 1 + V :].isnan().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_long_rows_than_multiprocessors(dtype, smoothing, kernel_backend):
    """CUDA's blocks walk long rows, the next in flight while one is used; the emulated GPU has 108
    multiprocessors. The columns that pad V are NaN at first, and an ignored row all NaN."""
    kernel = dispatch.module(kernel_backend, "cross_entropy")
    N, V = 120 if kernel_backend == "cuda" else 7, 20485 if dtype == "fp32" else 40965
    V_padded = V + 59
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[:5] = torch.tensor([0, V - 1, V - 2, V // 2, 8], device=DEVICE)
    targets[5], targets[-1] = -1, -1
    logits = torch.full((N, V_padded), math.nan, dtype=DTYPES[dtype], device=DEVICE)
    logits[:, :V] = tensor(N, V)
    exact = logits[:, :V].double().requires_grad_()
    options = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": "none"}
    want = F.cross_entropy(exact, targets, **options)
    (dlogits,) = torch.autograd.grad(want.sum(), exact)
    plain = F.cross_entropy(logits[:, :V].float(), targets, **options)
    alone, _ = kernel.cross_entropy_fwd(logits[:, :V], targets, -1, smoothing)
    logits[5] = math.nan

    losses = kernel.cross_entropy_fwd_bwd_(logits, targets, -1, smoothing, V)
    assert_close_to(want, losses, plain, "losses", factor=2)
    assert_close_to(dlogits, logits[:, :V], dlogits.to(logits.dtype), "dlogits", factor=3)
    assert not logits[:, V:].any()
    if kernel_backend == "cuda":
        assert bits_equal(losses, alone)
