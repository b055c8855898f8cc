"""layer_norm and add_layer_norm against float64, and the typical bugs of a norm."""

import itertools

import pytest
import torch
from inputs import norm_inputs, sparse_rows, tensor
from util import DEVICE, DTYPES, assert_close_to, bits_equal, check_op, guarded

from gpt2 import kernels
from gpt2.kernels import reference
from gpt2.kernels.triton import MAX_ROW

WIDTHS = (1, 3, 17, 127, 257, 768, 769, 1600, 8192)


def terms(x):
    """dx is rstd times a difference that cancels, completely at C = 1. In float32 the rounding of
    numbers of that size remains."""
    if x.dtype != torch.float32 or x.shape[-1] > 16:
        return 0.0
    return 4 * (x.var(-1, correction=0) + 1e-5).rsqrt().max().item()


@pytest.mark.grid
@pytest.mark.parametrize("weights", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 33], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("C", WIDTHS, ids=lambda C: f"C{C}")
def test_layer_norm(C, rows, dtype, weights, ran, kernel_backend):
    inputs = norm_inputs((rows, C), DTYPES[dtype], torch.float32 if weights == "fp32" else None)
    check_op("layer_norm", inputs, backend=kernel_backend, ran=ran, terms=terms(inputs["x"]))


@pytest.mark.grid
@pytest.mark.parametrize("weights", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 33], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("C", WIDTHS, ids=lambda C: f"C{C}")
def test_add_layer_norm(C, rows, dtype, weights, ran, kernel_backend):
    inputs = norm_inputs((rows, C), DTYPES[dtype], torch.float32 if weights == "fp32" else None)
    inputs = {"x": inputs.pop("x"), "residual": tensor(rows, C, dtype=DTYPES[dtype]), **inputs}
    s = inputs["x"] + inputs["residual"]
    check_op("add_layer_norm", inputs, backend=kernel_backend, ran=ran, terms=terms(s))


@pytest.mark.grid
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 5, 33], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("C", WIDTHS, ids=lambda C: f"C{C}")
def test_float32_stream(C, rows, dtype, ran, kernel_backend):
    """As under autocast: the branch x and the norm in 16 bits, the stream s in float32."""
    inputs = norm_inputs((rows, C), DTYPES[dtype], torch.float32)
    inputs = {"x": inputs.pop("x"), "residual": guarded(tensor(rows, C)), **inputs}
    s = inputs["x"] + inputs["residual"]
    check_op("add_layer_norm", inputs, backend=kernel_backend, ran=ran, terms=terms(s))
    with kernels.use(kernel_backend):
        y, got = kernels.add_layer_norm(**inputs)
    assert y.dtype == DTYPES[dtype] and bits_equal(got, s)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float32_stream_is_not_rounded(dtype, kernel_backend):
    """Neither s nor its gradient is rounded to 16 bits, in which 1 + 2^-20 would be 1 and 65504
    float16's largest number."""
    x, row = torch.zeros(3, 16, dtype=DTYPES[dtype], device=DEVICE), tensor(16)
    residual = (1e6 * (1 + 2.0**-20) + tensor(3, 16)).requires_grad_()
    with kernels.use(kernel_backend):
        y, s = kernels.add_layer_norm(x, residual, row, row)
    assert bits_equal(s, residual) and y.isfinite().all()
    ds = 1e6 * (1 + 2.0**-20) + tensor(3, 16)
    (got,) = torch.autograd.grad(s, residual, ds)
    assert bits_equal(got, ds)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float32_stream_of_views(dtype, ran, kernel_backend):
    x, residual = tensor(9, 66, dtype=DTYPES[dtype])[::2, 1:34], tensor(33, 5).t()
    inputs = {"x": x, "residual": residual, "weight": tensor(33), "bias": tensor(33)}
    check_op("add_layer_norm", inputs, backend=kernel_backend, ran=ran)
    empty = {"x": x[:0], "residual": residual[:0], "weight": tensor(33), "bias": tensor(33)}
    check_op("add_layer_norm", empty, backend=kernel_backend, ran=ran)


@pytest.mark.parametrize("given", ["neither", "weight", "bias"])
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_weight_and_bias_may_be_left_out(op, given, ran, backend):
    inputs = {"x": tensor(5, 17)} | ({"residual": tensor(5, 17)} if op == "add_layer_norm" else {})
    if given != "neither":
        inputs[given] = tensor(17)
    check_op(op, inputs, backend=backend, ran=ran)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_norms_under_autocast_keep_the_dtypes_of_their_inputs(dtype, backend):
    """The dtypes are PyTorch's. A model's stream was rounded to 16 bits."""
    x, row = tensor(3, 16), tensor(16)
    half = x.to(dtype)
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[dtype]
    with kernels.use(backend), torch.autocast(DEVICE, dtype):
        assert kernels.layer_norm(x, row, row).dtype == torch.float32
        for residual, stream in (
            (x, torch.float32),
            (half, dtype),
            (half.to(other), torch.float32),
        ):
            y, s = kernels.add_layer_norm(half, residual, row, row)
            assert (y.dtype, s.dtype) == (dtype, stream)
            assert bits_equal(s, half + residual)
        y, s = kernels.add_layer_norm(x, half, row, row)
        assert y.dtype == s.dtype == torch.float32


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", (3, 17, 127, 257, 768, 769), ids=lambda C: f"C{C}")
@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_mean_far_from_zero(C, offset, dtype, ran, kernel_backend):
    """x = 1000 + small numbers: E[x^2] - mean^2 cancels in float32; unmasked lanes beyond C would
    dominate the variance with (0 - mean)^2; the rounding of the first mean must be corrected."""
    inputs = norm_inputs((5, C), DTYPES[dtype], offset=offset)
    check_op("layer_norm", inputs, backend=kernel_backend, ran=ran)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17,), (2, 17), (2, 3, 17), (2, 1, 3, 17), (1, 2, 1, 3, 17)])
