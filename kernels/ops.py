"""The public functions: arguments checked once, here and nowhere else, then a backend chosen.

Where no kernel serves, the reference does, and dispatch.py says why.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size   C features   V vocabulary
"""

import math

import torch
from torch import Tensor

from . import autograd, dispatch, reference


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Causal softmax attention; shapes (B, Tq, H, D) and (B, Tk, H, D), result (B, Tq, H, D).

    Query i sees the keys up to i + Tk - Tq: the last query is aligned with the last key. Views
    are read in place if they are contiguous in D. softmax_scale is 1 / sqrt(D) by default.
    dropout_p drops probabilities by a mask that depends on seed and position alone (see
    reference.dropout_keep); seed, an int or a (1,) int64 tensor, is drawn from PyTorch's
    generator by default. Raises TypeError or ValueError, naming the argument.

    Vaswani et al., 2017; Dao et al., FlashAttention-2, 2023.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, like=q)
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (B, T, H, D), got {tuple(x.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"k must have q's B, H and D: got k {tuple(k.shape)} and q {tuple(q.shape)}"
        )
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"q must not be longer than k, got Tq={q.shape[1]}, Tk={k.shape[1]}")
    scale, seed = _attention_scalars(q, q.shape[-1], softmax_scale, dropout_p, seed)
    q, k, v = _autocast(q, k, v)
    backend = dispatch.choose("attention", q.device, q.dtype, q.shape[-1])
    if backend == "reference":
        return reference.causal_attention(
            q, k, v, softmax_scale=scale, dropout_p=dropout_p, seed=seed
        )
    return autograd.call(autograd.Attention, q, k, v, scale, dropout_p, seed, backend)


