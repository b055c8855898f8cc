"""The errors that the interpreter detects: undefined lanes, stray accesses, overflow, races.

With the interpreter that Triton ships (3.6 to 3.7.1) every test here fails: stray loads read the
heap, overflow wraps, races are not detected.
"""

import os

import pytest
import torch
from copy_kernel import copy

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported, as in conftest
triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU here, not in the interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton_interpreter import KernelFault  # noqa: E402


@triton.jit
def _undefined_kernel(x_ptr, out_ptr, n):
    offs = tl.arange(0, 8)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n))
    tl.store(out_ptr + 8, tl.load(x_ptr, mask=n > 8, other=0.0))
    tl.store(out_ptr + 9, tl.load(x_ptr, mask=n > 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masked_lanes_without_other_are_undefined(dtype):
    """Triton's interpreter returns zero, so a kernel that relies on it fails only on a GPU."""
    x, out = torch.ones(8, dtype=dtype), torch.empty(10, dtype=dtype)
    _undefined_kernel[(1,)](x, out, 5)
    assert (out[:5] == 1).all() and out[5:8].isnan().all()
    assert out[8] == 0 and out[9].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_accesses_that_fit_pass(dtype):
    x = torch.arange(77).to(dtype)
    out = torch.empty_like(x)
    copy(x, out, 77)
    assert torch.equal(out, x)
    copy(x[13:], out[13:], 64, load=False, store=False)  # a full last tile, in a view
    copy(torch.empty(0), torch.empty(0), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load": False}, r"_copy_kernel, program \(2, 0, 0\): load of 4 bytes at byte 308 of x"),
        ({"store": False}, r"program \(2, 0, 0\): store of 4 bytes at byte 308 of out_ptr"),
        ({"shift": -1}, r"program \(0, 0, 0\): load of 4 bytes at byte -4 of x_ptr \(308 bytes\)"),
        ({"shift": 1}, r"load of 4 bytes at byte 308 of x_ptr"),
        ({"shift": 2**40}, r"load of 4 bytes at byte"),
    ],
    ids=["load-tail", "store-tail", "before", "one-past", "far"],
)  # fmt: skip
def test_stray_access(arguments, message):
    """T = 77 in tiles of 32; with T = 64 the same kernel is correct."""
    with pytest.raises(KernelFault, match=message):
        copy(torch.ones(77), torch.empty(77), 77, **arguments)


def test_an_access_may_not_hang_over_the_end():
    """The last byte counts: reads two float32 from six bytes of a storage."""
    x = torch.zeros(6, dtype=torch.uint8)[:4].view(torch.float32)
    copy(x, torch.empty(1), 1)
    with pytest.raises(KernelFault, match="load of 4 bytes at byte 4 of x_ptr"):
        copy(x, torch.empty(1), 1, shift=1)


@triton.jit
def _gather_kernel(x_ptr, y_ptr, out_ptr, n):
    offs = tl.arange(0, 16)
    pointers = tl.where(offs % 2 == 0, x_ptr + offs, y_ptr + offs)
    tl.store(out_ptr + offs, tl.load(pointers, mask=offs < n, other=0.0))


def test_one_load_may_span_storages():
    x, y, out = torch.zeros(16), torch.ones(16), torch.empty(16)
    _gather_kernel[(1,)](x, y, out, 16)
    assert torch.equal(out, torch.arange(16.0) % 2)
    with pytest.raises(KernelFault, match=r"at byte 4[08] of [xy]_ptr"):
        _gather_kernel[(1,)](x[:10].clone(), y[:10].clone(), out, 16)


@triton.jit
def _block_kernel(x_ptr, out_ptr, n, CHECK: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (n,), (1,), (0,), (16,), (0,))
    out = tl.make_block_ptr(out_ptr, (n,), (1,), (0,), (16,), (0,))
    value = tl.load(x, boundary_check=(0,), padding_option="zero")
    if CHECK:
        tl.store(out, value, boundary_check=(0,))
    else:
        tl.store(out, value)


@triton.jit
def _atomic_kernel(x_ptr, n):
    offs = tl.arange(0, 4)
    tl.atomic_add(x_ptr + offs, 1.0, mask=offs < n)


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_and_atomics_are_watched():
    x, out = torch.randn(13), torch.empty(13)
    _block_kernel[(1,)](x, out, 13, True)
    assert torch.equal(x, out)
    with pytest.raises(KernelFault, match="store of 4 bytes at byte 52 of out_ptr"):
        _block_kernel[(1,)](x, out, 13, False)
    total = torch.zeros(3)
    _atomic_kernel[(5,)](total, 3)
    assert (total == 5).all()
    with pytest.raises(KernelFault, match="atomic of 4 bytes at byte 12 of x_ptr"):
        _atomic_kernel[(5,)](total, 4)


@triton.jit
def _integer_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr):
    offs = tl.arange(0, 2)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "unsigned":
        unsigned = x.to(tl.uint32, bitcast=True) * y.to(tl.uint32, bitcast=True)
        out = unsigned.to(tl.int32, bitcast=True)
    tl.store(out_ptr + offs, out)