def test_ranks(shape, dtype, ran, kernel_backend):
    check_op("layer_norm", norm_inputs(shape, DTYPES[dtype]), backend=kernel_backend, ran=ran)


VIEWS = {
    "every second row": lambda x: x[::2],
    "every second column": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
    "expanded": lambda x: x[:1].expand(7, -1),
    "unaligned": lambda x: x.flatten()[1:].view(-1, 31)[:5],
    "three dimensions": lambda x: x.view(4, 8, 32).transpose(0, 1),
}


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_views(op, view, dtype, ran, kernel_backend):
    x = VIEWS[view](tensor(32, 32, dtype=DTYPES[dtype]))
    inputs = {"x": x}
    if op == "add_layer_norm":
        inputs["residual"] = VIEWS[view](tensor(32, 32, dtype=DTYPES[dtype]))
    for name in ("weight", "bias"):
        inputs[name] = tensor(x.shape[-1], dtype=DTYPES[dtype])
    check_op(op, inputs, backend=kernel_backend, ran=ran)


def test_many_rows_per_program(kernel_backend):
    """The backward's programs process several tiles each, including a ragged last one."""
    inputs = norm_inputs((133, 40), torch.float32)
    check_op("layer_norm", inputs, backend=kernel_backend, ran=lambda _: None)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_empty(shape, backend):
    x, weight = tensor(*shape).requires_grad_(), tensor(shape[-1]).requires_grad_()
    with kernels.use(backend):
        y, s = kernels.add_layer_norm(x, x, weight, weight)
        (y.sum() + s.sum() + kernels.layer_norm(x, weight, weight).sum()).backward()
    assert y.shape == s.shape == x.grad.shape == shape
    assert not weight.grad.any()


@pytest.mark.parametrize("used", ["norm", "sum", "both"])
def test_either_output_alone(used, kernel_backend):
    """The final norm's sum is never used, and a skip connection may use only the sum."""
    inputs = [tensor(5, 17).requires_grad_() for _ in range(2)]
    inputs += [tensor(17).requires_grad_() for _ in range(2)]

    def loss(y, s):
        return (y.square().sum() if used != "sum" else 0) + (
            s.square().sum() if used != "norm" else 0
        )

    with kernels.use(kernel_backend):
        got = torch.autograd.grad(loss(*kernels.add_layer_norm(*inputs)), inputs, allow_unused=True)
    want = torch.autograd.grad(loss(*reference.add_layer_norm(*inputs)), inputs, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, torch.zeros_like(g) if w is None else w, atol=1e-4)


def test_the_norm_sees_the_sum_as_it_is_stored(kernel_backend):
    """In half precision s is rounded once; y is the norm of the stored numbers, not of more exact
    ones."""
    x, residual = tensor(4, 64, dtype=torch.bfloat16), tensor(4, 64, dtype=torch.bfloat16)
    weight, bias = tensor(64), tensor(64)
    with kernels.use(kernel_backend):
        y, s = kernels.add_layer_norm(x, residual, weight, bias)
        assert bits_equal(s, x + residual)
        assert bits_equal(y, kernels.layer_norm(s, weight, bias))


def test_eps(ran, kernel_backend):
    inputs = norm_inputs((3, 40), torch.float32)
    inputs["x"] = inputs["x"] * 1e-3
    check_op("layer_norm", inputs, backend=kernel_backend, ran=ran, eps=0.1)


def test_constant_rows(kernel_backend):
    """Variance 0: rstd = 1 / sqrt(eps), y = bias."""
    x, weight, bias = torch.full((3, 19), 7.0, device=DEVICE), tensor(19), tensor(19)
    with kernels.use(kernel_backend):
        y = kernels.layer_norm(x, weight, bias)
    assert_close_to(bias.double().expand(3, -1), y, bias.expand(3, -1), "y", factor=2)


@pytest.mark.parametrize("row", [0, 4])
def test_nan_stays_in_its_row(row, kernel_backend):
    x, weight, bias = tensor(5, 33), tensor(33), tensor(33)
    x[row, 7] = float("nan")
    x.requires_grad_()
    with kernels.use(kernel_backend):
        y = kernels.layer_norm(x, weight, bias)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for result in (y, dx):
        nan = result.isnan()
        assert nan[row].all() and nan.sum() == 33


