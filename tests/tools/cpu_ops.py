"""Ops large enough for several threads, on the CPU backend."""

import contextlib

import torch
from util import as_tuple

from gpt2 import kernels

CPU = torch.device("cpu")


def tensor(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def large_ops(dtype):
    """A call of every op, at ragged sizes large enough for several threads: (function,
    differentiable inputs). The first axis of the first input is its rows."""
    targets = torch.randint(1001, (70,))
    targets[::9] = -100
    row = tensor(769, dtype=dtype)

    def x(*shape):
        return tensor(*shape, dtype=dtype)

    return {
        "causal_attention": (kernels.causal_attention, [x(2, 150, 3, 40) for _ in range(3)]),
        "dropped_attention": (
            lambda q, k, v: kernels.causal_attention(q, k, v, dropout_p=0.3, seed=5),
            [x(1, 70, 3, 64) for _ in range(3)],
        ),
        "causal_attention_qkv": (
            lambda t: kernels.causal_attention_qkv(t, 3),
            [x(2, 150, 3 * 3 * 64)],
        ),
        "layer_norm": (kernels.layer_norm, [x(133, 769), row, row + 1]),
        "add_layer_norm": (kernels.add_layer_norm, [x(133, 769), x(133, 769), row, row + 1]),
        "gelu": (kernels.gelu, [x(50001)]),
        "bias_gelu": (kernels.bias_gelu, [x(133, 769), row]),
        "cross_entropy": (lambda t: kernels.cross_entropy(t, targets), [x(70, 1001)]),
        "linear_cross_entropy": (
            lambda t, w: kernels.linear_cross_entropy(t, w, targets),
            [x(70, 33), x(1001, 33)],
        ),
    }


OPS = list(large_ops(torch.float32))


def run(call, inputs):
    """Outputs and all gradients, for fixed gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = as_tuple(call(*leaves))
    generator = torch.Generator().manual_seed(0)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, dys)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
