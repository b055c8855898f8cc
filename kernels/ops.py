"""The public functions. Each checks its arguments (checks.py) and chooses a backend (dispatch.py).

If no kernel supports a call, the reference computes it, and a warning gives the reason.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size   C features   V vocabulary
"""

import torch
from torch import Tensor

from . import autograd, dispatch, reference
from .checks import (
    HALVES,
    attention_scalars,
    autocasting,
    check_ids,
    check_integer,
    check_loss,
    check_norm,
    check_residual,
    check_row,
    check_targets,
    check_tensor,
)
from .ids import guard, poison
from .raw_ops import raw
from .recording import recorded


@recorded
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Causal softmax attention: q (B, Tq, H, D), k and v (B, Tk, H, D), result (B, Tq, H, D).

    Query i sees the keys up to i + Tk - Tq: the last query is aligned with the last key. Views
    are read in place if they are contiguous in D. softmax_scale is 1 / sqrt(D) by default.
    dropout_p is the probability that an attention probability is dropped; the mask depends only on
    seed and position (see reference.dropout_keep). seed is an int or a (1,) int64 tensor, drawn
    from PyTorch's generator by default. Raises TypeError or ValueError, naming the argument.

    Vaswani et al., 2017; Dao et al., FlashAttention-2, 2023.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, like=q)
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
    scale, seed = attention_scalars(q, q.shape[-1], softmax_scale, dropout_p, seed)
    q, k, v = _autocast(q, k, v)
    backend = dispatch.choose("attention", q.device, q.dtype, q.shape[-1])
    if backend == "reference":
        return reference.causal_attention(
            q, k, v, softmax_scale=scale, dropout_p=dropout_p, seed=seed
        )
    return autograd.call(autograd.Attention, q, k, v, scale, dropout_p, seed, backend)