@pytest.mark.parametrize(
    ("op", "x", "y"),
    [("add", 2**31 - 1, 1), ("sub", -(2**31), 1), ("mul", 2**16, 2**15), ("mul", -(2**16), 2**16)],
)
def test_int32_overflow(op, x, y):
    def run(dtype, x, y):
        x, y = (torch.tensor([1, v], dtype=dtype) for v in (x, y))
        out = torch.empty(2, dtype=dtype)
        _integer_kernel[(1,)](x, y, out, op)
        return out[1].item()

    exact = {"add": x + y, "sub": x - y, "mul": x * y}[op]
    with pytest.raises(KernelFault, match=rf"_integer_kernel.*{op} overflows int32: {exact}"):
        run(torch.int32, x, y)
    assert run(torch.int64, x, y) == exact
    assert run(torch.int32, x // 2, y) == {"add": x // 2 + y, "sub": x // 2 - y}.get(op, x // 2 * y)


def test_unsigned_integers_may_wrap():
    x, out = torch.tensor([3, 2**31 - 1], dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    _integer_kernel[(1,)](x, x, out, "unsigned")
    assert out.tolist() == [9, 1]  # (2**31 - 1)**2 modulo 2**32


@triton.jit
def _row_kernel(x_ptr, out_ptr, row, stride):
    tl.store(out_ptr, tl.load(x_ptr + row * stride))


def test_int32_overflow_of_an_offset():
    """Row 3 of a tensor with a stride of 2**30 is at 3 * 2**30, past int32."""
    with pytest.raises(KernelFault, match="mul overflows int32"):
        _row_kernel[(1,)](torch.zeros(8), torch.zeros(1), 3, 2**30)


@triton.jit
def _random_kernel(seed, bits_ptr, uniform_ptr):
    offs = tl.arange(0, 64)
    tl.store(bits_ptr + offs, tl.randint(seed, offs).to(tl.int32, bitcast=True))
    tl.store(uniform_ptr + offs, tl.rand(seed, offs))


def test_philox_may_wrap():
    bits, uniform = torch.empty(64, dtype=torch.int32), torch.empty(64)
    _random_kernel[(1,)](2**31 - 1, bits, uniform)
    assert ((uniform >= 0) & (uniform < 1)).all() and 0.3 < uniform.mean() < 0.7
    assert bits.unique().numel() == 64


@triton.jit
def _race_kernel(x_ptr, out_ptr, LOAD, STORE):
    pid = tl.program_id(0)
    x = tl.load(x_ptr + tl.maximum(pid + LOAD, 0))
    tl.store(out_ptr + pid * STORE, x + 1)


@pytest.mark.parametrize(
    ("load", "store", "in_place", "message"),
    [
        (0, 0, False, r"program \(1, 0, 0\): store at byte 0 of out_ptr"),
        (-1, 1, True, r"program \(1, 0, 0\): load at byte 0 of x_ptr/out_ptr"),
        (1, 1, True, r"store at byte \d+ of x_ptr/out_ptr .* another program"),
    ],
    ids=["two-writers", "read-after-write", "write-after-read"],
)
def test_race(load, store, in_place, message):
    x = torch.zeros(9)
    out = x if in_place else torch.zeros(9)
    with pytest.raises(KernelFault, match=message):
        _race_kernel[(8,)](x, out, load, store)


def test_programs_that_mind_their_own_elements_do_not_race():
    x = torch.zeros(9)
    _race_kernel[(8,)](x, x, 0, 1)
    _race_kernel[(8,)](x, x, 0, 1)  # a new launch: the last launch's writes do not count
    assert torch.equal(x, torch.tensor([2.0] * 8 + [0]))


def test_grid_that_cuda_refuses():
    with pytest.raises(KernelFault, match="65535"):
        _race_kernel[(1, 65536)](torch.zeros(1), torch.zeros(1), 0, 0)
