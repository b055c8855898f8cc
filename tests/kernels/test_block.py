"""A block as one autograd function: its gradients, and where the single ops take its place."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from util import DEVICE, assert_close_to

from gpt2 import Config, kernels
from gpt2.block import Block
from gpt2.kernels import block as whole
from gpt2.kernels import reference

B, T, C = 2, 33, 32
CONFIG = Config(T, 7, 1, 2, C)
AUTOCAST = {"fp32": None, "bf16": None, "autocast-bf16": torch.bfloat16}


@pytest.fixture
def calls(monkeypatch):
    """The number of blocks computed as a whole, in a list."""
    count, block = [0], whole.block

    def counted(*args):
        found = block(*args)
        count[0] += found is not None
        return found

    monkeypatch.setattr(whole, "block", counted)
    return count


def block_of(dtype=torch.float32):
    block = Block(CONFIG).to(DEVICE)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 1.0))
    return block.to(dtype)


def inputs(dtype=torch.float32, stream=None):
    x = torch.randn(B, T, C, device=DEVICE).to(dtype)
    s = torch.randn(B, T, C, device=DEVICE).to(stream or dtype)
    return x.requires_grad_(), s.requires_grad_()


def gradients(block, ops, x, s, autocast=None):
    """(y, s2) and the gradients of a loss that uses both, of every input and parameter."""
    wanted = [t for t in (x, s, *block.parameters()) if t is not None and t.requires_grad]
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        y, s2 = block(x, s, ops)
    loss = (y.double() * weights(y)).sum() + (s2.double() * weights(s2).flip(1)).sum()
    return [y, s2, *torch.autograd.grad(loss, wanted)]


def weights(x):
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=x.device).view(x.shape)


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("kind", AUTOCAST)
def test_gradients(accelerated, calls, monkeypatch, kind, first):
    monkeypatch.setattr(whole, "SUM_ROWS", 0)
    autocast = AUTOCAST[kind]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    block = block_of(dtype)
    x, s = inputs(dtype)
    if autocast and not first:  # the stream is float32
        x = x.detach().to(autocast).requires_grad_()
    if first:
        s = None
    with kernels.use(accelerated):
        ours = gradients(block, kernels, x, s, autocast)
    assert calls == [1] and ours[0]._base is None
    plain = gradients(block, reference, x, s, autocast)
    exact = gradients(
        copy.deepcopy(block).double(), reference, *(
            None if t is None else t.detach().double().requires_grad_() for t in (x, s)
        ),
    )  # fmt: skip
    names = ["y", "s2", "x", *([] if first else ["s"]), *dict(block.named_parameters())]
    for name, e, o, p in zip(names, exact, ours, plain, strict=True):
        assert o.dtype == p.dtype, name
        assert_close_to(e, o, p, name, factor=2 if name in ("y", "s2") else 3)


@pytest.mark.parametrize("frozen", ["attn.c_proj.bias", "mlp.c_fc.weight", "ln_1.weight", "all"])
def test_frozen_parameters_get_no_gradient(frozen):
    block = block_of()
    for name, p in block.named_parameters():
        p.requires_grad_(frozen not in (name, "all"))
    x, s = inputs()
    for ours, plain in zip(*(gradients(block, o, x, s) for o in (kernels, reference)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * plain.abs().max().item())
    y, _ = block(x, s, kernels)
    y.sum().backward()
    for p in block.parameters():
        assert (p.grad is None) == (not p.requires_grad)


def test_a_bias_gradient_follows_changes_of_the_gradient(accelerated):
    """The next block's backward has already added up the gradient of this one's output. Hooks, and
    other uses of that output, change it afterwards."""
    first, second = block_of(), block_of()
    x, s = inputs()

    def bias_gradients(ops, change):
        y, s1 = first(x, s, ops)
        extra = change(y)
        y2, s2 = second(y, s1, ops)
        loss = y2.sum() + (s2 * weights(s2)).sum() + extra
        return torch.autograd.grad(loss, [first.mlp.c_proj.bias, second.attn.c_proj.bias])

    def scaled(y):
        y.register_hook(lambda grad: grad * 3)
        return 0

    def scaled_in_place(y):
        y.register_hook(lambda grad: grad.mul_(3))
        return 0

    with kernels.use(accelerated):
        for change in (lambda y: 0, scaled, scaled_in_place, lambda y: (y * y).sum()):
            ours = bias_gradients(kernels, change)
            for o, p in zip(ours, bias_gradients(reference, change), strict=True):
                torch.testing.assert_close(o, p, rtol=1e-3, atol=1e-3)


def test_backward_twice(accelerated):
    block, (x, s) = block_of(), inputs()
    with kernels.use(accelerated):
        y, s2 = block(x, s, kernels)
        loss = (y * y).sum() + s2.sum()
        once = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(block.parameters()))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


def test_lazily_negated_tensors(accelerated, calls):
    """Their memory holds the negative. A kernel that read it would be wrong without an error."""
    block, (x, s) = block_of(), inputs()
    dy, ds = weights(x).float(), weights(s).float().flip(1)
    wanted = [x, s, block.ln_1.weight]
    with kernels.use(accelerated):
        y, s2 = block(x, s, kernels)
        want = torch.autograd.grad([y, s2], wanted, [dy, ds])
        y, s2 = block(x, s, kernels)
        ours = torch.autograd.grad([y, s2], wanted, [torch._neg_view(-dy), torch._neg_view(-ds)])
        assert calls == [2]
        for a, b in zip(ours, want, strict=True):
            assert torch.equal(a, b)
        y2, s3 = block(torch._neg_view(-x), torch._neg_view(-s), kernels)
    assert calls == [2]
    torch.testing.assert_close((y2, s3), (y, s2), rtol=1e-4, atol=1e-4)


def test_second_derivatives(calls):
    block, (x, s) = block_of(), inputs()

    def second(ops):
        y, s2 = block(x, s, ops)
        (dx, ds, dw) = torch.autograd.grad(
            (y * y).sum() + s2.pow(3).sum(), [x, s, block.attn.c_attn.weight], create_graph=True
        )
        return torch.autograd.grad(
            dx.pow(2).sum() + ds.pow(2).sum() + dw.pow(2).sum(), [x, block.ln_2.weight]
        )

    ours = second(kernels)
    assert calls == [1]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = second(reference)
    for o, p in zip(ours, plain, strict=True):
        torch.testing.assert_close(o, p, rtol=1e-3, atol=1e-3 * p.abs().max().item())


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def hook_a_child(block):
    block.mlp.c_fc.register_forward_hook(lambda module, args, out: out * 2)


def replace_a_child(block):
    block.attn.c_proj = nn.Sequential(block.attn.c_proj)


def drop_a_bias(block):
    block.ln_1 = nn.LayerNorm(C, bias=False).to(DEVICE)


def replace_forward(block):
    forward = block.mlp.forward
    block.mlp.forward = lambda *args: forward(*args) * 2


@pytest.mark.parametrize("change", [hook_a_child, replace_a_child, drop_a_bias, replace_forward])
def test_a_changed_layer_is_called(calls, change):
    block, (x, s) = block_of(), inputs()
    change(block)
    for ours, plain in zip(*(gradients(block, o, x, s) for o in (kernels, reference)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * plain.abs().max().item())
    assert calls == [0]


def test_a_layer_that_nobody_calls(calls):
    """Once the layers were unpacked by position, so that another one raised ValueError."""
    block, (x, s) = block_of(), inputs()
    before = block(x, s, kernels)[0]
    block.attn.other = nn.Linear(C, C)
    assert torch.equal(block(x, s, kernels)[0], before)
    assert calls == [2]


def test_who_needs_the_single_ops(calls):
    block, (x, s) = block_of(), inputs()
    with torch.no_grad():
        block(x, s, kernels)
    with Watching():
        block(x, s, kernels)
    with kernels.use("reference"):
        block(x, s, kernels)
    block.attn.dropout = 0.5
    block.train()(x, s, kernels)
    torch.func.vjp(lambda x: block(x, s, kernels)[0], x)
    assert calls == [0]
    block.eval()(x, s, kernels)
    assert calls == [1]
