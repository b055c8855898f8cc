"""The cpu backend's guarantees: the same bits on any number of threads and on every instruction set
that runs here; no lasting change of the process; no instruction outside its instruction set."""

import pytest
import torch
from backends import cpu_set
from cpu_ops import OPS, large_ops, run, tensor, threads
from util import DTYPES, as_tuple, bits_equal, check_op, guarded

from gpt2 import kernels

# ---- the same bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_threads(op, dtype, cpu_backend):
    if op == "linear_cross_entropy":
        pytest.skip("its products are PyTorch's, which promises nothing; its row kernel is below")
    call, inputs = large_ops(DTYPES[dtype])[op]
    with kernels.use(cpu_backend):
        with threads(1):
            want = run(call, inputs)
        for n in (2, 3, 8, 16):  # attention: whole heads per thread and, at 8 and 16, shared ones
            with threads(n):
                assert all(map(bits_equal, want, run(call, inputs))), f"{n} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_rows_in_place_do_not_depend_on_threads(dtype, cpu_backend):
    fused = torch.ops.gpt2_kernels_cpu.cross_entropy_fwd_bwd_
    logits, targets = tensor(70, 1024, dtype=DTYPES[dtype]), torch.randint(1001, (70,))
    results = []
    for n in (1, 2, 3, 8):
        with threads(n):
            x = logits.clone()
            results.append((fused(x, targets, -1, 0.0, 1001), x))
    for result in results[1:]:
        assert all(map(bits_equal, results[0], result))
    alone = logits[9:10].clone()
    assert bits_equal(fused(alone, targets[9:10], -1, 0.0, 1001), results[0][0][9:10])
    assert bits_equal(alone, results[0][1][9:10])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in OPS if "cross_entropy" not in op and op != "gelu"])
def test_a_row_alone_and_in_a_batch(op, dtype, cpu_backend):
    """Outputs and row-wise gradients. The last row has the most ragged position."""
    call, inputs = large_ops(DTYPES[dtype])[op]
    rows = len(inputs[0])
    shared = {i for i, x in enumerate(inputs) if x.dim() == 1}
    with kernels.use(cpu_backend):
        leaves = [x.detach().requires_grad_() for x in inputs]
        last = [
            (x if i in shared else x[rows - 1 :]).detach().requires_grad_()
            for i, x in enumerate(inputs)
        ]
        ys, zs = as_tuple(call(*leaves)), as_tuple(call(*last))
        dys = [torch.randn_like(y) for y in ys]
        dxs = torch.autograd.grad(ys, leaves, dys)
        dzs = torch.autograd.grad(zs, last, [dy[rows - 1 :] for dy in dys])
    pairs = [*zip(ys, zs, strict=True)]
    pairs += [(a, b) for i, (a, b) in enumerate(zip(dxs, dzs, strict=True)) if i not in shared]
    if op == "dropped_attention":
        assert rows == 1  # dropout depends on the position in the batch
    for whole, alone in pairs:
        assert bits_equal(whole[rows - 1 :], alone)


def test_loss_of_a_row_alone_and_in_a_batch(cpu_backend):
    x, targets = tensor(70, 1001), torch.randint(1001, (70,))
    losses, stats = torch.ops.gpt2_kernels_cpu.cross_entropy_fwd(x, targets, -1, 0.0)
    dlosses = tensor(70)
    dx = torch.ops.gpt2_kernels_cpu.cross_entropy_bwd(dlosses, x, targets, stats, -1, 0.0)
    one = slice(41, 42)
    loss, stat = torch.ops.gpt2_kernels_cpu.cross_entropy_fwd(x[one], targets[one], -1, 0.0)
    assert bits_equal(loss, losses[one]) and bits_equal(stat, stats[:, one])
    args = (dlosses[one], x[one], targets[one], stat, -1, 0.0)
    assert bits_equal(torch.ops.gpt2_kernels_cpu.cross_entropy_bwd(*args), dx[one])


