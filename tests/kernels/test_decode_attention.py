"""decode_attention, one new token per sequence, against float64 and against the full forward."""

import pytest
import torch
from backends import CPU_SETS, CUDA, TRITON, serving
from util import DEVICE, DTYPES, assert_close_to, bits_equal, guarded, launches

from gpt2 import kernels
from gpt2.kernels import reference


@pytest.fixture(params=[TRITON, CUDA, *CPU_SETS])
def backend(request, monkeypatch):
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


def draw(B, T, H, D, dtype=torch.float32):
    """q, k_cache and v_cache between guard bands; elements beyond a length are NaN."""
    lengths = torch.randint(0, T + 1, (B,), device=DEVICE)
    lengths[0] = T
    q, k, v = (torch.randn(B, n, H, D, device=DEVICE).to(dtype) for n in (1, T, T))
    beyond = (torch.arange(T, device=DEVICE) >= lengths[:, None])[:, :, None, None]
    k, v = (x.masked_fill(beyond, float("nan")) for x in (k, v))
    return guarded(q), guarded(k), guarded(v), lengths


SIZES = pytest.mark.parametrize("D", (1, 7, 16, 64, 80, 128, 256), ids=lambda D: f"D{D}")


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@SIZES
@pytest.mark.parametrize("T", (1, 2, 17, 255, 256, 257), ids=lambda T: f"T{T}")
@pytest.mark.parametrize("B", (1, 3), ids=lambda B: f"B{B}")
def test_decode(B, T, D, dtype, backend, ran):
    check(B, T, D, dtype, backend, ran)


@pytest.mark.grid(full=1)  # also emulated: every instruction of each kernel runs
@pytest.mark.parametrize("dtype", DTYPES)
@SIZES
def test_several_pieces(D, dtype, backend, ran):
    check(3, 700, D, dtype, backend, ran)


def check(B, T, D, dtype, backend, ran):
    reason = kernels.why_not(backend, "decode_attention", torch.device(DEVICE), DTYPES[dtype], D)
    if reason is not None:
        pytest.skip(reason)
    *inputs, lengths = draw(B, T, 2, D, DTYPES[dtype])
    with kernels.use(backend), launches() as launched:
        o = kernels.decode_attention(*inputs, lengths)
    assert set(launched) == {backend}
    q, k, v = (x.double() for x in inputs)
    exact = reference.decode_attention(q, k, v, lengths)
    plain = reference.decode_attention(*inputs, lengths)
    terms = (
        reference.decode_attention(q, k, v.abs(), lengths).max().item()
    )  # o's, before they cancel
    assert_close_to(exact, o, plain, "o", factor=2, terms=terms)
    ran(backend)


def test_last_row_of_the_full_forward(backend):
    q, k, v = torch.randn(3, 2, 300, 3, 64, device=DEVICE)
    full = reference.causal_attention(q.double(), k.double(), v.double())
    terms = reference.causal_attention(q, k, v.abs()).max().item()
    plain = reference.causal_attention(q, k, v)
    for t in (1, 256, 257, 300):
        lengths = torch.full((2,), t, device=DEVICE)
        with kernels.use(backend):
            o = kernels.decode_attention(q[:, t - 1 : t], k, v, lengths)
        row = slice(t - 1, t)
        assert_close_to(full[:, row], o, plain[:, row], f"row {t - 1}", factor=2, terms=terms)


def test_views_and_transposed_caches(backend):
    """A cache kept as (B, H, T, D), and q as a view of the packed projection."""
    qkv = torch.randn(2, 1, 3, 4, 16, device=DEVICE)
    k, v = (torch.randn(2, 4, 33, 16, device=DEVICE).transpose(1, 2) for _ in "kv")
    lengths = torch.tensor([33, 20], device=DEVICE)
    with kernels.use(backend):
        o = kernels.decode_attention(qkv[:, :, 0], k, v, lengths)
        again = kernels.decode_attention(
            qkv[:, :, 0].contiguous(), k.contiguous(), v.contiguous(), lengths
        )
    assert bits_equal(o, again)


def test_bits_do_not_depend_on_threads_or_the_batch(backend):
    q, k, v, lengths = draw(3, 700, 2, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            with kernels.use(backend):
                results.append(kernels.decode_attention(q, k, v, lengths))
    finally:
        torch.set_num_threads(before)
    assert all(bits_equal(o, results[0]) for o in results)
    with kernels.use(backend):
        for b in range(3):
            alone = kernels.decode_attention(*(x[b : b + 1] for x in (q, k, v, lengths)))
            assert bits_equal(alone, results[0][b : b + 1])


def test_no_keys_give_zeros_and_nan_stays(backend):
    q, k, v = torch.randn(3, 3, 1, 2, 8, device=DEVICE)
    q[1, 0, 1, 3] = float("nan")
    lengths = torch.tensor([0, 1, 1], device=DEVICE)
    with kernels.use(backend):
        o = kernels.decode_attention(q, k, v, lengths)
        nothing = kernels.decode_attention(q, k[:, :0], v[:, :0], torch.zeros_like(lengths))
    assert not o[0].any() and not nothing.any()
    assert o[1, 0, 1].isnan().all() and o.isnan().sum() == 8


def test_one_key_outweighs_all_others(backend):
    """At any position: neither a later step nor a later split may lower the maximum."""
    q, k, v = torch.randn(3, 1, 700, 2, 16, device=DEVICE)
    lengths = torch.tensor([700], device=DEVICE)
    for at in (3, 100, 300, 699):
        heavy = k.clone()
        heavy[:, at] = 1e4 * q[:, 0]
        with kernels.use(backend):
            o = kernels.decode_attention(q[:, :1], heavy, v, lengths)
        assert torch.allclose(o, v[:, at : at + 1])


def test_compiles_without_a_break(backend):
    q, k, v, lengths = draw(2, 40, 2, 16)

    def step(q, k, v, lengths):
        return kernels.decode_attention(q * 1, k, v, lengths) + 1

    with kernels.use(backend):
        expected = step(q, k, v, lengths)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert bits_equal(compiled(q, k, v, lengths), expected)
    torch.compiler.reset()
    args = (q, k, v, lengths, 0.25, backend)
    torch.library.opcheck(torch.ops.gpt2_kernels.decode_attention.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 2, 3, 4)}, r"q must have shape \(B, 1, H, D\), got \(2, 2, 3, 4\)"),
        ({"k_cache": torch.ones(2, 5, 3, 8)}, r"v_cache must have k_cache's shape"),
        ({"lengths": torch.tensor([1, 6])}, r"lengths must lie in \[0, 6\), got 6"),
        ({"lengths": torch.tensor([-1, 2])}, r"lengths must lie in \[0, 6\), got -1"),
        ({"lengths": torch.tensor([1, 2, 3])}, r"lengths must have shape \(2,\)"),
        ({"lengths": torch.tensor([1.0, 2.0])}, r"lengths must be an int64 tensor"),
    ],
    ids=["q", "k_cache", "too long", "negative", "shape", "dtype"],
)
def test_errors_name_the_argument(change, message):
    caches = {name: torch.ones(2, 5, 3, 4) for name in ("k_cache", "v_cache")}
    good = {"q": torch.ones(2, 1, 3, 4), **caches, "lengths": torch.tensor([1, 5])}
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.decode_attention(**(good | change))
