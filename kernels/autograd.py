"""The kernels as PyTorch sees them: one raw op per pass, and the autograd functions around them.

Each pass is registered under torch.ops.gpt2_kernels, with a fake implementation, so that
torch.compile, CUDA graphs and selective checkpointing see one opaque node; the autograd functions
stand outside of it, the cheapest boundary there is. A raw op's last argument names the backend,
which the forward chooses for both passes. Gradients are first derivatives only; a second raises.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size
    N rows   C features   V vocabulary
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import dispatch
from .linear_cross_entropy import linear_cross_entropy_fwd
from .product import multiplies

_library = torch.library.Library("gpt2_kernels", "DEF")
raw = SimpleNamespace()  # the one overload of each op: a call need not look for it


def _register(schema: str, run, fake) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"gpt2_kernels::{name}", fake, lib=_library)
    setattr(raw, name, getattr(torch.ops.gpt2_kernels, name).default)


def _launcher(op: str, schema: str):
    """Registers `schema`, run by the function of its name in the backend's module of `op`. The
    decorated function is the fake: outputs are contiguous, and so are its."""
    name = schema.partition("(")[0]

    def run(*args):
        *args, backend = args
        return _on_device_of(args[0], getattr(dispatch.module(backend, op), name), *args)

    def decorate(fake):
        _register(schema, run, fake)
        return fake

    return decorate


def _on_device_of(x: Tensor, launch, *args, **kwargs):
    if not x.is_cuda:
        return launch(*args, **kwargs)
    with torch.cuda.device(x.device):
        return launch(*args, **kwargs)


def _like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape or x.shape, dtype=dtype or x.dtype, device=x.device)


def _accumulator(x: Tensor) -> torch.dtype:
    """Of statistics and sums: float32, and float64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


class _NoBackward:
    """A ctx that keeps nothing."""

    def save_for_backward(self, *tensors):
        pass


def call(function: type[torch.autograd.Function], *args):
    """function.apply(*args); its forward alone, a third of the price of a small call, where nothing
    needs a gradient."""
    needed = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in args
    )
    if needed or forward_ad._current_level >= 0:  # apply says that there is no forward mode
        return function.apply(*args)
    return function.forward(_NoBackward(), *args)


# ---- attention


@_launcher(
    "attention",
    "attention_fwd(Tensor q, Tensor k, Tensor v, float softmax_scale, float dropout_p, "
    "Tensor? seed, str backend) -> (Tensor o, Tensor lse)",
)
def _(q, k, v, softmax_scale, dropout_p, seed, backend):
    B, Tq, H, _ = q.shape
    return _like(q), _like(q, B, H, Tq, dtype=_accumulator(q))


@_launcher(
    "attention",
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "float softmax_scale, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor)",
)
def _(do, q, k, v, o, lse, softmax_scale, dropout_p, seed, backend):
    return _like(q), _like(k), _like(v)


@_launcher(
    "attention",
    "attention_qkv_fwd(Tensor qkv, int n_head, float softmax_scale, float dropout_p, "
    "Tensor? seed, str backend) -> (Tensor o, Tensor lse)",
)
def _(qkv, n_head, softmax_scale, dropout_p, seed, backend):
    B, T, C3 = qkv.shape
    return _like(qkv, B, T, C3 // 3), _like(qkv, B, n_head, T, dtype=_accumulator(qkv))


@_launcher(
    "attention",
    "attention_qkv_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, int n_head, "
    "float softmax_scale, float dropout_p, Tensor? seed, str backend) -> Tensor",
)
def _(do, qkv, o, lse, n_head, softmax_scale, dropout_p, seed, backend):
    return _like(qkv)


# The weight is (N, K) of x's dtype, or with a scale int8, packed (linear.py). No gradient.
@_launcher(
    "gemv",
    "gemv(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, str backend) -> Tensor",
)
def _(x, weight, bias, scale, backend):
    return _like(x, x.shape[0], weight.shape[0])


# params and scales as csrc/cpu/ops_decode.cpp has them; kv is written to. No gradient.
@_launcher(
    "gemv",
    "decode_layers(Tensor x, Tensor[] params, Tensor[] scales, Tensor norm, Tensor norm_bias, "
    "Tensor(a!) kv, Tensor lengths, int n_head, float eps, str backend) -> Tensor",
)
def _(x, params, scales, norm, norm_bias, kv, lengths, n_head, eps, backend):
    return _like(x)


@_launcher(
    "decode_attention",
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
    "float softmax_scale, str backend) -> Tensor",
)
def _(q, k_cache, v_cache, lengths, softmax_scale, backend):
    return _like(q)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, dropout_p, seed, backend):
        o, lse = raw.attention_fwd(q, k, v, softmax_scale, dropout_p, seed, backend)
        ctx.save_for_backward(q, k, v, o, lse, seed)
        ctx.softmax_scale, ctx.dropout_p, ctx.backend = softmax_scale, dropout_p, backend
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        *saved, seed = ctx.saved_tensors
        gradients = raw.attention_bwd(
            do, *saved, ctx.softmax_scale, ctx.dropout_p, seed, ctx.backend
        )
        return *gradients, None, None, None, None


class AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head, softmax_scale, dropout_p, seed, backend):
        o, lse = raw.attention_qkv_fwd(qkv, n_head, softmax_scale, dropout_p, seed, backend)
        ctx.save_for_backward(qkv, o, lse, seed)
        ctx.n_head, ctx.softmax_scale = n_head, softmax_scale
        ctx.dropout_p, ctx.backend = dropout_p, backend
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        qkv, o, lse, seed = ctx.saved_tensors
        dqkv = raw.attention_qkv_bwd(
            do, qkv, o, lse, ctx.n_head, ctx.softmax_scale, ctx.dropout_p, seed, ctx.backend
        )
        return dqkv, None, None, None, None, None


# ---- layer_norm


def _stats(x: Tensor) -> Tensor:
    return _like(x, 2, math.prod(x.shape[:-1]), dtype=_accumulator(x))  # mean, rstd


@_launcher(
    "layer_norm",
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps, str backend)"
    " -> (Tensor y, Tensor stats)",
)
def _(x, weight, bias, eps, backend):
    return _like(x), _stats(x)


@_launcher(
    "layer_norm",
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, "
    "str backend) -> (Tensor y, Tensor s, Tensor stats)",
)
def _(x, residual, weight, bias, eps, backend):
    return _like(x), _like(x), _stats(x)


@_launcher(
    "layer_norm",
    "layer_norm_bwd(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor stats, str backend)"
    " -> (Tensor dx, Tensor dparams)",
)
def _(dy, ds, x, weight, stats, backend):
    return _like(x), _like(weight, 2, weight.numel())  # of weight and bias


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, backend, backward):
        y, stats = raw.layer_norm_fwd(x, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, stats)
        ctx.backend = backward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, (dweight, dbias) = raw.layer_norm_bwd(dy, None, *ctx.saved_tensors, ctx.backend)
        return dx, dweight, dbias, None, None, None


class AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, backend, backward):
        y, s, stats = raw.add_layer_norm_fwd(x, residual, weight, bias, eps, backend)
        ctx.save_for_backward(s, weight, stats)
        ctx.backend = backward
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):
        # s = x + residual: one tensor is the gradient of both.
        dx, (dweight, dbias) = raw.layer_norm_bwd(dy, ds, *ctx.saved_tensors, ctx.backend)
        return dx, dx, dweight, dbias, None, None, None


# ---- gelu


@_launcher("gelu", "gelu_fwd(Tensor x, str backend) -> Tensor")
def _(x, backend):
    return _like(x)


@_launcher("gelu", "gelu_bwd(Tensor dy, Tensor x, str backend) -> Tensor")
def _(dy, x, backend):
    return _like(x)


@_launcher("gelu", "bias_gelu_fwd(Tensor x, Tensor bias, str backend) -> Tensor")
def _(x, bias, backend):
    return _like(x)


