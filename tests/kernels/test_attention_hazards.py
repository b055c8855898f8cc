"""The typical bugs of attention: keys from the future, scores of any size, offsets beyond int32."""

import math

import pytest
import torch
from inputs import qkv_in, shape_id, tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from util import (
    DEVICE,
    DTYPES,
    assert_close_to,
    bits_equal,
)

from gpt2 import kernels
from gpt2.kernels import reference
from gpt2.kernels.triton import attention as triton_attention


@pytest.mark.grid(one_dtype=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), 6e4], ids=["nan", "huge"])
@pytest.mark.parametrize("i", [0, 31, 63, 64, 100])
def test_no_row_depends_on_a_later_key(i, bad, dtype, kernel_backend):
    """If the keys beyond row i are NaN or huge, and their values huge, rows up to i keep their
    bits."""
    q, k, v = qkv_in("contiguous", 1, 130, 130, 2, 32, DTYPES[dtype])
    with kernels.use(kernel_backend):
        before = kernels.causal_attention(q, k, v)
        k[:, i + 1 :], v[:, i + 1 :] = bad, torch.finfo(v.dtype).max / 4
        after = kernels.causal_attention(q, k, v)
    assert bits_equal(before[:, : i + 1], after[:, : i + 1])
    assert not bits_equal(before, after)


def test_no_gradient_flows_back_in_time(kernel_backend):
    q, k, v = (x.requires_grad_() for x in qkv_in("contiguous", 1, 130, 130, 2, 32, torch.float32))
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, k, v)
    dq, dk, dv = torch.autograd.grad(o[:, 70].sum(), (q, k, v))
    assert not dk[:, 71:].any() and not dv[:, 71:].any()
    assert not dq[:, :70].any() and not dq[:, 71:].any()
    assert dk[:, :71].any() and dv[:, :71].all()


@pytest.mark.parametrize("i", [0, 40, 129])
def test_nan_in_a_query_stays_in_its_row(i, kernel_backend):
    q, k, v = qkv_in("contiguous", 1, 130, 130, 1, 16, torch.float32)
    q[:, i] = float("nan")
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, k, v)
    assert o[:, i].isnan().all()
    o[:, i] = 0
    assert not o.isnan().any()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_huge_scores(dtype, kernel_backend):
    """With q = k around 1e5, scores are around 1e11. There a fused s * scale - max misses the
    maximum by more than an exponent can represent, and exp(s - max) overflows."""
    q = 1e5 * tensor(1, 70, 2, 64, dtype=DTYPES[dtype])
    v = tensor(1, 70, 2, 64, dtype=DTYPES[dtype])
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, q, v)
    exact = reference.causal_attention(q.double(), q.double(), v.double())
    assert_close_to(exact, o, reference.causal_attention(q, q, v), "o", factor=2)


def test_scores_of_minus_infinity(kernel_backend):
    """A query's first keys all score -inf, later ones do not: the first keys have no weight."""
    q, k, v = qkv_in("contiguous", 1, 300, 300, 1, 16, torch.float32)
    q[..., 0], k[:, :280, :, 0] = 1, -math.inf
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, k, v)[:, 280:]
    exact = reference.causal_attention(q.double(), k.double(), v.double())[:, 280:]
    with sdpa_kernel(SDPBackend.MATH):  # a fused kernel may return NaN here
        plain = reference.causal_attention(q, k, v)[:, 280:]
    # o = sum p v: each p is rounded at its own size, so the error of o is in units of v, not of o.
    largest = v[:, 280:].abs().max().item()
    assert_close_to(exact, o, plain, "o", factor=2, terms=largest)


def test_half_precision_scores_beyond_its_range(kernel_backend):
    """Unscaled scores beyond 65504 must never be rounded to float16."""
    q = 40 * tensor(1, 65, 1, 128, dtype=torch.float16)
    v = tensor(1, 65, 1, 128, dtype=torch.float16)
    assert (q[0, :, 0] @ q[0, :, 0].T).isinf().any()
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, q, v)
    exact = reference.causal_attention(q.double(), q.double(), v.double())
    assert_close_to(exact, o, exact.half(), "o", factor=2)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)], ids=shape_id)
def test_empty(shape, backend):
    q = tensor(*shape).requires_grad_()
    with kernels.use(backend):
        o = kernels.causal_attention(q, q, q)
        o.sum().backward()
    assert o.shape == shape and q.grad.shape == shape


def test_no_queries(kernel_backend):
    q, k, v = tensor(1, 0, 2, 16), tensor(1, 5, 2, 16), tensor(1, 5, 2, 16)
    k.requires_grad_(), v.requires_grad_()
    with kernels.use(kernel_backend):
        kernels.causal_attention(q, k, v).sum().backward()
    assert not k.grad.any() and not v.grad.any()


@pytest.mark.triton
def test_more_heads_than_a_grid_axis_holds(monkeypatch):
    """B H = 65,536 must be on the x axis: CUDA's y and z axes end at 65,535."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("_attn_fwd_kernel", "_attn_bwd_dq_kernel", "_attn_bwd_dkdv_kernel"):
        monkeypatch.setattr(triton_attention, name, Recorder())
    qkv = tensor(4096, 1, 3 * 16 * 16).requires_grad_()
    with kernels.use("triton"):
        kernels.causal_attention_qkv(qkv, 16).sum().backward()
    assert grids == [(65536, 1, 1)] * 3


@pytest.mark.gpu
def test_65536_heads():
    qkv = tensor(4096, 1, 3 * 16 * 16).requires_grad_()
    with kernels.use("triton"):
        o = kernels.causal_attention_qkv(qkv, 16)
        o.sum().backward()
    assert torch.allclose(o, qkv[..., 2 * 256 :], rtol=1e-6)  # T = 1: o = v
    # dv = p = exp(s - lse) with lse = s: the terms that cancel were rounded at the size of a score.
    q, k, _ = qkv.detach().view(4096, 3, 16, 16).unbind(1)
    largest = (q * k).sum(-1).abs().max().item() / 4
    dv, exact = qkv.grad[..., 2 * 256 :], torch.ones_like(o)
    assert_close_to(exact.double(), dv, exact, "dv", factor=3, terms=largest)


def test_row_strides_that_overflow_int32(tmp_path, kernel_backend):
    """Rows are 2^30 elements apart, in a sparse file: row 2 starts at 2^31. The interpreter raises
    at an int32 product in the address, and a wrapped address leaves the buffer."""
    if DEVICE == "cuda":
        pytest.skip(
            "a sparse file cannot be mapped to the GPU; its own test allocates 2^31 elements"
        )
    stride, T, D = 2**30, 5, 16
    file = tmp_path / "sparse"
    with open(file, "wb") as f:
        f.truncate(((T - 1) * stride + D) * 2)
    n = (T - 1) * stride + D
    big = torch.from_file(str(file), shared=True, size=n, dtype=torch.bfloat16)
    q = big.as_strided((1, T, 1, D), (0, stride, 0, 1))
    q.copy_(tensor(1, T, 1, D))
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, q, q)
        small = q.clone()
        assert bits_equal(o, kernels.causal_attention(small, small, small))
