"""cross_entropy and linear_cross_entropy against float64, and the typical bugs of a loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from inputs import sparse_rows, targets_in, tensor
from late import refused
from util import DEVICE, DTYPES, bits_equal, check_op, fingerprint, guarded

from gpt2 import kernels
from gpt2.kernels import dispatch


@pytest.mark.grid
@pytest.mark.parametrize("ignored", ["some", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", (1, 3, 33), ids=lambda N: f"N{N}")
@pytest.mark.parametrize("V", (1, 2, 17, 257, 4095, 4096, 4097, 9001), ids=lambda V: f"V{V}")
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_cross_entropy(scale, V, N, dtype, ignored, ran, kernel_backend):
    logits = guarded(scale * tensor(N, V)).to(DTYPES[dtype])
    check_op(
        "cross_entropy", {"logits": logits}, backend=kernel_backend, ran=ran,
        terms=1.0 / N, targets=targets_in(N, V, ignored),
    )  # fmt: skip


@pytest.mark.grid
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", (17, 257, 4097), ids=lambda V: f"V{V}")
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_reductions_and_smoothing(op, V, dtype, reduction, smoothing, ran, kernel_backend):
    """Both have PyTorch's names and semantics; an ignored target has a loss and a gradient of 0."""
    inputs = {"logits": tensor(2, 5, V, dtype=DTYPES[dtype])}
    if op == "linear_cross_entropy":
        inputs = {name: tensor(*shape, 8, dtype=DTYPES[dtype]) for name, shape in
                  (("x", (2, 5)), ("weight", (V,)))}  # fmt: skip
    eps = torch.finfo(DTYPES[dtype]).eps
    check_op(
        op, inputs, backend=kernel_backend, ran=ran,
        terms=16.0, rounding=8 * eps if op == "linear_cross_entropy" else 0.0,
        targets=targets_in(10, V).view(2, 5), reduction=reduction, label_smoothing=smoothing,
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_counts(rows, reduction, smoothing, backend):
    """A micro-batch without labels must not destroy the weights: the mean is NaN, as in PyTorch,
    and every gradient is 0. It was NaN, from 0 times 1 / 0."""
    targets = torch.full((rows,), -100, device=DEVICE)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    for op, shapes in (
        ("cross_entropy", [(rows, 5)]),
        ("linear_cross_entropy", [(rows, 4), (5, 4)]),
    ):
        inputs = [tensor(*shape).requires_grad_() for shape in shapes]
        with kernels.use(backend):
            loss = getattr(kernels, op)(*inputs, targets, **options)
        want = F.cross_entropy(tensor(rows, 5), targets, **options)
        assert torch.equal(loss.isnan(), want.isnan()) and not loss.nan_to_num().any()
        loss.sum().backward()
        assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\], got -0.1"),
        ({"label_smoothing": math.nan}, r"label_smoothing must lie in \[0, 1\], got nan"),
    ],
)
def test_errors_of_options(options, message):
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        kernels.cross_entropy(torch.randn(3, 5), targets, **options)
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), targets, **options)


def test_smoothed_loss_of_a_masked_vocabulary(backend):
    """With smoothing, a probability of 0 gives an infinite loss. Without smoothing, 0 times minus
    infinity must not be computed."""
    logits = torch.tensor([[1.0, -math.inf, 2.0]], device=DEVICE)
    targets = torch.tensor([2], device=DEVICE)
    with kernels.use(backend):
        assert kernels.cross_entropy(logits, targets, label_smoothing=0.1) == math.inf
        assert kernels.cross_entropy(logits, targets).isfinite()


def test_forward_keeps_one_number_per_row(kernel_backend):
    """F.cross_entropy saves a second tensor of the logits' size; this saves the logits and a few
    numbers per row."""
    logits = tensor(9, 300).requires_grad_()
    saved = []
    with (
        kernels.use(kernel_backend),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append((t.data_ptr(), t.numel())), t)[1], lambda t: t
        ),
    ):
        kernels.cross_entropy(logits, targets_in(9, 300))
    assert all(n <= 2 * 9 or ptr == logits.data_ptr() for ptr, n in saved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_place_of_the_logits(dtype, kernel_backend):
    """inplace_backward allocates no second tensor of the logits' size, and gives the same bits."""
    targets = targets_in(9, 300)
    leaf = tensor(9, 300, dtype=DTYPES[dtype]).requires_grad_()
    with kernels.use(kernel_backend):
        (want,) = torch.autograd.grad(kernels.cross_entropy(leaf, targets), leaf)
        logits = leaf * 1
        loss = kernels.cross_entropy(logits, targets, inplace_backward=True)
        (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert bits_equal(got, want) and got.data_ptr() == logits.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_logits_are_left_alone_by_default(kernel_backend):
    logits = tensor(5, 40).requires_grad_()
    before = fingerprint(logits)
    with kernels.use(kernel_backend):
        loss = kernels.cross_entropy(logits, targets_in(5, 40))
        first = torch.autograd.grad(loss, logits, retain_graph=True)
        second = torch.autograd.grad(loss, logits)
    assert fingerprint(logits) == before and bits_equal(*first, *second)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3)], ids=str)