@_launcher(
    "gelu",
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias, str backend) -> (Tensor dx, Tensor dbias)",
)
def _(dy, x, bias, backend):
    return _like(x), _like(bias)


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.save_for_backward(x)
        ctx.backend = backend
        return raw.gelu_fwd(x, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return raw.gelu_bwd(dy, *ctx.saved_tensors, ctx.backend), None


class BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, backend):
        ctx.save_for_backward(x, bias)
        ctx.backend = backend
        return raw.bias_gelu_fwd(x, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *raw.bias_gelu_bwd(dy, *ctx.saved_tensors, ctx.backend), None


# ---- cross_entropy


@_launcher(
    "cross_entropy",
    "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index, str backend)"
    " -> (Tensor losses, Tensor stats)",
)
def _(logits, targets, ignore_index, backend):
    N, dtype = logits.shape[0], _accumulator(logits)
    return _like(logits, N, dtype=dtype), _like(logits, 2, N, dtype=dtype)


@_launcher(
    "cross_entropy",
    "cross_entropy_bwd(Tensor dlosses, Tensor logits, Tensor targets, Tensor stats, "
    "int ignore_index, str backend) -> Tensor",
)
def _(dlosses, logits, targets, stats, ignore_index, backend):
    return _like(logits)


@_launcher(
    "cross_entropy",
    "cross_entropy_bwd_(Tensor dlosses, Tensor(a!) logits, Tensor targets, Tensor stats, "
    "int ignore_index, str backend) -> ()",
)
def _(dlosses, logits, targets, stats, ignore_index, backend):
    return None


class CrossEntropy(torch.autograd.Function):
    """Losses by row, (N,) float32 (float64 for float64 logits)."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, inplace_backward, backend):
        losses, stats = raw.cross_entropy_fwd(logits, targets, ignore_index, backend)
        ctx.save_for_backward(logits, targets, stats)
        ctx.ignore_index, ctx.inplace, ctx.backend = ignore_index, inplace_backward, backend
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        logits, targets, stats = ctx.saved_tensors
        args = (dlosses, logits, targets, stats, ctx.ignore_index, ctx.backend)
        if ctx.inplace and logits.stride(-1) == 1 and logits.stride(0) >= logits.shape[1]:
            raw.cross_entropy_bwd_(*args)
            torch.autograd.graph.increment_version(logits)  # a second backward is refused
            return logits.detach(), None, None, None, None
        return raw.cross_entropy_bwd(*args), None, None, None, None


def _linear_cross_entropy(*args):
    x, weight, *args, backend = args
    row_kernel = dispatch.module(backend, "cross_entropy")
    if backend == "cpu":  # odd rows cost nothing there, and small products are slow
        wide = not multiplies(x.dtype, "cpu")  # see linear.py
        operands = (x.float(), weight.to(x.dtype).float()) if wide else (x, weight)
        total, dx, dweight = linear_cross_entropy_fwd(
            row_kernel, *operands, *args, align=1, tile=128
        )
        return total, dx.to(x.dtype), dweight
    return _on_device_of(x, linear_cross_entropy_fwd, row_kernel, x, weight, *args)


def _linear_cross_entropy_fake(x, weight, targets, ignore_index, need_dx, need_dweight, backend):
    (N, C), V = x.shape, weight.shape[0]
    total = torch.empty((), dtype=_accumulator(x), device=x.device)
    dweight = _like(x, V if need_dweight else 0, C, dtype=_accumulator(x))
    return total, _like(x, N if need_dx else 0, C), dweight


_register(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor targets, int ignore_index, "
    "bool need_dx, bool need_dweight, str backend) -> (Tensor total, Tensor dx, Tensor dweight)",
    _linear_cross_entropy,
    _linear_cross_entropy_fake,
)


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses, () float32. The forward takes the gradients for dtotal = 1, of x and
    weight as far as they are needed: under no_grad they are not, whatever they require."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, need_dx, need_dweight, backend):
        total, dx, dweight = raw.linear_cross_entropy_fwd(
            x, weight, targets, ignore_index, need_dx, need_dweight, backend
        )
        ctx.save_for_backward(dx, dweight)
        ctx.need_dx, ctx.need_dweight, ctx.weight_dtype = need_dx, need_dweight, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        dx, dweight = ctx.saved_tensors
        dx = dx * dtotal if ctx.need_dx else None
        dweight = (dweight * dtotal).to(ctx.weight_dtype) if ctx.need_dweight else None
        return dx, dweight, None, None, None, None, None


# ---- token ids


def look_at_ids(ids: Tensor, name: str, size: int, ignore_index: int | None) -> None:
    """Raises ValueError with the first id outside [0, size) that is not ignore_index."""
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bad = (ids < 0) | (ids >= size)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bad.any():
        raise ValueError(f"{name} must lie in [0, {size}), got {ids[bad][0].item()}")


def _checked_copy(ids, name, size, ignore_index):
    look_at_ids(ids, name, size, ignore_index)
    return ids.clone()


_register(
    "check_ids(Tensor ids, str name, int size, int? ignore_index) -> Tensor",
    _checked_copy,
    lambda ids, *args: torch.empty_like(ids),
)
