"""linear and linear_int8: a few rows by the CPU's kernel, against float64, and the fallback to
PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from backends import CPU_SETS, serving
from util import DTYPES, assert_close_to, bits_equal, guarded, launches

from gpt2 import kernels
from gpt2.kernels.linear import FEW, FEW_INT8
from gpt2.kernels.reference import dequantize_int8


@pytest.fixture(params=CPU_SETS)
def backend(request, monkeypatch):
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


def draw(M, N, K, dtype, bias=True):
    """x (M, K), weight (N, K) and bias (N,) or None, between guard bands."""
    x, weight, b = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    tensors = [guarded(t.to(dtype)) for t in ((x, weight, b) if bias else (x, weight))]
    return tensors if bias else [*tensors, None]


def terms(x, weight, bias):
    """The size of the summed terms before they cancel."""
    rest = 0.0 if bias is None else bias.double().abs()
    return (x.double().abs() @ weight.double().abs().T + rest).max().item()


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", (1, 7, 63, 64, 65, 100, 768), ids=lambda K: f"K{K}")
@pytest.mark.parametrize("N", (1, 3, 4, 9, 130), ids=lambda N: f"N{N}")
@pytest.mark.parametrize("M", (1, 2, 3, 8), ids=lambda M: f"M{M}")
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "alone"))
@pytest.mark.parametrize("kind", ("whole", "int8"))
def test_a_few_rows(kind, bias, M, N, K, dtype, backend, ran):
    x, weight, b = draw(M, N, K, DTYPES[dtype], bias)
    with launches() as launched:
        if kind == "whole":
            y = kernels.linear(x, weight, b)
        else:
            packed, scale = kernels.quantize_int8(weight)
            y = kernels.linear_int8(x, packed, guarded(scale), b)
            weight = dequantize_int8(packed, scale, K, torch.float64)
    assert launched == [backend] and y.dtype == x.dtype
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    plain = F.linear(x, weight.to(x.dtype), b)
    rounding = torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps
    assert_close_to(exact, y, plain, "y", factor=2, terms=rounding * terms(x, weight, b))
    ran(backend)


def test_bits_do_not_depend_on_threads_or_the_batch(backend):
    x, weight, bias = draw(FEW, 1001, 200, torch.bfloat16)
    packed, scale = kernels.quantize_int8(weight)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            both = kernels.linear(x, weight, bias), kernels.linear_int8(x, packed, scale, bias)
            results.append(torch.stack(both))
    finally:
        torch.set_num_threads(before)
    assert all(bits_equal(r, results[0]) for r in results)
    for m in range(FEW):
        for n, rows in ((1, x[m : m + 1]), (min(3, FEW - m), x[m : m + 3])):
            assert bits_equal(kernels.linear(rows, weight, bias), results[0][0, m : m + n])
            alone = kernels.linear_int8(rows, packed, scale, bias)
            assert bits_equal(alone, results[0][1, m : m + n])


def test_more_rows_of_int8_go_through_the_kernel_too(backend):
    """Up to the number of rows at which dequantizing the weight is cheaper than reading it
    again."""
    x, weight, bias = draw(FEW_INT8 + 1, 30, 200, torch.bfloat16)
    packed, scale = kernels.quantize_int8(weight)
    for M in (FEW + 1, FEW_INT8):
        with launches() as launched:
            y = kernels.linear_int8(x[:M].view(1, M, 200), packed, scale, bias)
        assert launched == [backend] * -(-M // FEW) and y.shape == (1, M, 30)
        for m in range(M):
            assert bits_equal(kernels.linear_int8(x[m], packed, scale, bias), y[0, m])
    with launches() as launched:
        kernels.linear_int8(x, packed, scale, bias)
    assert launched == []


def test_bf16_is_summed_in_float32(backend):
    """A bfloat16 sum of ones stops at 256."""
    x, weight = (torch.ones(n, 2**14, dtype=torch.bfloat16) for n in (2, 5))
    with launches() as launched:
        y, y8 = kernels.linear(x, weight), kernels.linear_int8(x, *kernels.quantize_int8(weight))
    assert launched == [backend] * 2 and (y == 2**14).all() and (y8 == 2**14).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_whole_numbers_fit(sign, backend):
    """x just below a power of two, where its integers are largest, and all weights 127."""
    x = torch.full((1, 640), 255.0 * 2**20 * sign)
    packed, scale = kernels.quantize_int8(torch.ones(4, 640))
    y = kernels.linear_int8(x, packed, scale)
    assert torch.allclose(y, 640 * x[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-90, -40, 40, 110])
def test_x_of_any_size_keeps_its_digits_in_int8(exponent, dtype, backend):
    """Each block of 64 has its own unit, whatever the size of its neighbours."""
    if dtype == "fp16":
        exponent //= 20
    x, weight, _ = draw(2, 30, 256, torch.float32)
    x = (x * 2.0**exponent * torch.tensor([1, 2.0**-9]).repeat_interleave(128)).to(DTYPES[dtype])
    packed, scale = kernels.quantize_int8(weight)
    weight = dequantize_int8(packed, scale, 256, torch.float64)
    for part in (slice(0, 256), slice(128, 256)):
        some = torch.zeros_like(x)
        some[:, part] = x[:, part]
        y, exact = kernels.linear_int8(some, packed, scale).double(), some.double() @ weight.T
        size = (some.double().abs() @ weight.abs().T).max()
        assert ((y - exact).abs() <= 0.51 * torch.finfo(x.dtype).eps * size).all()


def test_zeros_and_subnormals_have_a_unit_too(backend):
    packed, scale = kernels.quantize_int8(torch.ones(3, 128))
    x = torch.zeros(2, 128)
    x[1, 64:] = 2.0**-130
    y = kernels.linear_int8(x, packed, scale)
    assert not y[0].any() and torch.allclose(y[1], torch.tensor(2.0**-124), rtol=0.01, atol=0)


@pytest.mark.parametrize("k", [0, 63, 64, 100])
def test_one_number_far_larger_than_the_others(k, backend):
    x, weight, _ = draw(1, 30, 101, torch.float32)
    x[0, k] = -1e4
    packed, scale = kernels.quantize_int8(weight)
    exact = x.double() @ dequantize_int8(packed, scale, 101, torch.float64).T
    error = (kernels.linear_int8(x, packed, scale) - exact).abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * exact.abs().max()).all()


def test_views_are_read_as_they_are(backend):
    wide = torch.randn(2, 2, 3, 40)
    weight, bias = torch.randn(30, 40).t().contiguous().t(), torch.randn(60)[::2]
    y = kernels.linear(wide[:, 0, ::2], weight, bias)
    assert y.shape == (2, 2, 30)
    assert bits_equal(y, kernels.linear(wide[:, 0, ::2].clone(), weight.contiguous(), bias.clone()))


def test_nan_and_infinity_stay_in_their_row(backend):
    x, weight, bias = draw(3, 20, 70, torch.float32)
    packed, scale = kernels.quantize_int8(weight)
    clean = kernels.linear(x, weight, bias), kernels.linear_int8(x, packed, scale, bias)
    x[1, 69], x[2, 3] = float("nan"), float("inf")
    y, y8 = kernels.linear(x, weight, bias), kernels.linear_int8(x, packed, scale, bias)
    for dirty, before in zip((y, y8), clean, strict=True):
        assert dirty[1].isnan().all() and not dirty[2].isfinite().any()
        assert bits_equal(dirty[0], before[0])


# ---- PyTorch's product


def served(call):
    with launches() as launched:
        call()
    return "cpu" in launched


def test_who_wants_a_gradient_has_pytorch_s_product(cpu_backend):
    x, weight, bias = draw(2, 5, 8, torch.float32)
    packed, scale = kernels.quantize_int8(weight)
    assert served(lambda: kernels.linear(x, weight, bias))
    assert served(lambda: kernels.linear_int8(x, packed, scale, bias))
    for t in (x, weight, bias):
        t.requires_grad_()
        assert not served(lambda: kernels.linear(x, weight, bias))
        with torch.no_grad():
            assert served(lambda: kernels.linear(x, weight, bias))
        t.requires_grad_(False)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(kernels.linear_int8(x, packed, scale, bias).sum(), x)
    assert torch.allclose(dx, dequantize_int8(packed, scale, 8, torch.float32).sum(0).expand(2, 8))


def test_what_else_is_not_the_kernel_s(cpu_backend):
    x, weight, _ = draw(FEW, 5, 8, torch.float32)
    many = torch.cat([x, x[:1]])
    assert served(lambda: kernels.linear(x, weight))
    assert not served(lambda: kernels.linear(many, weight))
    assert not served(lambda: kernels.linear(x[:0], weight))
    assert kernels.linear(x[:0], weight).shape == (0, 5)
    assert served(lambda: kernels.linear(x[0], weight)) and kernels.linear(x[0], weight).dim() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert not served(lambda: kernels.linear(x, weight))
        assert kernels.linear(x, weight).dtype == torch.bfloat16
    with kernels.use("reference"):
        assert not served(lambda: kernels.linear(x, weight))
    packed, scale = kernels.quantize_int8(weight)
    few, all_rows = kernels.linear_int8(x, packed, scale), kernels.linear_int8(many, packed, scale)
    assert torch.allclose(few, all_rows[:-1], rtol=1e-5, atol=1e-6)


def test_compiled_it_is_pytorch_s_product(cpu_backend):
    x, weight, bias = draw(2, 5, 8, torch.float32)
    packed, scale = kernels.quantize_int8(weight)

    def both(x):
        return kernels.linear(x, weight, bias) + kernels.linear_int8(x, packed, scale, bias)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with launches() as launched:
        y = compiled(x)
    assert not launched and torch.allclose(y, both(x), rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_the_raw_op_passes_opcheck(cpu_backend):
    x, weight, bias = draw(2, 5, 8, torch.bfloat16)
    packed, scale = kernels.quantize_int8(weight)
    for args in ((weight, bias, None), (weight, None, None), (packed, bias, scale)):
        torch.library.opcheck(torch.ops.gpt2_kernels.linear.default, (x, *args, "cpu"))


# ---- int8


def test_each_weight_is_the_nearest_multiple_of_its_scale():
    weight = torch.randn(33, 100)
    weight[5] = 0
    packed, scale = kernels.quantize_int8(weight)
    assert packed.shape == (33, 128) and packed.dtype == torch.int8 and scale.shape == (33,)
    back = dequantize_int8(packed, scale, 100, torch.float32)
    assert ((back - weight).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()
    largest = weight.abs().max(dim=1).values
    assert torch.allclose(back.abs().max(dim=1).values, largest) and not back[5].any()


def test_the_packing_is_as_documented():
    """Byte j of word i of 64 is number 32 j + i."""
    weight = torch.arange(-63.0, 65.0)[None] / 64 * 127
    packed, scale = kernels.quantize_int8(weight)
    for i in range(32):
        for j in range(2):
            number = round(weight[0, 64 + 32 * j + i].item() / scale.item())
            assert packed[0, 64 + 2 * i + j].item() == number


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3), ValueError, r"weight must have shape \(N, K\), got \(3,\)"),
        (torch.ones(2, 2, dtype=torch.int8), TypeError, "weight must be a floating tensor"),
        (torch.tensor([[1.0, float("nan")]]), ValueError, "weight must be finite"),
    ],
)
def test_what_cannot_be_quantized_is_named(weight, error, message):
    with pytest.raises(error, match=message):
        kernels.quantize_int8(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"packed": torch.zeros(3, 64)},
            r"packed must be int8 of shape \(3, 64\), got",
        ),
        ({"packed": torch.zeros(3, 10, dtype=torch.int8)}, r"packed must be int8 of shape"),
        ({"scale": torch.ones(3).double()}, r"scale must be float32 \(N,\), got torch.float64"),
        ({"bias": torch.ones(2)}, r"bias must have shape \(3,\), got \(2,\)"),
        ({"x": torch.ones(1, 10, dtype=torch.int64)}, "x must be a floating tensor"),
        ({"scale": 1.0}, "scale must be a tensor, got float"),
    ],
)
def test_errors_name_the_argument(change, message):
    good = {"x": torch.ones(1, 10), "packed": torch.zeros(3, 64, dtype=torch.int8),
            "scale": torch.ones(3)}  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.linear_int8(**(good | change))


def test_shapes_that_do_not_fit_are_named(cpu_backend):
    x, weight, bias = draw(2, 5, 8, torch.float32)
    with pytest.raises(ValueError, match="weight must have x's features"):
        kernels.linear(x[:, :7], weight)
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\), got \(4,\)"):
        kernels.linear(x, weight, bias[:4])