def test_leading_shapes(shape, ran, kernel_backend):
    targets = targets_in(6, 17).view(shape)
    logits, x = tensor(*shape, 17), tensor(*shape, 5)
    check_op("cross_entropy", {"logits": logits}, backend=kernel_backend, ran=ran, targets=targets)
    check_op(
        "linear_cross_entropy", {"x": x, "weight": tensor(17, 5)}, backend=kernel_backend, ran=ran,
        terms=1.0, targets=targets,
    )  # fmt: skip


@pytest.mark.parametrize("view", ["rows", "columns", "transposed", "expanded", "unaligned"])
def test_views(view, ran, kernel_backend):
    x = tensor(34, 34)
    logits = {
        "rows": x[::2], "columns": x[:, ::2], "transposed": x.t(),
        "expanded": x[:1].expand(34, -1), "unaligned": x.flatten()[1:].view(-1, 33),
    }[view]  # fmt: skip
    targets = targets_in(len(logits), logits.shape[1])
    check_op("cross_entropy", {"logits": logits}, backend=kernel_backend, ran=ran, targets=targets)


@pytest.mark.parametrize("ignore_index", [-1, -100, 3])
def test_ignore_index(ignore_index, ran, kernel_backend):
    targets = torch.tensor([3, 0, 1, 3, 2, 4], device=DEVICE)
    targets[2] = ignore_index
    check_op(
        "cross_entropy", {"logits": tensor(6, 5)}, backend=kernel_backend, ran=ran,
        targets=targets, ignore_index=ignore_index,
    )  # fmt: skip


def test_every_target_ignored_is_nan_as_in_pytorch(backend):
    logits = tensor(3, 5).requires_grad_()
    targets = torch.full((3,), -100, device=DEVICE)
    with kernels.use(backend):
        assert kernels.cross_entropy(logits, targets).isnan()
        assert kernels.linear_cross_entropy(logits, tensor(7, 5), targets).isnan()
    assert F.cross_entropy(logits, targets).isnan()


