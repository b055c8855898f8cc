"""The definition of every kernel, in plain PyTorch.

This is the only reference in the repository: the fallback if no kernel supports a call, the truth
that tests evaluate in float64, and the baseline of every benchmark. It runs on any device, in any
floating dtype, and autograd differentiates it. Arguments are checked in ops.py.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size   C = H * D   V vocabulary
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def causal_attention(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, H, D), Tq <= Tk
    v: Tensor,  # (B, Tk, H, D)
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # (1,) int64
) -> Tensor:  # (B, Tq, H, D)
    """softmax(scale * q k^T, over keys up to the query's own) v; the last query is aligned with the
    last key."""
    Tq, Tk, D = q.shape[1], k.shape[1], q.shape[-1]
    scale = 1.0 / math.sqrt(D) if softmax_scale is None else softmax_scale
    if dropout_p or Tq != Tk or not q.numel() or q.dtype == torch.float64 or is_transformed():
        return attention_by_formula(q, k, v, scale, dropout_p, seed)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def attention_by_formula(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """causal_attention step by step. It is the truth in float64, and unlike PyTorch's fused
    attention it can be differentiated twice."""
    Tq, Tk = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    s = (q @ k.transpose(-2, -1)) * softmax_scale  # (B, H, Tq, Tk)
    visible = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    p = s.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    if dropout_p > 0.0:
        keep = dropout_keep(seed, p.shape, dropout_p)
        p = p * keep * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
    return (p @ v).transpose(1, 2)


def causal_attention_qkv(
    qkv: Tensor,  # (B, T, 3C)
    n_head: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # (B, T, C)
    q, k, v = split_heads(qkv, n_head)
    o = causal_attention(q, k, v, softmax_scale=softmax_scale, dropout_p=dropout_p, seed=seed)
    return o.flatten(2)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (B, T, H, D) each, as views of the packed projection (B, T, 3C)."""
    return qkv.unflatten(-1, (3, n_head, -1)).unbind(2)


def decode_attention(
    q: Tensor,  # (B, 1, H, D)
    k_cache: Tensor,  # (B, T, H, D)
    v_cache: Tensor,  # (B, T, H, D)
    lengths: Tensor,  # (B,) int64: the number of valid rows in the cache
    *,
    softmax_scale: float | None = None,
) -> Tensor:  # (B, 1, H, D)
    """softmax(scale * q k^T, over the first lengths[b] keys) v; zeros if there are none."""
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))  # (B, H, T, D)
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    s = (q @ k.transpose(-2, -1)) * scale  # (B, H, 1, T)
    empty = torch.arange(k.shape[2], device=k.device) >= lengths[:, None, None, None]
    p = s.masked_fill(empty, float("-inf")).softmax(dim=-1).masked_fill(empty, 0.0)
    return (p @ v.masked_fill(empty.mT, 0.0)).transpose(1, 2)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    weight, bias = (None if row is None else row.to(x.dtype) for row in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = x + residual. The norm has x's dtype, s the wider of the two."""
    s = x + residual
    return layer_norm(s, weight, bias, eps).to(x.dtype), s


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return F.gelu(x, approximate="tanh")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return gelu(x + bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_int8(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:  # (..., N)
    """linear with the int8 weight of linear.quantize_int8."""
    return F.linear(x, dequantize_int8(packed, scale, x.shape[-1], x.dtype), bias)


def dequantize_int8(packed: Tensor, scale: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in dtype: scale (N,) times the numbers in packed (N, K rounded up to 64).
    Of each 64 bytes, byte 2 i + j is number 32 j + i."""
    numbers = packed.view(len(packed), -1, 32, 2).transpose(-1, -2).reshape(packed.shape)[:, :K]
    return (numbers * scale[:, None]).to(dtype)


def cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...) int64
    ignore_index: int = -100,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:  # () or, for reduction "none", (...)
    """-log softmax(logits)[target] for targets that are not ignored, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    losses = F.cross_entropy(
        logits,
        targets.flatten(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return losses.view(targets.shape) if reduction == "none" else losses


def linear_cross_entropy(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (V, C)
    targets: Tensor,
    ignore_index: int = -100,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(x @ weight.T, targets)."""
    logits = F.linear(x, weight.to(x.dtype))
    return cross_entropy(
        logits, targets, ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active. Both work only
    with plain PyTorch."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def dropout_keep(seed: Tensor, shape: torch.Size, p: float) -> Tensor:
    """The mask of attention probabilities that dropout keeps, (B, H, Tq, Tk) bool.

    Element (b, h, i, j) is kept if the upper 24 bits of word j % 4 of

        Philox4x32-7(key = seed, counter = (j // 4, i, b H + h, 0))

    are at least p 2^24 (Salmon et al., SC 2011). The mask depends only on seed and position, so
    every device, backend, tile size and pass regenerates the same one.
    """
    B, H, Tq, Tk = shape
    device = seed.device

    def counter(n, *view):
        return torch.arange(n, device=device).view(*view)

    words = _philox(
        seed, counter(-(-Tk // 4), 1, 1, -1), counter(Tq, 1, -1, 1), counter(B * H, -1, 1, 1)
    )
    word = torch.stack(words, dim=-1).flatten(-2)[..., :Tk].view(B, H, Tq, Tk)
    return (word >> 8) >= round(p * 2**24)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, rounds: int = 7):
    """Four 32-bit words per counter, as int64. The counters broadcast; the fourth is 0."""
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of the unsigned product a * b, computed in int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
