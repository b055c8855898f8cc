"""Second derivatives, and torch.func: PyTorch's own, computed by the reference.

A kernel's backward has no derivative. Other packages return wrong second derivatives without an
error, and so did this one once: the hessian of a loss was 0.
"""

import pytest
import torch
from backends import cpu_set
from inputs import every_op, tensor
from torch.autograd import forward_ad
from util import DEVICE, as_tuple, assert_close_to, launches

from gpt2 import Config, Model, kernels
from gpt2.kernels import reference

SEED = torch.tensor([7])


def cases():
    """(call, inputs) of every op with its options; call takes `ops`, the kernels or the
    reference."""
    targets = torch.tensor([1, -100, 3], device=DEVICE)
    seed = SEED.to(DEVICE)
    found = {name: (lambda ops, *x, name=name: getattr(ops, name)(*x), inputs)
             for name, (_, inputs) in every_op().items()}  # fmt: skip
    _, qkv = found["causal_attention_qkv"]
    _, rows = found["cross_entropy"]
    _, operands = found["linear_cross_entropy"]
    found |= {
        "causal_attention_qkv": (lambda ops, x: ops.causal_attention_qkv(x, 2), qkv),
        "dropout": (
            lambda ops, x: ops.causal_attention_qkv(x, 2, dropout_p=0.4, seed=seed),
            qkv,
        ),
        "longer keys": (
            lambda ops, *x: ops.causal_attention(*x, softmax_scale=0.3),
            [tensor(1, n, 2, 16) for n in (3, 5, 5)],
        ),
        "bare norm": (lambda ops, x: ops.layer_norm(x), [tensor(3, 16)]),
        "cross_entropy": (lambda ops, x: ops.cross_entropy(x, targets), rows),
        "linear_cross_entropy": (
            lambda ops, *x: ops.linear_cross_entropy(*x, targets),
            operands,
        ),
    }
    for reduction in ("sum", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.2}
        found[f"cross_entropy {reduction}"] = (
            lambda ops, x, options=options: ops.cross_entropy(x, targets, **options),
            rows,
        )
        found[f"linear_cross_entropy {reduction}"] = (
            lambda ops, *x, options=options: ops.linear_cross_entropy(*x, targets, **options),
            operands,
        )
    return found


def derivatives(call, inputs, seed=0):
    """First and second derivatives of a fixed function of the call's results."""
    generator = torch.Generator().manual_seed(seed)

    def weighted(tensors):
        parts = [x * torch.randn(x.shape, generator=generator).to(x) for x in tensors]
        return sum(part.sum() for part in parts)

    leaves = [x.detach().requires_grad_() for x in inputs]
    # Inputs that depend on each other: each has its own gradient.
    mixed = [leaves[0] * 1]
    for leaf in leaves[1:]:
        mixed.append(leaf + 0.1 * mixed[-1].mean())
    first = torch.autograd.grad(
        weighted(as_tuple(call(*mixed))).square(), leaves, create_graph=True
    )
    return first, torch.autograd.grad(weighted(first), leaves)


