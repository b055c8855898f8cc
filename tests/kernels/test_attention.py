"""causal_attention and causal_attention_qkv against float64, and the typical bugs of attention."""

import itertools
import math

import pytest
import torch
from inputs import qkv_in, tensor
from util import (
    DEVICE,
    DTYPES,
    bits_equal,
    check_op,
    guarded,
)

from gpt2 import kernels
from gpt2.kernels import reference
from gpt2.kernels.triton import HEAD_SIZES, tiles

LAYOUTS = ("contiguous", "heads_first", "sliced", "packed")


def gradient_terms(q, k, v):
    """The size of the numbers that cancel in dq and dk: do . v and delta = do . o. They are equal
    in the first row, which sees one key and has zero gradients. In half precision delta comes from
    a rounded o; in float32 the two sums over D are rounded differently."""
    D, half = q.shape[-1], q.dtype != torch.float32
    q, k, v = (x.detach().float().square().mean().sqrt().item() for x in (q, k, v))
    return 4 * v * max(q, k) * (1 if half else math.sqrt(D))


@pytest.mark.grid(one_dtype=True)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "drop"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", HEAD_SIZES, ids=lambda D: f"D{D}")
@pytest.mark.parametrize("T", (1, 2, 5, 17, 63, 64, 65), ids=lambda T: f"T{T}")
def test_short(T, D, layout, dtype, dropout_p, ran, kernel_backend):
    check_square(2 if T < 63 else 1, T, 3, D, layout, dtype, dropout_p, ran, kernel_backend)


@pytest.mark.grid(one_dtype=True)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "drop"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES, ids=lambda D: f"D{D}")
@pytest.mark.parametrize("T", (127, 129, 255, 257), ids=lambda T: f"T{T}")
def test_several_tiles(T, D, dtype, dropout_p, ran, kernel_backend):
    heads = 2 if T < 200 else 1
    check_square(1, T, heads, D, "packed", dtype, dropout_p, ran, kernel_backend)


@pytest.mark.parametrize(
    "dropout_p", [0.0, pytest.param(0.1, marks=pytest.mark.full)], ids=["", "drop"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D",
    [pytest.param(D, marks=() if D == 64 else pytest.mark.full, id=f"D{D}") for D in HEAD_SIZES],
)
def test_every_kernel(D, dtype, dropout_p, ran, kernel_backend):
    """Each head size, dtype and pass, with whole and ragged tiles, past and diagonal, for the
    dtype's largest tile."""
    T = 100 if dtype == "fp32" else 200
    check_square(1, T, 1, D, "packed", dtype, dropout_p, ran, kernel_backend)


@pytest.mark.grid
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "drop"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (16, 64, 100), ids=lambda D: f"D{D}")
@pytest.mark.parametrize("T", (300, 520, 777), ids=lambda T: f"T{T}")
def test_several_blocks(T, D, dtype, dropout_p, ran, cpu_backend):
    """Several blocks of keys, which are larger on a CPU."""
    check_square(1, T, 2, D, "packed", dtype, dropout_p, ran, cpu_backend)


def score_rounding(D):
    """The rounding of a sum of D products: with few scores, plain PyTorch's own error is small by
    chance."""
    return torch.finfo(torch.float32).eps * D**0.5 / 4


def check_square(B, T, H, D, layout, dtype, dropout_p, ran, backend):
    q, k, v = qkv_in(layout, B, T, T, H, D, DTYPES[dtype])
    check_op(
        "causal_attention", {"q": q, "k": k, "v": v}, backend=backend, ran=ran,
        terms=gradient_terms(q, k, v), rounding=score_rounding(D), dropout_p=dropout_p,
        seed=seed_tensor(T + D),
    )  # fmt: skip


@pytest.mark.grid(one_dtype=True)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["", "drop"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (16, 64, 80), ids=lambda D: f"D{D}")
@pytest.mark.parametrize(
    "Tq, Tk",
    [(1, 2), (1, 65), (2, 130), (17, 64), (63, 65), (64, 128), (65, 200), (100, 101), (130, 257)],
)
def test_last_query_meets_last_key(Tq, Tk, D, dtype, dropout_p, ran, kernel_backend):
    q, k, v = qkv_in("contiguous", 1, Tq, Tk, 1, D, DTYPES[dtype])
    check_op(
        "causal_attention", {"q": q, "k": k, "v": v}, backend=kernel_backend, ran=ran,
        terms=gradient_terms(q, k, v), rounding=score_rounding(D), dropout_p=dropout_p,
        seed=seed_tensor(Tk),
    )  # fmt: skip


