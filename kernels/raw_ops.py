"""The raw ops, which PyTorch sees: one for each forward and each backward.

Each is registered under torch.ops.gpt2_kernels with a fake implementation, so torch.compile, CUDA
graphs and selective checkpointing see one opaque node. The last argument names the backend. Raw ops
have no gradient; autograd.py adds it.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size
    N rows   C features   V vocabulary
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from . import dispatch, recorder
from .ids import validate
from .linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd

_library = torch.library.Library("gpt2_kernels", "DEF")
raw = SimpleNamespace()  # the only overload of each op, so that a call need not resolve it


def _register(schema: str, run, fake) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"gpt2_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.gpt2_kernels, name).default
    recorder.implementations[op] = run
    setattr(raw, name, op)


def _launcher(op: str, schema: str):
    """Registers an op that calls the function of the same name in the backend's module for `op`.
    The decorated function is the fake implementation; its outputs must be contiguous."""
    name = schema.partition("(")[0]

    def run(*args):
        *args, backend = args
        return on_device_of(args[0], getattr(dispatch.module(backend, op), name), *args)

    def decorate(fake):
        _register(schema, run, fake)
        return fake

    return decorate


def on_device_of(x: Tensor, launch, *args):
    """launch(*args), with x's GPU as the current device if x is on one."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return launch(*args)
    with torch.cuda.device(x.device):
        return launch(*args)


def _like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape or x.shape, dtype=dtype or x.dtype, device=x.device)


def _accumulator(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for a float64 x."""
    return torch.promote_types(x.dtype, torch.float32)


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


# The weight is (N, K) in x's dtype, or packed int8 with a scale (linear.py). No gradient.
@_launcher(
    "linear",
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, str backend) -> Tensor",
)
def _(x, weight, bias, scale, backend):
    return _like(x, x.shape[0], weight.shape[0])


# params and scales are as in csrc/ops/decode_layers.cpp; kv is written to. No gradient.
@_launcher(
    "linear",
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
    return _like(x), _like(residual), _stats(x)


@_launcher(
    "layer_norm",
    "layer_norm_bwd(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor stats, str backend)"
    " -> (Tensor dx, Tensor dparams)",
)
def _(dy, ds, x, weight, stats, backend):
    return _like(x), _like(weight, 2, weight.numel())  # gradients of weight and bias


# x and residual have different dtypes, dy's and s's, so each has its own gradient.
@_launcher(
    "layer_norm",
    "mixed_layer_norm_bwd(Tensor dy, Tensor ds, Tensor s, Tensor weight, Tensor stats, "
    "str backend) -> (Tensor dx, Tensor dresidual, Tensor dparams)",
)
def _(dy, ds, s, weight, stats, backend):
    return _like(dy), _like(s), _like(weight, 2, weight.numel())


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


# ---- cross_entropy


@_launcher(
    "cross_entropy",
    "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index, float smoothing, "
    "str backend) -> (Tensor losses, Tensor stats)",
)
def _(logits, targets, ignore_index, smoothing, backend):
    N, dtype = logits.shape[0], _accumulator(logits)
    return _like(logits, N, dtype=dtype), _like(logits, 2, N, dtype=dtype)


@_launcher(
    "cross_entropy",
    "cross_entropy_bwd(Tensor dlosses, Tensor logits, Tensor targets, Tensor stats, "
    "int ignore_index, float smoothing, str backend) -> Tensor",
)
def _(dlosses, logits, targets, stats, ignore_index, smoothing, backend):
    return _like(logits)


@_launcher(
    "cross_entropy",
    "cross_entropy_bwd_(Tensor dlosses, Tensor(a!) logits, Tensor targets, Tensor stats, "
    "int ignore_index, float smoothing, str backend) -> ()",
)
def _(dlosses, logits, targets, stats, ignore_index, smoothing, backend):
    return None


def _by_chunks(run):
    """A raw op of linear_cross_entropy.py: `run` with the backend's row kernel and layout."""

    def on_backend(x, weight, *args):
        *args, backend = args
        row_kernel = dispatch.module(backend, "cross_entropy")
        chunks = dispatch.logits_chunks(backend, x.dtype)
        wide = (x.float(), weight.to(x.dtype).float()) if chunks.wide else (x, weight)
        *losses, dx, dweight = on_device_of(x, run, row_kernel, *wide, *args, chunks)
        return *losses, dx.to(x.dtype), dweight

    return on_backend


def _linear_gradients(x, weight, need_dx, need_dweight):
    N, (V, C) = x.shape[0], weight.shape
    dweight = _like(x, V if need_dweight else 0, C, dtype=_accumulator(x))
    return _like(x, N if need_dx else 0, C), dweight


def _linear_fwd_fake(x, weight, targets, ignore_index, smoothing, need_dx, need_dweight, backend):
    losses = _like(x, x.shape[0], dtype=_accumulator(x))
    return losses, *_linear_gradients(x, weight, need_dx, need_dweight)


def _linear_bwd_fake(
    x, weight, dlosses, targets, ignore_index, smoothing, need_dx, need_dweight, backend
):
    return _linear_gradients(x, weight, need_dx, need_dweight)


launch_linear_cross_entropy = _by_chunks(linear_cross_entropy_fwd)
_register(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor targets, int ignore_index, "
    "float smoothing, bool need_dx, bool need_dweight, str backend)"
    " -> (Tensor losses, Tensor dx, Tensor dweight)",
    launch_linear_cross_entropy,
    _linear_fwd_fake,
)
_register(
    "linear_cross_entropy_bwd(Tensor x, Tensor weight, Tensor dlosses, Tensor targets, "
    "int ignore_index, float smoothing, bool need_dx, bool need_dweight, str backend)"
    " -> (Tensor dx, Tensor dweight)",
    _by_chunks(linear_cross_entropy_bwd),
    _linear_bwd_fake,
)


# ---- token ids


def _checked_copy(ids, name, size, ignore_index):
    validate(ids, name, size, ignore_index)
    return ids.clone()


_register(
    "check_ids(Tensor ids, str name, int size, int? ignore_index) -> Tensor",
    _checked_copy,
    lambda ids, *args: torch.empty_like(ids),
)