@recorded
def causal_attention_qkv(
    qkv: Tensor,
    n_head: int,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """causal_attention on the packed projection: qkv (B, T, 3C) to (B, T, C).

    The last dimension of qkv holds q, k and v, each as n_head heads of size C / n_head. Nothing is
    transposed or copied, and the gradient is one packed tensor. Other arguments and errors are
    those of causal_attention.
    """
    check_tensor("qkv", qkv, like=qkv)
    if qkv.dim() != 3:
        raise ValueError(f"qkv must have shape (B, T, 3C), got {tuple(qkv.shape)}")
    check_integer("n_head", n_head)
    if n_head < 1 or qkv.shape[-1] % (3 * n_head):
        raise ValueError(
            f"n_head must divide qkv's last dimension / 3, got n_head={n_head}, {tuple(qkv.shape)}"
        )
    D = qkv.shape[-1] // (3 * n_head)
    scale, seed = attention_scalars(qkv, D, softmax_scale, dropout_p, seed)
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
    """Attention of one new token per sequence over a cache, (B, 1, H, D); without a gradient.

    q (B, 1, H, D), k_cache and v_cache (B, T, H, D), lengths (B,) int64: sequence b sees the first
    lengths[b] rows of its cache, including the new token's own. The result is zero if lengths[b] is
    0. Views are read in place if they are contiguous in D. softmax_scale is 1 / sqrt(D) by default.
    Raises TypeError or ValueError, naming the argument.
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, x, like=q)
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
    scale, _ = attention_scalars(q, D, softmax_scale, 0.0, None)
    backend = dispatch.choose("decode_attention", q.device, q.dtype, D)
    with torch.no_grad():
        if backend == "reference":
            return reference.decode_attention(q, k_cache, v_cache, lengths, softmax_scale=scale)
        return raw.decode_attention(q, k_cache, v_cache, lengths, scale, backend)


@recorded
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; statistics in float32.

    x is (..., C). weight and bias are (C,), of any floating dtype; None means 1 and 0. The result
    has x's dtype, also under autocast. Raises TypeError or ValueError, naming the argument. Ba et
    al., 2016.
    """
    check_norm(x, weight, bias, eps)
    backend = dispatch.choose("layer_norm", x.device, x.dtype, x.shape[-1])
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    weight, bias = _rows(weight, bias, x)
    return autograd.call(autograd.LayerNorm, x, weight, bias, eps, backend)


@recorded
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = x + residual, in one pass. Shapes and errors are layer_norm's.

    The norm has x's dtype, and s has residual's. These are equal, or x has 16 bits and residual is
    float32, as in a model under autocast. Under autocast, any other residual is converted.
    """
    check_norm(x, weight, bias, eps)
    check_residual(residual, x)
    if residual.dtype != x.dtype:
        wider = torch.promote_types(x.dtype, residual.dtype)
        residual = residual.to(wider)
        if x.dtype not in HALVES or wider != torch.float32:
            x = x.to(wider)
    backend = dispatch.choose("layer_norm", x.device, x.dtype, x.shape[-1])
    if backend == "reference":
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    weight, bias = _rows(weight, bias, x)
    return autograd.call(autograd.AddLayerNorm, x, residual, weight, bias, eps, backend)


@recorded
def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Any shape. Hendrycks and Gimpel, 2016.
    """
    check_tensor("x", x, like=x)
    if torch.compiler.is_compiling() and dispatch.forced() is None:
        return reference.gelu(x)  # Inductor fuses it with the neighbouring operations
    backend = dispatch.choose("gelu", x.device, x.dtype)
    return reference.gelu(x) if backend == "reference" else autograd.call(autograd.Gelu, x, backend)


@recorded
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) for x (..., C) and bias (C,) of any floating dtype."""
    check_tensor("x", x, like=x)
    check_row("bias", bias, x)
    if torch.compiler.is_compiling() and dispatch.forced() is None:
        return reference.bias_gelu(x, bias)
    backend = dispatch.choose("gelu", x.device, x.dtype)
    if backend == "reference":
        return reference.bias_gelu(x, bias)
    return autograd.call(autograd.BiasGelu, x, bias, backend)


@recorded
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """-log softmax(logits)[target], in float32 (float64 for float64 logits).

    logits (..., V), targets (...) int64. reduction, ignore_index and label_smoothing are those of
    torch.nn.functional.cross_entropy: "mean" and "sum" run over the targets that are not
    ignore_index, and return (); "none" returns each loss, (...), 0 for an ignored target. If every
    target is ignored, the mean is NaN and the gradients are 0.

    The forward saves two floats per row. With inplace_backward the gradient overwrites logits, so
    no second tensor of their size exists; logits must not be read afterwards. On a CPU this raises
    RuntimeError if logits are mapped read-only.

    Raises ValueError, naming a target outside [0, V); on a GPU a later call raises it, because this
    one does not wait. Such a target, and one that is changed to a value outside [0, V) after this
    check, makes the loss and gradient of its row NaN.
    """
    check_loss(reduction, label_smoothing)
    check_tensor("logits", logits, like=logits)
    targets = check_targets(targets, logits, logits.shape[-1], ignore_index)
    backend = dispatch.choose("cross_entropy", logits.device, logits.dtype)
    if backend == "reference":
        targets, valid = guard(targets, logits.shape[-1], ignore_index)
        loss = reference.cross_entropy(
            logits, targets, ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        return poison(loss, valid)
    rows, row_targets = logits.flatten(0, -2), targets.flatten()
    options = ignore_index, float(label_smoothing), reduction, inplace_backward, backend
    loss = autograd.call(autograd.CrossEntropy, rows, row_targets, *options)
    return loss.view(targets.shape) if reduction == "none" else loss


@recorded
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(x @ weight.T, targets) without ever storing all logits.

    x (..., C), weight (V, C) of any floating dtype, which its gradient has too, targets (...)
    int64. Other arguments, result and errors are those of cross_entropy. With reduction "none",
    the backward computes the logits a second time.
    """
    check_loss(reduction, label_smoothing)
    check_tensor("x", x, like=x)
    check_tensor("weight", weight, like=x, dtype=False)
    if weight.dim() != 2 or not x.dim() or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (V, C) for x (..., C), "
            f"got {tuple(weight.shape)} for x {tuple(x.shape)}"
        )
    targets = check_targets(targets, x, weight.shape[0], ignore_index)
    (x,) = _autocast(x)
    backend = dispatch.choose("linear_cross_entropy", x.device, x.dtype)
    if backend == "reference":
        targets, valid = guard(targets, weight.shape[0], ignore_index)
        loss = reference.linear_cross_entropy(
            *(x, weight, targets, ignore_index),
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return poison(loss, valid)
    rows, row_targets = x.flatten(0, -2), targets.flatten()
    need_dx, need_dweight = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    options = ignore_index, float(label_smoothing), reduction, need_dx, need_dweight, backend
    loss = autograd.call(autograd.LinearCrossEntropy, rows, weight, row_targets, *options)
    return loss.view(targets.shape) if reduction == "none" else loss


def _rows(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """weight and bias, with None replaced by ones and zeros."""
    given = bias if weight is None else weight
    like = {"dtype": given.dtype if given is not None else None, "device": x.device}
    if weight is None:
        weight = torch.ones(x.shape[-1:], **like)
    return weight, torch.zeros(x.shape[-1:], **like) if bias is None else bias


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, converted to the autocast dtype if autocast is on."""
    if not autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) for x in tensors)