@pytest.mark.grid(one_dtype=True)
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES, ids=lambda D: f"D{D}")
@pytest.mark.parametrize("B, T, H", [(2, 1, 3), (2, 17, 3), (2, 64, 1), (1, 65, 3), (1, 130, 1)])
def test_packed(B, T, H, D, dtype, strided, ran, kernel_backend):
    """(B, T, 3C) in, (B, T, C) out, one packed gradient."""
    qkv = tensor(B, 2 * T, 3 * H * D, dtype=DTYPES[dtype])
    qkv = qkv[:, ::2] if strided else guarded(qkv[:, :T])
    terms = gradient_terms(*qkv.unflatten(-1, (3, H, D)).unbind(2))
    check_op(
        "causal_attention_qkv", {"qkv": qkv}, backend=kernel_backend, ran=ran, terms=terms, n_head=H
    )


@pytest.mark.grid
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "drop"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", (1, 20, 33, 130), ids=lambda T: f"T{T}")
@pytest.mark.parametrize("D", (1, 3, 8, 17, 24, 40, 100, 200, 255, 256), ids=lambda D: f"D{D}")
def test_any_head_size_on_a_cpu(D, T, dtype, dropout_p, ran, cpu_backend):
    """Sums of D and of T products are single chains. The error floors include their rounding,
    because plain PyTorch sums in trees at some of these sizes and in chains at others."""
    q, k, v = qkv_in("packed", 1, T, T, 2, D, DTYPES[dtype])
    check_op(
        "causal_attention", {"q": q, "k": k, "v": v}, backend=cpu_backend, ran=ran,
        terms=4 * gradient_terms(q, k, v), rounding=torch.finfo(torch.float32).eps * D**0.5,
        dropout_p=dropout_p, seed=seed_tensor(T + D),
    )  # fmt: skip


@pytest.mark.triton
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the tiles of its own architecture run")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "drop"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_tiles_of_another_architecture(dtype, dropout_p, ran, monkeypatch):
    monkeypatch.setattr(tiles, "is_hopper", lambda device: True)
    check_square(1, 130, 1, 64, "packed", dtype, dropout_p, ran, "triton")


def seed_tensor(n):
    return torch.tensor([0x1234567800000000 + n], device=DEVICE)


@pytest.mark.triton
def test_packed_makes_no_copy(monkeypatch):
    """The projection's output is used in place, and one gradient of its shape is returned. Only o
    and dqkv have that size."""
    B, T, H, D = 1, 64, 2, 16
    qkv = tensor(B, T, 3 * H * D).requires_grad_()
    sizes = []

    def counting(allocate):
        def wrapper(*args, **kwargs):
            x = allocate(*args, **kwargs)
            sizes.append(x.numel())
            return x

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    with kernels.use("triton"):
        o = kernels.causal_attention_qkv(qkv, H)
        (dqkv,) = torch.autograd.grad(o.sum(), qkv)
    assert dqkv.shape == qkv.shape and dqkv.is_contiguous()
    row, rows = H * D, B * T  # o, dqkv; lse, delta
    assert sorted(sizes) == sorted([rows * row, 3 * rows * row, rows * H, rows * H])


@pytest.mark.parametrize("softmax_scale", [0.01, 1.0])
def test_softmax_scale(softmax_scale, ran, kernel_backend):
    q, k, v = qkv_in("contiguous", 1, 65, 65, 2, 64, torch.float32)
    check_op(
        "causal_attention", {"q": q, "k": k, "v": v}, backend=kernel_backend, ran=ran,
        terms=gradient_terms(q, k, v) * softmax_scale * 4, softmax_scale=softmax_scale,
    )  # fmt: skip


def test_deterministic_and_independent_of_the_batch(kernel_backend):
    q, k, v = (x.requires_grad_() for x in qkv_in("packed", 3, 65, 65, 2, 32, torch.bfloat16))
    do = torch.randn_like(q)

    def run(*rows):
        with kernels.use(kernel_backend):
            o = kernels.causal_attention(*rows)
            return o, *torch.autograd.grad(o, rows, do[: len(o)])

    whole, again = run(q, k, v), run(q, k, v)
    assert all(map(bits_equal, whole, again))
    alone = run(*(x[:1].detach().requires_grad_() for x in (q, k, v)))
    assert all(bits_equal(a[:1], b) for a, b in zip(whole, alone, strict=True))


def test_backward_twice_and_stride_0_gradients(kernel_backend):
    q, k, v = (x.requires_grad_() for x in qkv_in("contiguous", 2, 17, 17, 2, 16, torch.float32))
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, k, v)
    first = torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)  # gradient of stride 0
    second = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert all(map(bits_equal, first, second))


