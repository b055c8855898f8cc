"""linear_cross_entropy against float64: the logits never exist all at once."""

import contextlib
import sys
import weakref

import pytest
import torch
from inputs import targets_in, tensor
from on_the_gpu import OnTheGpu
from util import DEVICE, DTYPES, assert_close_to, bits_equal, check_op, guarded

from gpt2 import kernels
from gpt2.kernels import autograd, dispatch, reference
from gpt2.kernels.linear_cross_entropy import Chunks, chunk_rows

LOSS = sys.modules["gpt2.kernels.linear_cross_entropy"]  # gpt2.kernels has a function of this name


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks as small as a CPU's, so that few rows are several chunks on every backend."""
    monkeypatch.setattr(dispatch, "DEFAULT", Chunks(least=1))


@pytest.mark.grid
@pytest.mark.parametrize("ignored", ["some", "none"])
@pytest.mark.parametrize("weights", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", (1, 16, 77), ids=lambda C: f"C{C}")
@pytest.mark.parametrize("N", (1, 7, 33, 200), ids=lambda N: f"N{N}")
@pytest.mark.parametrize("V", (1, 65, 257, 1024), ids=lambda V: f"V{V}")
def test_linear_cross_entropy(V, N, C, dtype, weights, ignored, ran, accelerated):
    # dx is a difference, softmax @ weight - weight[target], of rows of weight. Probabilities also
    # move with the float32 rounding of a sum of C products, and of logits near 10 and their lse for
    # any C; PyTorch's error may not show this.
    eps = torch.finfo(DTYPES[dtype]).eps
    sums = max(4 * C, 32) * torch.finfo(torch.float32).eps / eps
    x = guarded(tensor(N, C, dtype=DTYPES[dtype]))
    weight = guarded(tensor(V, C, dtype=torch.float32 if weights == "fp32" else DTYPES[dtype]))
    check_op(
        "linear_cross_entropy", {"x": x, "weight": weight}, backend=accelerated, ran=ran,
        terms=(16 + sums) / N, rounding=eps * (C / N) ** 0.5,
        targets=targets_in(N, V, ignored),
    )  # fmt: skip


@pytest.mark.parametrize("N", [1, 8, 9, 64, 65, 520, 1000])
def test_chunks_cover_every_row_once(N, kernel_backend):
    rows = chunk_rows(N, Chunks(least=1))
    assert rows <= max(-(-N // 8), 64) or N >= 64
    assert 1 <= rows <= 8192 and -(-N // rows) <= 9
    if N >= 8:
        assert rows <= -(-N // 8) + 63, "an eighth of the logits at a time"
    x, weight, targets = tensor(N, 4), tensor(9, 4), targets_in(N, 9)
    with kernels.use(kernel_backend):
        loss = kernels.linear_cross_entropy(x, weight, targets)
    assert torch.allclose(loss, reference.linear_cross_entropy(x, weight, targets))


@pytest.mark.parametrize(
    "N, rows",
    [(0, 1), (1, 1), (4096, 4096), (4097, 4096), (32768, 4096), (40000, 5056), (10**6, 8192)],
)
def test_rows_of_a_chunk_on_a_gpu(N, rows):
    """Small chunks cost more there than they save: each adds to all of dweight."""
    assert chunk_rows(N, Chunks()) == rows


@pytest.mark.parametrize("adds", [True, False], ids=["addmm", "add"])
def test_chunks_in_half_precision_are_summed_in_float32(adds, monkeypatch):
    """On a GPU, by products whose out_dtype is float32; the CPU has none, so these stand in."""

    def mm(a, b, *, out_dtype, out=None):
        return torch.matmul(a.to(out_dtype), b.to(out_dtype), out=out)

    def addmm(total, a, b, *, out_dtype, out):
        assert adds, "this PyTorch cannot add to float32"
        return out.copy_(total + mm(a, b, out_dtype=out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(LOSS, "ADDS_TO_FLOAT32", adds)
    a, b = tensor(3, 64, 7, dtype=torch.bfloat16), tensor(3, 64, 5, dtype=torch.bfloat16)
    total = torch.full((7, 5), float("nan"))
    with OnTheGpu():
        for chunk in range(3):
            LOSS._add_mm(total, a[chunk].t(), b[chunk], first=chunk == 0)
    want = torch.einsum("kni,knj->ij", a.double(), b.double())
    assert torch.allclose(total.double(), want, atol=1e-4)


def test_no_tensor_as_large_as_the_logits(monkeypatch, kernel_backend):
    """No allocation may reach an eighth of the B T V logits plus a tile."""
    N, C, V = 1024, 8, 512
    largest = [0]
    for name in ("empty", "zeros"):
        allocate = getattr(torch, name)

        def counting(*args, allocate=allocate, **kwargs):
            x = allocate(*args, **kwargs)
            largest[0] = max(largest[0], x.numel())
            return x

        monkeypatch.setattr(torch, name, counting)
    x, weight = tensor(N, C).requires_grad_(), tensor(V, C).requires_grad_()
    saved = []
    with (
        kernels.use(kernel_backend),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append(t.numel()), t)[1], lambda t: t
        ),
    ):
        kernels.linear_cross_entropy(x, weight, targets_in(N, V)).backward()
    assert largest[0] <= N * V // 8
    assert max(saved) <= max(x.numel(), weight.numel())


def test_one_chunk_of_logits_at_a_time(monkeypatch, accelerated):
    """If the product allocates its result, the previous chunk has been freed by then."""
    chunks, alive = [], []
    matmul_transposed = LOSS.matmul_transposed

    monkeypatch.setattr(sys.modules["gpt2.kernels.matmul"], "LARGE", 0)

    def spy(x, weight, out):
        alive.append(sum(chunk() is not None for chunk in chunks))
        chunk = matmul_transposed(x, weight, out)
        chunks.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(LOSS, "matmul_transposed", spy)
    x, weight = tensor(520, 16).requires_grad_(), tensor(33, 16).requires_grad_()
    with kernels.use(accelerated):
        kernels.linear_cross_entropy(x, weight, targets_in(520, 33)).backward()
    assert len(alive) > 2 and not any(alive)


def test_deterministic_and_the_same_without_gradients(kernel_backend):
    x, weight = tensor(40, 16, dtype=torch.bfloat16), tensor(99, 16)
    targets = targets_in(40, 99)
    x.requires_grad_(), weight.requires_grad_()

    def run():
        with kernels.use(kernel_backend):
            loss = kernels.linear_cross_entropy(x, weight, targets)
        return loss, *torch.autograd.grad(loss, (x, weight), retain_graph=True)

    assert all(map(bits_equal, run(), run()))
    loss, *_ = run()
    with kernels.use(kernel_backend), torch.no_grad():
        assert bits_equal(kernels.linear_cross_entropy(x, weight, targets), loss)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None])
@pytest.mark.parametrize("leaf", ["x", "weight"])
def test_only_what_is_needed_is_computed(leaf, mode, monkeypatch, kernel_backend):
    """Two of the three products are for gradients. Evaluation computed all three: inside an
    autograd function, leaves that require gradients look needed under no_grad too."""
    inputs = {"x": tensor(6, 5), "weight": tensor(9, 5)}
    inputs[leaf].requires_grad_()
    raw, asked = autograd.raw, []

    class Spy:
        def linear_cross_entropy_fwd(self, *args):
            asked.append(args[5:7])
            return raw.linear_cross_entropy_fwd(*args)

    monkeypatch.setattr(autograd, "raw", Spy())
    with kernels.use(kernel_backend), mode() if mode else contextlib.nullcontext():
        kernels.linear_cross_entropy(**inputs, targets=targets_in(6, 9))
    assert asked == [(leaf == "x", leaf == "weight") if mode is None else (False, False)]


def test_every_subset_of_gradients_twice(kernel_backend):
    x, weight, targets = tensor(9, 5), tensor(11, 5), targets_in(9, 11)
    want = reference_gradients(x, weight, targets)
    for needs_x, needs_weight in ((True, True), (True, False), (False, True)):
        a = x.detach().requires_grad_(needs_x)
        b = weight.detach().requires_grad_(needs_weight)
        with kernels.use(kernel_backend):
            loss = kernels.linear_cross_entropy(a, b, targets)
        loss.backward(retain_graph=True)
        (2 * loss).backward()  # scaled by 3 in all: the saved tensors must not be scaled in place
        for leaf, w, needed in ((a, want[0], needs_x), (b, want[1], needs_weight)):
            assert torch.allclose(leaf.grad, 3 * w, atol=1e-6) if needed else leaf.grad is None


def reference_gradients(x, weight, targets):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(reference.linear_cross_entropy(x, weight, targets), (x, weight))


def test_half_precision_gradients_do_not_underflow(kernel_backend):
    """softmax / N = 2e-6 is subnormal in float16, with an error of 3 % in every row: the mean must
    not be taken before the rounding."""
    N, V = 512, 1000
    x, weight = tensor(N, 4, dtype=torch.float16), 0.01 * tensor(V, 4, dtype=torch.float16)
    targets = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    weight.requires_grad_()
    with kernels.use(kernel_backend):
        loss = kernels.linear_cross_entropy(x, weight, targets)
    (dweight,) = torch.autograd.grad(loss, weight)
    _, exact = reference_gradients(x.double(), weight.double(), targets)
    assert_close_to(exact, dweight, exact.half(), "dweight", factor=2)


def test_errors_of_linear_cross_entropy():
    with pytest.raises(ValueError, match=r"weight must have shape .* got \(5, 4\) for x \(3, 5\)"):
        kernels.linear_cross_entropy(torch.randn(3, 5), torch.randn(5, 4), torch.zeros(3).long())
