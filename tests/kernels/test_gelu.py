"""gelu and bias_gelu against float64, and their typical bugs."""

import math

import pytest
import torch
from util import DEVICE, DTYPES, assert_close_to, bits_equal, check_op, guarded

from gpt2 import kernels

SIZES = (1, 2, 17, 255, 2047, 2048, 2049, 5000)


def tensor(*shape, dtype=torch.float32):
    """Random numbers, the first of them not negative: the reference's 1 + tanh is exactly 0 far in
    the left tail, and a tensor of such numbers alone would leave no room for rounding."""
    x = 3 * torch.randn(*shape, device=DEVICE).to(dtype)
    x.view(-1)[:1].abs_()
    return x


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_gelu(n, scale, dtype, ran, kernel_backend):
    x = guarded(tensor(n, dtype=DTYPES[dtype]) * scale)
    check_op("gelu", {"x": x}, backend=kernel_backend, ran=ran)


@pytest.mark.grid
@pytest.mark.parametrize("weights", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", (1, 3, 17, 257, 768, 1024, 1025, 3072), ids=lambda C: f"C{C}")
@pytest.mark.parametrize("N", (1, 2, 5, 33), ids=lambda N: f"N{N}")
def test_bias_gelu(N, C, dtype, weights, ran, kernel_backend):
    bias = guarded(tensor(C, dtype=torch.float32 if weights == "fp32" else DTYPES[dtype]))
    x = guarded(tensor(N, C, dtype=DTYPES[dtype]))
    check_op("bias_gelu", {"x": x, "bias": bias}, backend=kernel_backend, ran=ran)


VIEWS = {
    "scalar": lambda x: x[0, 0],
    "vector": lambda x: x[0],
    "five dimensions": lambda x: x.view(2, 2, 4, 2, 32),
    "every second row": lambda x: x[::2],
    "every second column": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
    "expanded": lambda x: x[:1].expand(7, -1),
    "unaligned": lambda x: x.flatten()[1:],
}


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, dtype, ran, kernel_backend):
    x = VIEWS[view](tensor(32, 32, dtype=DTYPES[dtype]))
    check_op("gelu", {"x": x}, backend=kernel_backend, ran=ran)
    if x.dim():
        bias = tensor(x.shape[-1], dtype=DTYPES[dtype])
        check_op("bias_gelu", {"x": x, "bias": bias}, backend=kernel_backend, ran=ran)


def test_the_tanh_form(backend):
    """GPT-2's weights were trained with the tanh form; the exact erf form differs by 5e-4."""
    x = torch.linspace(-6, 6, 1001, device=DEVICE, dtype=torch.float32)
    d = x.double()
    tanh = 0.5 * d * (1 + torch.tanh(math.sqrt(2 / math.pi) * (d + 0.044715 * d**3)))
    erf = 0.5 * d * (1 + torch.erf(d / math.sqrt(2)))
    with kernels.use(backend):
        y = kernels.gelu(x)
    assert_close_to(tanh, y, tanh.float(), "y", factor=2)
    assert (y - erf).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype, kernel_backend):
    """Far from 0 the derivative is exactly 0 or 1, but (1 - tanh^2) u' would be 0 * inf."""
    info = torch.finfo(DTYPES[dtype])
    x = [-math.inf, -info.max, -1e4, -50.0, -info.tiny, -0.0, 0.0, info.tiny, 50.0, 1e4, info.max]
    x = torch.tensor([*x, math.inf, math.nan], device=DEVICE, dtype=DTYPES[dtype]).requires_grad_()
    with kernels.use(kernel_backend):
        y = kernels.gelu(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y[1:5].tolist() == [0, 0, 0, y[4].item()] and y[4] <= 0
    assert y[8:12].tolist() == x[8:12].tolist()
    assert dx[1:4].tolist() == [0, 0, 0] and dx[8:11].tolist() == [1, 1, 1]
    assert dx[4:8].tolist() == [0.5] * 4
    assert y[-1].isnan() and dx[-1].isnan()


def test_left_tail_keeps_its_relative_accuracy(kernel_backend):
    """0.5 x (1 + tanh(u)) cancels for x < -4; x sigmoid(2u) does not."""
    x = torch.linspace(-8, -4, 100, device=DEVICE)
    with kernels.use(kernel_backend):
        y = kernels.gelu(x).double()
    u = math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() * torch.sigmoid(2 * u)
    assert ((y - exact) / exact).abs().max() < 1e-5


def test_gradient_on_the_right_keeps_its_accuracy(kernel_backend):
    """g (1 - g) loses about ten roundings to cancellation near g = 1; e g^2 does not."""
    x = torch.linspace(2, 9, 500, device=DEVICE).requires_grad_()
    with kernels.use(kernel_backend):
        (dx,) = torch.autograd.grad(kernels.gelu(x).sum(), x)
    d = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(kernels.reference.gelu(d).sum(), d)
    assert_close_to(exact, dx, exact.float(), "dx", factor=3)


def test_nan_stays_in_its_place(kernel_backend):
    x, bias = tensor(5, 33), tensor(33)
    x[2, 3] = math.nan
    x.requires_grad_()
    with kernels.use(kernel_backend):
        y = kernels.bias_gelu(x, bias)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for result in (y, dx):
        assert result.isnan().sum() == 1 and result[2, 3].isnan()


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)], ids=str)
def test_empty(shape, backend):
    x, bias = tensor(*shape).requires_grad_(), tensor(shape[-1]).requires_grad_()
    with kernels.use(backend):
        y = kernels.gelu(x) + kernels.bias_gelu(x, bias)
        y.sum().backward()
    assert y.shape == x.grad.shape == shape and not bias.grad.any()


def test_deterministic_independent_of_the_batch_and_of_gradients(kernel_backend):
    x, bias = tensor(133, 1025, dtype=torch.bfloat16), tensor(1025)
    dy = torch.randn_like(x)

    def run(x, bias):
        with kernels.use(kernel_backend):
            y = kernels.bias_gelu(x, bias)
        return y, *torch.autograd.grad(y, (x, bias), dy[: len(x)])

    bias.requires_grad_()
    first, second = run(x.requires_grad_(), bias), run(x, bias)
    assert all(map(bits_equal, first, second))
    y, dx, _ = run(x[:1].detach().requires_grad_(), bias)
    assert bits_equal(y, first[0][:1]) and bits_equal(dx, first[1][:1])
    with kernels.use(kernel_backend), torch.no_grad():
        assert bits_equal(first[0], kernels.bias_gelu(x, bias))


def test_backward_twice_and_subsets(kernel_backend):
    x, bias = tensor(3, 17).requires_grad_(), tensor(17).requires_grad_()
    with kernels.use(kernel_backend):
        y = kernels.bias_gelu(x, bias)
        both = torch.autograd.grad(y.sum(), (x, bias), retain_graph=True)
        again = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
        assert all(map(bits_equal, both, again))
        (dbias,) = torch.autograd.grad(kernels.bias_gelu(x.detach(), bias).sum(), bias)
        (dx,) = torch.autograd.grad(kernels.bias_gelu(x, bias.detach()).sum(), x)
        assert bits_equal(dx, both[0]) and bits_equal(dbias, both[1])


def test_saved_input_is_guarded_against_changes(kernel_backend):
    x = tensor(17).requires_grad_()
    z = x * 1
    with kernels.use(kernel_backend):
        y = kernels.gelu(z)
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch.int64"):
        kernels.gelu(torch.ones(3).long())
    with pytest.raises(ValueError, match=r"bias must have the shape of x's last dimension"):
        kernels.bias_gelu(torch.ones(2, 3), torch.ones(2))
