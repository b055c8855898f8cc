"""linear: PyTorch's product, computed in float32 if this machine has no fast 16-bit product."""

import sys

import pytest
import torch
import torch.nn.functional as F
from util import DEVICE, assert_close_to

from gpt2 import kernels
from gpt2.kernels.matmul import LARGE, matmul_transposed, prefers_onednn

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=[True, False], ids=["multiplied", "widened"])
def machine(request, monkeypatch):
    """A machine with fast 16-bit products, and one without."""
    linear = sys.modules["gpt2.kernels.matmul"]
    monkeypatch.setattr(linear, "_cpu_has_fast_matmul", lambda dtype: request.param)
    return linear


@pytest.mark.parametrize("dtype", HALVES)
def test_linear(dtype, machine):
    x, weight, bias = torch.randn(5, 33), torch.randn(17, 33), torch.randn(17)
    inputs = [t.to(DEVICE, HALVES[dtype]).requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    plain = [t.detach().clone().requires_grad_() for t in inputs]
    results = []
    for call, tensors in ((kernels.linear, inputs), (F.linear, exact), (F.linear, plain)):
        y = call(*tensors)
        torch.manual_seed(0)
        dy = torch.randn(5, 17, device=DEVICE).to(HALVES[dtype]).to(y.dtype)
        results.append((y, *torch.autograd.grad(y, tensors, dy)))
    assert all(r.dtype == HALVES[dtype] for r in results[0])
    for name, value, truth, yardstick in zip(
        ("y", "dx", "dweight", "dbias"), *results, strict=True
    ):
        assert_close_to(truth, value, yardstick, name, factor=2)


def test_autocast_decides_the_dtype(machine):
    x, weight = torch.randn(2, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, expected = kernels.linear(x, weight), F.linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert_close_to(F.linear(x.bfloat16().double(), weight.bfloat16().double()), y, expected, "y",
                    factor=2)  # fmt: skip
    assert kernels.linear(x, weight).dtype == torch.float32


def test_operands_are_rounded_as_autocast_rounds_them(machine):
    """1 + 2^-10 is 1 in bfloat16: the difference to 1 must be 0, although the sum could hold it."""
    x, weight = torch.tensor([[1 + 2**-10, 1.0]]), torch.tensor([[1.0, -1.0]])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert kernels.linear(x.to(DEVICE), weight.to(DEVICE)).item() == 0


def test_many_rows_of_float32_are_pytorch_s_own(machine):
    x, weight, bias = torch.randn(9, 8), torch.randn(3, 8), torch.randn(3)
    assert torch.equal(kernels.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU multiplies 16-bit numbers")
def test_wide_products_are_float32(monkeypatch, machine):
    """float32 if 16 bits are slow; autocast does not narrow it."""
    seen = []

    def spy(x, *rest):
        narrowed = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
        seen.append(torch.bfloat16 if narrowed else x.dtype)
        return x

    monkeypatch.setattr(machine.F, "linear", spy)
    x = torch.ones(2, 2)
    machine.matmul(x.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        machine.matmul(x, x)
    assert seen == 2 * [torch.bfloat16 if machine._cpu_has_fast_matmul(None) else torch.float32]


@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "mm"])
def test_logits(onednn):
    """x weight^T by either of PyTorch's libraries. MKL fills `out`; oneDNN allocates its result."""
    x, weight = torch.randn(5, 33, device=DEVICE), torch.randn(1001, 33, device=DEVICE)
    out = torch.empty(5, 1001, device=DEVICE)
    if onednn and (DEVICE != "cpu" or not torch.backends.mkldnn.is_available()):
        pytest.skip("no oneDNN here")
    y = matmul_transposed(x, weight, None if onednn else out)
    assert onednn or y is out
    assert_close_to(x.double() @ weight.double().T, y, x @ weight.T, "y", factor=2)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.to("meta"),
        lambda x: x.t(),
        lambda x: x[:, ::2],
    ],
    ids=["float64", "bfloat16", "meta", "transposed", "strided"],
)
@pytest.mark.parametrize("which", ["both", "x", "weight"])
def test_what_onednn_is_not_asked_for(which, change):
    x, weight = torch.ones(2, 4), torch.ones(LARGE // 8, 4)
    assert prefers_onednn(x, weight) == torch.backends.mkldnn.is_available()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not prefers_onednn(x, weight)
    assert not prefers_onednn(x[:1], weight)
    x = x if which == "weight" else change(x)
    weight = weight if which == "x" else change(weight)
    if which == "weight" and weight.is_contiguous():
        pytest.skip("dtype and device are x's")
    assert not prefers_onednn(x, weight)
