"""The ops that host.py times: all of gpt2.kernels on tiny tensors, beside PyTorch's own.

B batch   T time   H heads   D head size   C = H * D features   N = B * T rows   V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from attention import sdpa
from torch import Tensor

from bench.host.tables import BOTH, FORWARD, WITH_GRAD
from gpt2 import kernels

V = 64


@dataclass(frozen=True)
class Op:
    """One op and its inputs; requires_grad is already set on those that need a gradient."""

    name: str
    kernel: str  # its row in the kernel table
    size: int  # the extent that dispatch decides by
    ours: Callable  # (*inputs) -> tensor or tensors
    theirs: Callable  # PyTorch's own op, or the shortest composition of its ops
    inputs: list
    # WITH_GRAD is for ops with an autograd function of their own
    steps: tuple[str, ...] = (FORWARD, WITH_GRAD, BOTH)


def operations(shape, dtype: torch.dtype, device: torch.device) -> list[Op]:
    """Every op, with random inputs."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    N, C = B * T, H * D
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size):
        return torch.randn(size, device=device, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(V, (N,), device=device, generator=generator)
    lengths = torch.full((B,), T, device=device)
    packed = kernels.quantize_int8(randn(3 * C, C))
    norm, loss = [randn(C), randn(C)], [targets, -1]
    once, cache = randn(B, C).detach(), [randn(B, n, H, D).detach() for n in (1, T, T)]
    # fmt: off
    return [
        Op("layer_norm", "layer_norm", C, kernels.layer_norm, layer_norm, [randn(N, C), *norm]),
        Op("add_layer_norm", "layer_norm", C, kernels.add_layer_norm, add_layer_norm,
           [randn(N, C), randn(N, C), *norm]),
        Op("gelu", "gelu", 0, kernels.gelu, gelu, [randn(N, C)]),
        Op("bias_gelu", "gelu", 0, kernels.bias_gelu, bias_gelu, [randn(N, C), randn(C)]),
        Op("causal_attention", "attention", D, kernels.causal_attention, sdpa,
           [randn(B, T, H, D) for _ in range(3)]),
        Op("causal_attention_qkv", "attention", D, kernels.causal_attention_qkv, sdpa_qkv,
           [randn(B, T, 3 * C), H]),
        Op("cross_entropy", "cross_entropy", 0, kernels.cross_entropy, cross_entropy,
           [randn(N, V), *loss]),
        Op("linear_cross_entropy", "linear_cross_entropy", 0, kernels.linear_cross_entropy,
           linear_cross_entropy, [randn(N, C), randn(V, C), *loss]),
        Op("linear", "linear", 0, kernels.linear, F.linear,
           [randn(B, C), randn(3 * C, C), randn(3 * C)], (FORWARD, BOTH)),
        Op("linear_int8", "linear", 0, kernels.linear_int8, kernels.reference.linear_int8,
           [once, *packed, randn(3 * C).detach()], (FORWARD,)),
        Op("decode_attention", "decode_attention", D, kernels.decode_attention, decode_attention,
           [*cache, lengths], (FORWARD,)),
    ]
    # fmt: on


def layer_norm(x, weight, bias) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def add_layer_norm(x, residual, weight, bias) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.layer_norm(s, s.shape[-1:], weight, bias), s


def gelu(x) -> Tensor:
    return F.gelu(x, approximate="tanh")


def bias_gelu(x, bias) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def sdpa_qkv(qkv, H) -> Tensor:
    B, T, width = qkv.shape
    q, k, v = qkv.view(B, T, 3, H, -1).transpose(1, 3).unbind(2)  # (B, H, T, D) each
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return o.transpose(1, 2).reshape(B, T, width // 3)


def cross_entropy(logits, targets, ignore_index) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=ignore_index)


def linear_cross_entropy(x, weight, targets, ignore_index) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=ignore_index)


def decode_attention(q, k_cache, v_cache, lengths) -> Tensor:
    """PyTorch's attention with the mask that caches of several lengths need."""
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    visible = torch.arange(k.shape[2], device=k.device) < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)