# ---- gradients in float64


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    """Against finite differences; the scalar set has kernels for float64."""
    row, targets = tensor(11).double(), torch.tensor([3, -100, 0, 12, 5])
    small = {
        "causal_attention": [tensor(2, n, 2, 5) for n in (4, 6, 6)],
        "dropped_attention": [tensor(1, 6, 2, 5) for _ in range(3)],
        "causal_attention_qkv": [tensor(1, 5, 3 * 3 * 4)],
        "layer_norm": [tensor(5, 11), row, row + 1],
        "add_layer_norm": [tensor(5, 11), tensor(5, 11), row, row + 1],
        "gelu": [3 * tensor(2, 11)],
        "bias_gelu": [3 * tensor(5, 11), row],
        "cross_entropy": [tensor(5, 13)],
        "linear_cross_entropy": [tensor(5, 7), tensor(13, 7)],
    }
    call = large_ops(torch.float32)[op][0]
    if op == "cross_entropy":
        call = lambda x: kernels.cross_entropy(x, targets)  # noqa: E731
    if op == "linear_cross_entropy":
        call = lambda x, w: kernels.linear_cross_entropy(x, w, targets)  # noqa: E731
    leaves = [x.double().requires_grad_() for x in small[op]]
    with cpu_set("cpu-scalar"), kernels.use("cpu"):
        assert all(y.dtype == torch.float64 for y in as_tuple(call(*leaves)))
        assert torch.autograd.gradcheck(call, leaves)


# ---- numbers


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_half_precision_number_is_read_and_rounded(dtype, cpu_backend):
    """s = x + residual in float32, rounded to nearest even: subnormals, infinities, overflow."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    weight = torch.ones(64)
    for residual in (torch.zeros_like(x), x, x.flip(0), x[torch.randperm(2**16)]):
        with kernels.use(cpu_backend):
            _, s = kernels.add_layer_norm(x.view(-1, 64), residual.view(-1, 64), weight, weight)
        s, want = s.flatten(), x + residual
        assert torch.equal(s.isnan(), want.isnan())
        finite = ~want.isnan()
        assert bits_equal(s[finite], want[finite])


def test_exp_keeps_its_bound(cpu_backend):
    """dx = exp(x - m) / l with m = 0 and l = 1 is exp itself: its error is exp2's and that of the
    product x log2(e)."""
    x = torch.linspace(-86, 0, 100001)[None]
    args = (torch.ones(1), x, torch.tensor([0]), torch.tensor([[0.0], [1.0]]), -1, 0.0)
    p = torch.ops.gpt2_kernels_cpu.cross_entropy_bwd(*args)[0, 1:].double()
    exact = x[0, 1:].double().exp()
    assert ((p / exact - 1).abs() <= 1.2e-7 + 1.5 * 2.0**-24 * x[0, 1:].abs()).all()
    assert p[-1] == 1


# ---- memory


def test_what_the_library_allocates_is_poisoned(cpu_backend):
    """The statistics of empty rows are never written, so they show the initial memory of all
    outputs."""
    x, row = torch.ones(3, 0), torch.ones(0)
    _, stats = torch.ops.gpt2_kernels_cpu.layer_norm_fwd(x, row, row, 1e-5)
    assert stats.shape == (2, 3) and stats.isnan().all()


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(1, 140), ids=lambda n: f"n{n}")
def test_every_tail(n, dtype, cpu_backend, ran):
    """Rows of every length up to two steps of the widest vectors, between bands of NaN."""
    x = guarded(tensor(3, n, dtype=DTYPES[dtype]))
    row, bias = (guarded(tensor(n, dtype=DTYPES[dtype])) for _ in range(2))
    check_op("gelu", {"x": x}, backend=cpu_backend, ran=ran)
    check_op("bias_gelu", {"x": x, "bias": bias}, backend=cpu_backend, ran=ran)
    cancels = 4 * (x.float().var(-1, correction=0) + 1e-5).rsqrt().max().item() if n <= 16 else 0
    inputs = {"x": x, "weight": row, "bias": bias}
    check_op("layer_norm", inputs, backend=cpu_backend, ran=ran, terms=cancels)
    targets = torch.randint(n, (3,))
    check_op(
        "cross_entropy", {"logits": x}, backend=cpu_backend, ran=ran, terms=1 / 3, targets=targets
    )


# ---- the process


# ---- the library's code