def test_ignored_rows_add_nothing(kernel_backend):
    """Even if their logits are NaN."""
    logits, targets = tensor(4, 9), torch.tensor([1, -100, 3, -100], device=DEVICE)
    logits[1] = math.nan
    logits.requires_grad_()
    with kernels.use(kernel_backend):
        loss = kernels.cross_entropy(logits, targets)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(loss, F.cross_entropy(logits[::2], targets[::2]))
    assert not dlogits[1::2].any() and dlogits[::2].any(dim=1).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits(size, kernel_backend):
    logits = torch.tensor([[size, 0.0, -size], [-size, -size, -size]], device=DEVICE)
    targets = torch.tensor([0, 1], device=DEVICE)
    with kernels.use(kernel_backend):
        loss = kernels.cross_entropy(logits, targets)
    assert loss.item() == pytest.approx(math.log(3) / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logit_may_be_anywhere(dtype, kernel_backend):
    """In any lane of any vector: exp(x - m) overflows if the maximum misses one."""
    V = 67
    logits = torch.full((V, V), -1e4, device=DEVICE, dtype=DTYPES[dtype])
    logits.fill_diagonal_(1e4)
    with kernels.use(kernel_backend):
        assert kernels.cross_entropy(logits, torch.arange(V, device=DEVICE)) == 0


def test_minus_infinity_is_a_probability_of_zero(kernel_backend):
    """A masked vocabulary: a whole block of -inf before the first finite logit."""
    V, first = 20000, 12000
    logits = torch.full((2, V), -math.inf, device=DEVICE)
    logits[:, first : first + 3] = tensor(2, 3)
    targets = torch.tensor([first, first + 2], device=DEVICE)
    logits.requires_grad_()
    with kernels.use(kernel_backend):
        loss = kernels.cross_entropy(logits, targets)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(loss, F.cross_entropy(logits, targets))
    assert not dlogits[:, :first].any() and not dlogits[:, first + 3 :].any()


@pytest.mark.parametrize("column", [0, 8, 9000])
def test_nan_is_seen(column, kernel_backend):
    """NaN in the first block of logits and in a later one."""
    logits = tensor(2, 10000)
    logits[1, column] = math.nan
    targets = torch.tensor([1, 2], device=DEVICE)
    losses, _ = torch.ops.gpt2_kernels.cross_entropy_fwd(logits, targets, -1, 0.0, kernel_backend)
    assert losses[0].isfinite() and losses[1].isnan()


def test_uneven_batches_accumulate_to_the_whole(kernel_backend):
    """The losses of the parts, weighted by their counts, add up to the whole loss, and so do the
    gradients."""
    x, weight = tensor(20, 8).requires_grad_(), tensor(30, 8).requires_grad_()
    targets = targets_in(20, 30)
    targets[:7] = -100
    counts = [(part != -100).sum() for part in targets.split(10)]
    with kernels.use(kernel_backend):
        whole = kernels.linear_cross_entropy(x, weight, targets)
        parts = [
            kernels.linear_cross_entropy(a, weight, t) * n / sum(counts)
            for a, t, n in zip(x.split(10), targets.split(10), counts, strict=True)
        ]
    assert torch.allclose(whole, sum(parts))
    for a, b in zip(
        torch.autograd.grad(whole, (x, weight)), torch.autograd.grad(sum(parts), (x, weight)),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-6)


def test_gradient_in_place_of_expanded_logits(kernel_backend):
    """Rows that share memory cannot hold different gradients, so they are copied."""
    leaf, targets = tensor(1, 9).requires_grad_(), targets_in(4, 9, ignored="none")
    with kernels.use(kernel_backend):
        loss = kernels.cross_entropy((leaf * 1).expand(4, -1), targets, inplace_backward=True)
    (got,) = torch.autograd.grad(loss, leaf)
    (want,) = torch.autograd.grad(F.cross_entropy(leaf.expand(4, -1), targets), leaf)
    assert torch.allclose(got, want)


@pytest.mark.parametrize("bad", [-2, 5, 2**63 - 1, -(2**63)])
def test_targets_out_of_range_are_named(bad, backend):
    logits, targets = tensor(3, 5), torch.tensor([0, bad, 4], device=DEVICE)
    with kernels.use(backend):
        for call in (
            lambda: kernels.cross_entropy(logits, targets),
            lambda: kernels.linear_cross_entropy(logits, tensor(5, 5), targets),
        ):
            with refused(rf"targets must lie in \[0, 5\), got {bad}"):
                call()


@pytest.mark.parametrize(
    "logits, targets, error, message",
    [
        (torch.randn(3, 5), torch.zeros(2).long(), ValueError, "targets must have the leading"),
        (torch.randn(3, 5), torch.zeros(3), TypeError, "targets must be an int64 tensor"),
        (torch.randn(5), torch.tensor(1), ValueError, "targets must have the leading shape"),
        (torch.randn(3, 0), torch.zeros(3).long(), ValueError, "vocabulary must not be empty"),
        (torch.ones(3, 5).long(), torch.zeros(3).long(), TypeError, "logits must have a floating"),
        ([1.0], torch.zeros(1).long(), TypeError, "logits must be a tensor, got list"),
    ],
)
def test_errors_name_the_argument(logits, targets, error, message):
    with pytest.raises(error, match=message):
        kernels.cross_entropy(logits, targets)


def test_rows_that_overflow_int32(tmp_path, kernel_backend):
    """Rows of logits 2^30 elements apart, in a sparse file: row 2 starts at 2^31."""
    N, V = 5, 33
    logits = sparse_rows(tmp_path / "sparse", N, V, stride=2**30)
    targets = targets_in(N, V)
    with kernels.use(kernel_backend):
        far = kernels.cross_entropy(logits, targets)
        assert bits_equal(far, kernels.cross_entropy(logits.clone(), targets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 7, 8, 15, 31, 33, 64, 127])
def test_in_place_rows_touch_nothing_else(V, dtype, kernel_backend):
    """Rows inside a larger matrix: what lies between them stays, columns that pad V become 0."""
    kernel = dispatch.module(kernel_backend, "cross_entropy")
    targets = torch.randint(V, (5,), device=DEVICE)
    whole = torch.full((5, V + 50), 7.0, dtype=DTYPES[dtype], device=DEVICE)
    rows = whole[:, 20 : 20 + V + 3]
    rows.copy_(tensor(5, V + 3))
    logits = rows[:, :V].clone()
    kernel.cross_entropy_fwd_bwd_(rows, targets, -1, 0.0, V)
    assert (whole[:, :20] == 7).all() and (whole[:, 20 + V + 3 :] == 7).all()
    assert not rows[:, V:].any()

    fused, inside = rows[:, :V].clone(), whole[:, 20 : 20 + V]
    inside.copy_(logits)
    _, stats = kernel.cross_entropy_fwd(inside, targets, -1, 0.0)
    dlosses = torch.ones(5, device=DEVICE)
    kernel.cross_entropy_bwd_(dlosses, inside, targets, stats, -1, 0.0)
    assert bits_equal(inside.clone(), fused) and not whole[:, 20 + V : 20 + V + 3].any()


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", (2001, 9001, 20001))
def test_every_kernel(V, dtype, ran, kernel_backend):
    """Rows with any alignment, and targets in the tails at their ends and in between."""
    whole = torch.randn(6, V + 1, device=DEVICE).to(DTYPES[dtype])
    targets = torch.tensor([V // 2, 0, 1, V - 1, V - 2, -100], device=DEVICE)
    for logits in (whole[:, :V].contiguous(), whole[:, 1:]):
        inputs = {"logits": logits}
        check_op("cross_entropy", inputs, backend=kernel_backend, ran=ran, targets=targets)
    x, weight = (torch.randn(n, 8, device=DEVICE).to(DTYPES[dtype]) for n in (6, V))
    check_op(
        "linear_cross_entropy", {"x": x, "weight": weight}, backend=kernel_backend, ran=ran,
        terms=1 / 3, targets=targets,
    )  # fmt: skip