def causal_attention_qkv(
    qkv: Tensor,
    n_head: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """causal_attention straight from the packed projection: qkv (B, T, 3C) to (B, T, C).

    The last dimension of qkv holds q, k and v, each as n_head heads of C / n_head. Nothing is
    transposed or copied on the way, and the gradient is one packed tensor. Other arguments and
    errors as causal_attention.
    """
    _check_tensor("qkv", qkv, like=qkv)
    if qkv.dim() != 3:
        raise ValueError(f"qkv must have shape (B, T, 3C), got {tuple(qkv.shape)}")
    if n_head < 1 or qkv.shape[-1] % (3 * n_head):
        raise ValueError(
            f"n_head must divide qkv's last dimension / 3, got n_head={n_head}, {tuple(qkv.shape)}"
        )
    D = qkv.shape[-1] // (3 * n_head)
    scale, seed = _attention_scalars(qkv, D, softmax_scale, dropout_p, seed)
    (qkv,) = _autocast(qkv)
    backend = dispatch.choose("attention", qkv.device, qkv.dtype, D)
    if backend == "reference":
        return reference.causal_attention_qkv(
            qkv, n_head, softmax_scale=scale, dropout_p=dropout_p, seed=seed
        )
    return autograd.call(autograd.AttentionQKV, qkv, n_head, scale, dropout_p, seed, backend)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of one new token per sequence over a cache; no gradient.

    q (B, 1, H, D), k_cache and v_cache (B, T, H, D), lengths (B,) int64: sequence b sees the first
    lengths[b] rows of its cache, the new token's own among them; zeros come out where it sees none.
    Views are read in place if they are contiguous in D. softmax_scale is 1 / sqrt(D) by default.
    Raises TypeError or ValueError, naming the argument.
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check_tensor(name, x, like=q)
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (B, T, H, D), got {tuple(x.shape)}")
    B, Tq, H, D = q.shape
    if Tq != 1:
        raise ValueError(f"q must have shape (B, 1, H, D), got {tuple(q.shape)}")
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"v_cache must have k_cache's shape {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}"
        )
    if (k_cache.shape[0], *k_cache.shape[2:]) != (B, H, D):
        raise ValueError(
            f"k_cache must have q's B, H and D: got {tuple(k_cache.shape)} and q {tuple(q.shape)}"
        )
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be an int64 tensor, got {got}")
    if lengths.shape != (B,) or lengths.device != q.device:
        raise ValueError(
            f"lengths must have shape ({B},) on {q.device}, "
            f"got {tuple(lengths.shape)} on {lengths.device}"
        )
    lengths = check_ids("lengths", lengths, k_cache.shape[1] + 1)
    scale, _ = _attention_scalars(q, D, softmax_scale, 0.0, None)
    backend = dispatch.choose("decode_attention", q.device, q.dtype, D)
    with torch.no_grad():
        if backend == "reference":
            return reference.decode_attention(q, k_cache, v_cache, lengths, softmax_scale=scale)
        return autograd.raw.decode_attention(q, k_cache, v_cache, lengths, scale, backend)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; statistics in float32.

    x (..., C); weight and bias (C,), of any floating dtype. Raises TypeError or ValueError,
    naming the argument. Ba et al., 2016.
    """
    _check_norm(x, weight, bias, eps)
    (x,) = _autocast(x)
    backend, backward = _norm_backends(x)
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    return autograd.call(autograd.LayerNorm, x, weight, bias, eps, backend, backward)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = x + residual, in one pass; shapes and errors as layer_norm."""
    _check_norm(x, weight, bias, eps)
    _check_tensor("residual", residual, like=x, dtype=False)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    x, residual = _autocast(x, residual)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
    backend, backward = _norm_backends(x)
    if backend == "reference":
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return autograd.call(autograd.AddLayerNorm, x, residual, weight, bias, eps, backend, backward)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Any shape. Hendrycks and Gimpel, 2016.
    """
    _check_tensor("x", x, like=x)
    if torch.compiler.is_compiling() and not dispatch.is_forced():
        return reference.gelu(x)  # Inductor fuses it into its neighbours
    backend = dispatch.choose("gelu", x.device, x.dtype)
    return reference.gelu(x) if backend == "reference" else autograd.call(autograd.Gelu, x, backend)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias): x (..., C), bias (C,) of any floating dtype."""
    _check_tensor("x", x, like=x)
    _check_row("bias", bias, x)
    (x,) = _autocast(x)
    if torch.compiler.is_compiling() and not dispatch.is_forced():
        return reference.bias_gelu(x, bias)
    backend = dispatch.choose("gelu", x.device, x.dtype)
    if backend == "reference":
        return reference.bias_gelu(x, bias)
    return autograd.call(autograd.BiasGelu, x, bias, backend)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    *,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    """Mean of -log softmax(logits)[target] over the targets that are not ignore_index.

    logits (..., V), targets (...) int64; the result is a float32 scalar (float64 for float64
    logits), NaN where every target is ignored. With reduction "sum" it is the sum over them, 0
    where there are none. The forward keeps two floats per row. With inplace_backward the gradient
    overwrites logits, so that no second tensor of their size ever exists; nobody may read them
    afterwards. Raises ValueError naming the first target outside [0, V).
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    _check_tensor("logits", logits, like=logits)
    _check_targets(targets, logits, logits.shape[-1], ignore_index)
    backend = dispatch.choose("cross_entropy", logits.device, logits.dtype)
    if backend == "reference":
        return reference.cross_entropy(logits, targets, ignore_index, reduction=reduction)
    rows, targets = logits.flatten(0, -2), targets.flatten()
    total = autograd.call(
        autograd.CrossEntropy, rows, targets, ignore_index, inplace_backward, backend
    ).sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1
) -> Tensor:
    """cross_entropy(x @ weight.T, targets) without ever storing the logits as a whole.

    x (..., C), weight (V, C) of any floating dtype (its gradient has it too), targets (...) int64.
    Result and errors as cross_entropy.
    """
    _check_tensor("x", x, like=x)
    _check_tensor("weight", weight, like=x, dtype=False)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (V, {x.shape[-1]}) for x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    _check_targets(targets, x, weight.shape[0], ignore_index)
    (x,) = _autocast(x)
    backend = dispatch.choose("linear_cross_entropy", x.device, x.dtype)
    if backend == "reference":
        return reference.linear_cross_entropy(x, weight, targets, ignore_index)
    rows, targets = x.flatten(0, -2), targets.flatten()
    need_dx, need_dweight = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    total = autograd.call(
        autograd.LinearCrossEntropy,
        *(rows, weight, targets, ignore_index, need_dx, need_dweight, backend),
    )
    return total / (targets != ignore_index).sum()


def check_ids(name: str, ids: Tensor, size: int, ignore_index: int | None = None) -> Tensor:
    """ids, once every one is known to lie in [0, size) or to equal ignore_index.

    Raises ValueError with the first that does not: a clear error in place of an assertion on the
    device. On a GPU this waits for the ids; while a CUDA graph is captured it cannot, and does not
    look.
    """
    if torch.compiler.is_compiling():
        return autograd.raw.check_ids(ids, name, size, ignore_index)
    autograd.look_at_ids(ids, name, size, ignore_index)
    return ids


def _check_tensor(name: str, x, *, like: Tensor, dtype: bool = True) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")
    if dtype and x.dtype != like.dtype and not _autocasting(like):
        raise TypeError(f"{name} must have dtype {like.dtype}, got {x.dtype}")


def _check_row(name: str, row, x: Tensor) -> None:
    _check_tensor(name, row, like=x, dtype=False)
    if x.dim() == 0 or row.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} must have the shape of x's last dimension, "
            f"got {tuple(row.shape)} for x {tuple(x.shape)}"
        )


def _check_norm(x, weight, bias, eps) -> None:
    _check_tensor("x", x, like=x)
    _check_row("weight", weight, x)
    _check_row("bias", bias, x)
    if weight.dtype != bias.dtype:
        raise TypeError(f"bias must have weight's dtype {weight.dtype}, got {bias.dtype}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def _norm_backends(x: Tensor) -> tuple[str, str]:
    """The backends of layer_norm's forward and backward for rows of x."""
    asked = x.device, x.dtype, x.shape[-1]
    forward = dispatch.choose("layer_norm", *asked)
    return forward, dispatch.choose_backward("layer_norm", forward, *asked)


def _check_targets(targets, x: Tensor, V: int, ignore_index: int) -> None:
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be an int64 tensor, got {got}")
    if x.dim() < 2 or targets.shape != x.shape[:-1]:
        raise ValueError(
            f"targets must have the leading shape of the logits, "
            f"got {tuple(targets.shape)} for {tuple(x.shape)}"
        )
    if targets.device != x.device:
        raise ValueError(f"targets must be on {x.device}, got {targets.device}")
    if V == 0:
        raise ValueError(f"the vocabulary must not be empty, got {tuple(x.shape)}")
    check_ids("targets", targets, V, ignore_index)


def _attention_scalars(x, D, softmax_scale, dropout_p, seed):
    """softmax_scale and seed as the kernels take them."""
    if D == 0:
        raise ValueError("the head size must be at least 1, got 0")
    scale = 1.0 / math.sqrt(D) if softmax_scale is None else float(softmax_scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    if dropout_p == 0.0:
        return scale, None
    if seed is None:  # drawn on the device: a CUDA graph replays with a fresh mask
        return scale, torch.randint(2**63 - 1, (1,), device=x.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device:
            raise ValueError(
                f"seed must be a (1,) int64 tensor on {x.device}, "
                f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
            )
        return scale, seed
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return scale, torch.full((1,), seed, dtype=torch.int64, device=x.device)


def _autocasting(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on."""
    if not _autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) for x in tensors)