def test_deterministic_and_independent_of_the_batch(kernel_backend):
    x, weight, bias = (
        t.requires_grad_() for t in norm_inputs((33, 769), torch.bfloat16, torch.float32).values()
    )
    dy = torch.randn_like(x)

    def run(x):
        with kernels.use(kernel_backend):
            y = kernels.layer_norm(x, weight, bias)
        return y, *torch.autograd.grad(y, (x, weight, bias), dy[: len(x)])

    first, second = run(x), run(x)
    assert all(map(bits_equal, first, second))
    y, dx, *_ = run(x[:1].detach().requires_grad_())
    assert bits_equal(y, first[0][:1]) and bits_equal(dx, first[1][:1])


def test_backward_twice_and_stride_0_gradients(kernel_backend):
    x, weight, bias = (t.requires_grad_() for t in norm_inputs((5, 17), torch.float32).values())
    with kernels.use(kernel_backend):
        y = kernels.layer_norm(x, weight, bias)
    first = torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True)
    second = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert all(map(bits_equal, first, second))


def test_every_subset_of_gradients(kernel_backend):
    tensors = norm_inputs((3, 17), torch.float32).values()
    want = None
    for needed in reversed(list(itertools.product([False, True], repeat=3))):
        leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]
        with kernels.use(kernel_backend):
            y = kernels.layer_norm(*leaves)
        if any(needed):
            y.square().sum().backward()
            want = want or [x.grad for x in leaves]
        for x, n, w in zip(leaves, needed, want, strict=True):
            assert bits_equal(x.grad, w) if n else x.grad is None


def test_same_output_with_and_without_gradients(kernel_backend):
    x, weight, bias = norm_inputs((5, 17), torch.bfloat16).values()
    with kernels.use(kernel_backend):
        plain = kernels.layer_norm(x, weight, bias)
        with torch.no_grad():
            assert bits_equal(plain, kernels.layer_norm(x, weight, bias))
        with torch.inference_mode():
            assert bits_equal(plain, kernels.layer_norm(x, weight, bias))
        assert bits_equal(plain, kernels.layer_norm(x.requires_grad_(), weight, bias))


def test_row_strides_that_overflow_int32(tmp_path, kernel_backend):
    """Rows are 2^30 elements apart, in a sparse file: row 2 starts at 2^31."""
    N, C = 5, 16
    weight = tensor(C)
    x = sparse_rows(tmp_path / "sparse", N, C, stride=2**30)
    with kernels.use(kernel_backend):
        y = kernels.layer_norm(x, weight, weight)
        assert bits_equal(y, kernels.layer_norm(x.clone(), weight, weight))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda a: a.update(weight=torch.ones(4)), ValueError, "weight must have the shape of x's"),
        (lambda a: a.update(bias=torch.ones(1, 5)), ValueError, "bias must have the shape of x's"),
        (lambda a: a.update(bias=a["bias"].half()), TypeError, "bias must have weight's dtype"),
        (lambda a: a.update(x=torch.tensor(1.0)), ValueError, "x must have a last dimension"),
        (lambda a: a.update(x=torch.ones(3, 5).long()), TypeError, "x must have a floating dtype"),
        (lambda a: a.update(eps=-1.0), ValueError, "eps must not be negative, got -1.0"),
        (lambda a: a.update(weight=1.0), TypeError, "weight must be a tensor, got float"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"x": torch.randn(3, 5), "weight": torch.ones(5), "bias": torch.ones(5)}
    change(arguments)
    with pytest.raises(error, match=message):
        kernels.layer_norm(**arguments)


def test_errors_of_add_layer_norm():
    x, weight = torch.randn(3, 5), torch.ones(5)
    with pytest.raises(ValueError, match=r"residual must have x's shape \(3, 5\), got \(2, 5\)"):
        kernels.add_layer_norm(x, x[:2], weight, weight)
    with pytest.raises(TypeError, match=r"residual must have dtype .*32, got torch.float16"):
        kernels.add_layer_norm(x, x.half(), weight, weight)
    expected = r"residual must have dtype torch.float16 or torch.float32, got torch.float64"
    with pytest.raises(TypeError, match=expected):
        kernels.add_layer_norm(x.half(), x.double(), weight, weight)


@pytest.mark.triton
def test_longer_rows_fall_back_with_a_reason(monkeypatch):
    monkeypatch.setitem(kernels.dispatch.PRIORITY, "layer_norm", ("triton",))
    x, weight = tensor(1, MAX_ROW + 1), tensor(MAX_ROW + 1)
    reason = f"rows of {MAX_ROW + 1} are longer than {MAX_ROW}"
    with kernels.use("triton"), pytest.raises(kernels.BackendUnavailable, match=reason):
        kernels.layer_norm(x, weight, weight)
    kernels.dispatch._said.clear()
    with pytest.warns(UserWarning, match=f"layer_norm falls back.*{reason}"):
        kernels.layer_norm(x, weight, weight)
