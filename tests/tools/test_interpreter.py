"""The interpreter that runs the kernel tests, against torch's arithmetic.

With the interpreter that Triton ships (3.6 to 3.7.1) every bfloat16 test below fails: it adds and
multiplies bit patterns (a dot product is off by 1e10, a sum is NaN) and casts by truncation.
"""

import os
import warnings

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported, as in conftest
triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU here, not in the interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402
import triton_interpreter  # noqa: E402
from copy_kernel import copy  # noqa: E402
from triton_interpreter import KernelFault  # noqa: E402

triton_interpreter.install()
N = 1024


def random_bits(seed, n=N):
    """Random bits: all bfloat16 values are equally likely, with zeros, denormals, infinities and
    NaNs."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16, generator=generator)
    bits[:12] = torch.tensor(
        [0, -(2**15), 0x7F80, -0x80, 0x7FC0, 1, -0x7FFF, 0x7F7F, 0x80, 0x3F80, 0x3F81, 0x7F]
    )
    return bits[torch.randperm(n, generator=generator)].view(torch.bfloat16)


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan], expected[~nan])


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "max":
        out = tl.maximum(x, y)
    elif OP == "min":
        out = tl.minimum(x, y)
    elif OP == "less":
        out = x < y
    elif OP == "equal":
        out = x == y
    elif OP == "where":
        out = tl.where(x < y, x, y)
    elif OP == "fma":
        out = tl.fma(x, y, x)
    elif OP == "clamp":
        out = tl.clamp(x, -1.0, 1.0)
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "neg":
        out = -x
    elif OP == "scalar":
        out = 3 * x + 0.1
    elif OP == "cast":
        out = x
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty))


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": lambda x, y: torch.where(y.isnan() | (x >= y), x, y),  # as max.f32: NaN loses
    "min": lambda x, y: torch.where(y.isnan() | (x <= y), x, y),
    "less": lambda x, y: (x < y).to(x.dtype),
    "equal": lambda x, y: (x == y).to(x.dtype),
    "where": lambda x, y: torch.where(x < y, x, y),
    "fma": lambda x, y: (x.double() * y.double() + x.double()).float().to(x.dtype),
    "abs": lambda x, y: x.abs(),
    "neg": lambda x, y: -x,
    "scalar": lambda x, y: 3 * x + torch.tensor(0.1, dtype=x.dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_equals_torch(op, dtype):
    x, y = random_bits(0).view(dtype), random_bits(1).view(dtype)
    x[100:200] = torch.randn(100).to(dtype)  # neighbours, where rounding is seen
    y[100:200] = torch.randn(100).to(dtype)
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, OP=op, N=N)
    assert_same(out, BINARY[op](x, y))


def cast(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    _binary_kernel[(1,)](x, x, out, OP="cast", N=x.numel())
    return out


def test_every_bf16_survives_the_way_to_fp32_and_back():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = cast(x, torch.float32)
    assert_same(wide, x.float())
    assert_same(cast(wide, torch.bfloat16), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fp32_rounds_to_nearest_even(dtype):
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    x[:1024] = torch.tensor([0x7F7FFFFF], dtype=torch.int32).view(torch.float32)  # overflows
    ties = random_bits(3, 4096).float().view(torch.int32) | 0x8000  # halfway between two bf16
    x[1024:5120] = ties.view(torch.float32)
    x[5120:7168] = torch.randn(2048) * 1e-6  # denormal in float16
    x[7168:8192] = torch.randn(1024) * 1e-39  # denormal in bfloat16
    assert_same(cast(x, dtype), x.to(dtype))


def test_integers_and_bf16():
    x = torch.tensor([0.0, -1.5, 1.5, 255.9, -(2.0**20), 3.0, 7.0, 1e4]).bfloat16()
    assert_same(cast(x, torch.int32), x.to(torch.int32))
    i = torch.tensor([0, -1, 257, 2**24 + 1, -(2**31), 2**31 - 1, 3, 511], dtype=torch.int32)
    assert_same(cast(i, torch.bfloat16), i.to(torch.bfloat16))


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, arg_ptr, R: tl.constexpr, C: tl.constexpr):
    rows = tl.arange(0, R)
    x = tl.load(x_ptr + rows[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(sum_ptr + rows, tl.sum(x, 1))
    tl.store(max_ptr + rows, tl.max(x, 1).to(tl.bfloat16))
    tl.store(arg_ptr + rows, tl.argmin(x, 1))


def test_reductions_of_bf16():
    """Sums of small integers are exact in float32, so they round once to one value."""
    x = torch.randint(-128, 128, (8, 256), generator=torch.Generator().manual_seed(4)).bfloat16()
    x[1, 3], x[2, 5], x[3, :] = float("inf"), float("nan"), float("-inf")
    total, top = torch.empty(8).bfloat16(), torch.empty(8).bfloat16()
    arg = torch.empty(8, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _reduce_kernel[(1,)](x, total, top, arg, R=8, C=256)
    assert_same(total, x.float().sum(1).bfloat16())
    assert_same(top, x.masked_fill(x.isnan(), float("-inf")).amax(1))  # NaN loses
    keep = torch.tensor([0, 1, 4, 5, 6, 7])
    assert torch.equal(arg[keep].long(), x[keep].float().argmin(1))


@triton.jit
def _dot_kernel(
    a_ptr, b_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    acc = tl.full([M, N], 0.5, tl.float32)
    acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_in_fp32(dtype):
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(32, 64, generator=generator).to(dtype)
    b = torch.randn(16, 64, generator=generator).to(dtype)
    out = torch.empty(32, 16)
    _dot_kernel[(1,)](a, b, out, 32, 16, 64, "ieee")
    exact = a.double() @ b.double().T
    bound = 64 * 2**-24 * (a.double().abs() @ b.double().abs().T + 0.5)
    assert ((out - 0.5 - exact).abs() <= bound).all()
    big = torch.full((16, 64), 250.0).to(dtype)  # 4e6: past float16, which must not accumulate
    _dot_kernel[(1,)](big, big, out[:16], 16, 16, 64, "ieee")
    assert (out[:16] == 64 * 250.0**2 + 0.5).all()


def test_dot_in_tf32_loses_bits():
    """The default of tl.dot for float32 on NVIDIA is TF32: a kernel without "ieee" must show the
    lost bits."""
    a = torch.full((16, 16), 1 + 2.0**-12)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, a, out, 16, 16, 16, "ieee")
    assert (out - 0.5 > 16).all()
    _dot_kernel[(1,)](a, a, out, 16, 16, 16, None)
    assert (out - 0.5 == 16).all()


@triton.jit
def _argument_kernel(x_ptr, out_ptr, scale, flag, n):
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.static_assert((x * scale).dtype == tl.float32)
    tl.static_assert((x * 0.1).dtype == tl.bfloat16)
    tl.static_assert((x / x).dtype == tl.float32)  # there is no 16-bit division
    if flag:
        tl.store(out_ptr + offs, x * scale, mask=offs < n)


def test_float_arguments_are_fp32_tensors():
    x, out = torch.randn(13).bfloat16(), torch.full((13,), float("nan"))
    _argument_kernel[(1,)](x, out, 0.1, False, 13)
    assert out.isnan().all()
    _argument_kernel[(1,)](x, out, 0.1, True, 13)
    assert torch.equal(out, x.float() * torch.tensor(0.1))


@triton.jit
def _assert_kernel(x_ptr, STATIC: tl.constexpr):
    tl.static_assert(STATIC == 1, "never")
    tl.device_assert(tl.load(x_ptr) == 1, "not one")


def test_assertions_are_on():
    _assert_kernel[(1,)](torch.ones(1), 1)
    with pytest.raises(triton_interpreter.InterpreterError, match="never"):
        _assert_kernel[(1,)](torch.ones(1), 2)
    with pytest.raises(triton_interpreter.InterpreterError, match="not one"):
        _assert_kernel[(1,)](torch.zeros(1), 1)


@pytest.mark.parametrize("sides", [(8, 16, 16), (16, 8, 16), (16, 16, 8)], ids=str)
def test_dot_below_16(sides):
    M, N, K = sides
    a, b = torch.ones(M, K).bfloat16(), torch.ones(N, K).bfloat16()
    with pytest.raises(triton_interpreter.InterpreterError, match="16"):
        _dot_kernel[(1,)](a, b, torch.empty(M, N), M, N, K, None)


@triton.jit
def _name_kernel(out_ptr):
    tl.store(out_ptr, math.pi)  # noqa: F821


def test_names_of_the_interpreter_do_not_leak_into_kernels():
    """Triton's interpreter copies its globals, such as math and np, into the module of every
    kernel."""
    with pytest.raises(triton_interpreter.InterpreterError, match="name 'math' is not defined"):
        _name_kernel[(1,)](torch.zeros(1))


@triton.jit
def _exp_kernel(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, _exp_log(x))


@triton.jit
def _exp_log(x):
    return tl.log(-tl.exp2(x)) + tl.sqrt(-x) + x / 0.0


def test_floating_point_is_silent_and_the_language_is_restored():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _exp_kernel[(1,)](torch.tensor([1e4]), torch.empty(1))
    with pytest.raises(KernelFault):
        copy(torch.ones(8), torch.ones(8), 8, shift=8)
    assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.math.exp2)
    with pytest.raises(RuntimeError, match="launch it on a grid"):
        _exp_log(torch.ones(1))