def test_gradient_of_a_concatenation_is_not_contiguous(kernel_backend):
    q, k, v = (x.requires_grad_() for x in qkv_in("contiguous", 2, 17, 17, 2, 16, torch.float32))
    weight = tensor(2, 17, 2, 32)
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, k, v)
        got = torch.autograd.grad((torch.cat([o, o], -1) * weight).sum(), (q, k, v))
    o = reference.causal_attention(q, k, v)
    want = torch.autograd.grad((torch.cat([o, o], -1) * weight).sum(), (q, k, v))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-5)


def test_every_subset_of_gradients(kernel_backend):
    tensors = qkv_in("contiguous", 1, 17, 17, 1, 16, torch.float32)
    want = None
    for needed in reversed(list(itertools.product([False, True], repeat=3))):
        leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]
        with kernels.use(kernel_backend):
            o = kernels.causal_attention(*leaves)
        if any(needed):
            o.sum().backward()
            want = want or [x.grad for x in leaves]  # all three, the first time
        for x, n, w in zip(leaves, needed, want, strict=True):
            assert bits_equal(x.grad, w) if n else x.grad is None


def test_same_output_with_and_without_gradients(kernel_backend):
    q, k, v = qkv_in("contiguous", 1, 65, 65, 2, 64, torch.bfloat16)
    with kernels.use(kernel_backend):
        plain = kernels.causal_attention(q, k, v)
        with torch.no_grad():
            assert bits_equal(plain, kernels.causal_attention(q, k, v))
        with torch.inference_mode():
            assert bits_equal(plain, kernels.causal_attention(q, k, v))
        assert bits_equal(plain, kernels.causal_attention(q.requires_grad_(), k, v))


# ---- errors


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda a: a.update(q=a["q"][0]), ValueError, r"q must have shape \(B, T, H, D\)"),
        (lambda a: a.update(k=a["k"][:, 1:]), ValueError, "v must have k's shape"),
        (lambda a: a.update(q=a["q"][..., :8]), ValueError, "k must have q's B, H and D"),
        (lambda a: a.update(q=torch.cat([a["q"]] * 2, 1)), ValueError, "Tq=10, Tk=5"),
        (lambda a: a.update(k=a["k"].half()), TypeError, "k must have dtype torch.float32, got"),
        (lambda a: a.update(v=a["v"].long()), TypeError, "v must have a floating dtype"),
        (lambda a: a.update(q="q"), TypeError, "q must be a tensor, got str"),
        (lambda a: a.update(dropout_p=1.5), ValueError, r"dropout_p must lie in \[0, 1\], got 1.5"),
        (lambda a: a.update(softmax_scale=0.0), ValueError, "softmax_scale must be positive"),
        (
            lambda a: a.update(softmax_scale="1"),
            TypeError,
            "softmax_scale must be a number",
        ),
        (lambda a: a.update(dropout_p=None), TypeError, "dropout_p must be a number, got None"),
        (lambda a: a.update(dropout_p=0.1, seed=2**64), ValueError, "seed must fit"),
        (
            lambda a: a.update(dropout_p=0.1, seed=1.5),
            TypeError,
            "seed must be an int .* float 1.5",
        ),
        (lambda a: a.update(dropout_p=0.1, seed="7"), TypeError, "seed must be an int .* str '7'"),
        (lambda a: a.update(dropout_p=0.1, seed=torch.ones(2)), ValueError, "seed must be an int"),
        (lambda a: a.update({n: a[n][..., :0] for n in "qkv"}), ValueError, "head size"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {name: torch.randn(2, 5, 2, 16) for name in "qkv"}
    change(arguments)
    with pytest.raises(error, match=message):
        kernels.causal_attention(**arguments)


@pytest.mark.parametrize("n_head", [0, 5])
def test_errors_of_the_packed_form(n_head):
    with pytest.raises(ValueError, match="n_head must divide"):
        kernels.causal_attention_qkv(torch.randn(1, 2, 48), n_head)
    with pytest.raises(ValueError, match=r"qkv must have shape \(B, T, 3C\)"):
        kernels.causal_attention_qkv(torch.randn(2, 48), 1)


@pytest.mark.triton
@pytest.mark.parametrize("D", [8, 48, 256])
def test_other_head_sizes_fall_back_with_a_reason(D, monkeypatch):
    monkeypatch.setitem(kernels.dispatch.PRIORITY, "attention", ("triton",))
    q = tensor(1, 3, 1, D)
    reason = f"head size {D} is not one of 16, 32"
    with kernels.use("triton"), pytest.raises(kernels.BackendUnavailable, match=reason):
        kernels.causal_attention(q, q, q)
    kernels.dispatch._said.clear()
    with pytest.warns(UserWarning, match=f"attention falls back.*head size {D}"):
        o = kernels.causal_attention(q, q, q)
    assert torch.equal(o, reference.causal_attention(q, q, q))