@pytest.mark.parametrize("case", list(cases()))
def test_second_derivatives(case, accelerated):
    call, inputs = cases()[case]
    with kernels.use(accelerated), launches() as launched:
        got = derivatives(lambda *x: call(kernels, *x), inputs)
    assert accelerated in launched
    exact = derivatives(lambda *x: call(reference, *x), [x.double() for x in inputs])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = derivatives(lambda *x: call(reference, *x), inputs)
    for order, found in enumerate(got):
        for i, x in enumerate(found):
            what = f"derivative {order + 1} by input {i}"
            assert_close_to(exact[order][i], x, plain[order][i], what, factor=3, terms=64.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_second_derivatives_of_a_stream_of_two_dtypes(dtype, accelerated):
    """Gradients have the dtypes of their inputs, with create_graph too."""
    x, residual, row = tensor(3, 16, dtype=dtype), tensor(3, 16), tensor(16)
    with kernels.use(accelerated):
        first, second = derivatives(
            lambda *x: tuple(y.float() for y in kernels.add_layer_norm(*x)), [x, residual, row, row]
        )
    for found in (first, second):
        assert [g.dtype for g in found] == [dtype, *[torch.float32] * 3]
        assert all(g.any() for g in found)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_what_needs_a_gradient_has_one(needed, accelerated):
    tensors = every_op()["layer_norm"][1]
    inputs = [x.detach().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]
    with kernels.use(accelerated):
        y = kernels.layer_norm(*inputs).square().sum()
    wanted = [x for x in inputs if x.requires_grad]
    (got,) = torch.autograd.grad(y, wanted, create_graph=True)
    assert got.requires_grad


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("case", list(cases()))
def test_gradgradcheck(case):
    """Against finite differences; the scalar set has kernels for float64."""
    call, inputs = cases()[case]
    leaves = [x.cpu().double().requires_grad_() for x in inputs]
    if DEVICE != "cpu":
        pytest.skip("targets and seeds are on the GPU")
    with cpu_set("cpu-scalar"), kernels.use("cpu"):
        function = lambda *x: call(kernels, *x)  # noqa: E731
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_third_derivative(accelerated):
    x = tensor(5).requires_grad_()
    want = x.detach().double().requires_grad_()
    with kernels.use(accelerated):
        y = kernels.gelu(x)
    z = reference.gelu(want)
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (z,) = torch.autograd.grad(z.sum(), want, create_graph=True)
    assert torch.allclose(y.double(), z, atol=1e-4)


def test_hessian_of_a_loss(backend):
    """It was 0."""
    logits, targets = tensor(2, 4), torch.tensor([1, 2], device=DEVICE)

    def loss(x):
        return kernels.cross_entropy(x, targets)

    p = logits.softmax(dim=-1)
    want = torch.zeros(2, 4, 2, 4, device=DEVICE)
    for n in range(2):
        want[n, :, n] = (p[n].diag() - p[n, :, None] * p[n]) / 2
    with kernels.use(backend):
        assert torch.allclose(torch.autograd.functional.hessian(loss, logits), want, atol=1e-6)
    with kernels.use("reference"):
        assert torch.allclose(torch.func.hessian(loss)(logits), want, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*falls back to plain PyTorch")
@pytest.mark.parametrize("case", list(cases()))
def test_transforms_of_torch_func(case):
    """grad, jacrev, jvp, hessian and vmap use plain PyTorch, whichever backend would be chosen
    otherwise."""
    call, inputs = cases()[case]
    x, *rest = [x.double() for x in inputs]

    def scalar(ops, x):
        return sum(y.square().sum() for y in as_tuple(call(ops, x, *rest)))

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        got, want = (
            transform(lambda x, ops=ops: scalar(ops, x))(x) for ops in (kernels, reference)
        )
        assert torch.equal(got, want) and got.any()
    many = torch.stack([x, 2 * x])
    got = torch.func.vmap(lambda x: scalar(kernels, x))(many)
    assert torch.allclose(got, torch.stack([scalar(reference, x) for x in many]))
    with forward_ad.dual_level():
        dual = scalar(kernels, forward_ad.make_dual(x, torch.ones_like(x)))
        along = forward_ad.unpack_dual(dual).tangent
    assert torch.allclose(along, torch.func.grad(lambda x: scalar(reference, x))(x).sum())


def test_a_forced_backend_says_that_it_cannot(accelerated):
    with kernels.use(accelerated):
        with pytest.raises(kernels.BackendUnavailable, match=r"gelu: transforms of torch\.func"):
            torch.func.grad(lambda x: kernels.gelu(x).sum())(tensor(3))
        with (
            forward_ad.dual_level(),
            pytest.raises(kernels.BackendUnavailable, match="forward-mode derivatives"),
        ):
            kernels.gelu(forward_ad.make_dual(tensor(3), tensor(3)))


@pytest.mark.filterwarnings("ignore:.*falls back to plain PyTorch")
@pytest.mark.parametrize("fast", [False, True])
def test_a_model_under_torch_func(fast):
    """Per-sample gradients by vmap over grad: the check of ids must not read the values of a batch
    inside vmap."""
    model = Model(Config(block_size=6, vocab_size=11, n_layer=1, n_head=2, n_embd=8), fast=fast)
    model = model.to(DEVICE)
    parameters = dict(model.named_parameters())
    idx, targets = torch.randint(11, (2, 3, 6), device=DEVICE)

    def loss(parameters, x, y):
        _, loss = torch.func.functional_call(model, parameters, (x[None], y[None]))
        return loss

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    per_sample = each(parameters, idx, targets)
    for n in range(len(idx)):
        _, one = model(idx[n : n + 1], targets[n : n + 1])
        want = torch.autograd.grad(one, list(parameters.values()))
        for name, g in zip(parameters, want, strict=True):
            assert torch.allclose(per_sample[name][n], g, atol=1e-5), name


@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore:.*falls back to plain PyTorch")
@pytest.mark.parametrize("fast", [False, True])
def test_a_model_without_values(fast):
    """On the meta device and in fake mode there are only shapes."""
    config = Config(block_size=6, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
    model = Model(config, fast=fast).to("meta")
    idx = torch.zeros(2, 6, dtype=torch.int64, device="meta")
    logits, loss = model(idx, idx, return_logits=True)
    assert logits.shape == (2, 6, 11) and logits.is_meta and loss.shape == ()
    loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    with torch._subclasses.FakeTensorMode():
        model = Model(config, fast=False)
        logits, loss = model(torch.zeros(2, 6, dtype=torch.int64))
    assert logits.shape == (2, 6, 11) and loss is None
