"""A block of GPT-2 as one autograd function, with a backward written by hand.

    s1 = s + x      h1 = layer_norm(s1)     qkv = h1 wq^T + bq      o = attention(qkv)
    s2 = s1 + a     h2 = layer_norm(s2)     a = o wo^T + bo
    f = h2 wf^T     g = gelu(f + bf)        y = g wp^T + bp

It calls the kernels of the separate ops and PyTorch's matrix products, but passes autograd and the
dispatcher once, not twelve times, and so takes half of their time on the host. On a GPU it also
saves work: the weights are cast together, products write weight gradients in the weight's dtype,
and a norm's backward adds up the rows that it writes, which are a bias gradient.

    B batch   T time   C features   H heads
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, reference
from .autograd import by_reference, call
from .matmul import has_fast_matmul, is_autocasting
from .raw_ops import on_device_of
from .recorder import attach_sum, attached_sum
from .recording import recorded

# Rows from which the kernel of attention's backward also sums its results. For fewer, its two more
# launches cost the host more than PyTorch's sum costs the GPU.
SUM_ROWS = 8192
SUM_FEATURES = 4096  # most for the norm's backward; with more its registers spill


class Parameters(NamedTuple):
    """A block's, in the order of its state dict. Weights of linear layers are (out, in)."""

    ln_1: Tensor
    ln_1_bias: Tensor
    c_attn: Tensor  # (3C, C)
    c_attn_bias: Tensor
    attn_proj: Tensor  # (C, C)
    attn_proj_bias: Tensor
    ln_2: Tensor
    ln_2_bias: Tensor
    c_fc: Tensor  # (4C, C)
    c_fc_bias: Tensor
    mlp_proj: Tensor  # (C, 4C)
    mlp_proj_bias: Tensor


class _Plan(NamedTuple):
    """How a block is computed."""

    ops: SimpleNamespace  # the kernels
    dtype: torch.dtype  # of activations
    autocasting: bool
    n_head: int
    softmax_scale: float
    eps: tuple[float, float]


@recorded
def block(
    x: Tensor, s: Tensor | None, n_head: int, eps_1: float, eps_2: float, *parameters: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(y, s2) for x (B, T, C) and the stream s, None before the first block; None if its ops must
    be called one by one. y (B, T, C), in the autocast dtype or x's, is not yet added to s2, the
    stream, which has the dtype of s, or of x without s. parameters are those of Parameters.
    """
    plan = _plan(x, s, Parameters(*parameters), n_head, (eps_1, eps_2))
    return plan and on_device_of(x, call, _Block, x, s, plan, *parameters)


def _plan(x: Tensor, s: Tensor | None, parameters: Parameters, n_head: int, eps) -> _Plan | None:
    """The plan, or None if the ops must be called one by one: one of them has no kernel, or only
    they support these dtypes."""
    device, C = x.device, x.shape[-1]
    autocasting = is_autocasting(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocasting else x.dtype
    if s is not None and (x.dtype != dtype or s.dtype not in (dtype, torch.float32)):
        return None
    if not autocasting:
        dtypes = {p.dtype for p in parameters}
        if dtypes != {dtype} or (s is not None and s.dtype != dtype):
            return None
    if not x.numel() or not x.is_contiguous() or not has_fast_matmul(dtype, device.type):
        return None
    if x.is_neg() or (s is not None and s.is_neg()):  # negated, but not yet in memory
        return None
    ops = _ops(
        dispatch.choose("attention", device, dtype, C // n_head),
        dispatch.choose("layer_norm", device, dtype, C),
        dispatch.choose("gelu", device, dtype),
    )
    return ops and _Plan(ops, dtype, autocasting, n_head, (C // n_head) ** -0.5, eps)


@functools.cache
def _ops(attention: str, layer_norm: str, gelu: str) -> SimpleNamespace | None:
    """The functions of these backends by name; None if one of them is the reference."""
    if "reference" in (attention, layer_norm, gelu):
        return None
    names = {
        "attention": (attention, "attention_qkv_fwd attention_qkv_bwd"),
        "layer_norm": (
            layer_norm,
            "layer_norm_fwd add_layer_norm_fwd layer_norm_bwd mixed_layer_norm_bwd",
        ),
        "gelu": (gelu, "bias_gelu_fwd bias_gelu_bwd"),
    }
    # Triton's kernels also add up the rows that they write.
    found = {"norm_sums": layer_norm == "triton", "attention_sums": attention == "triton"}
    for op, (backend, functions) in names.items():
        for name in functions.split():
            function = getattr(dispatch.module(backend, op), name)
            found[name] = getattr(function, "default", function)  # of an operator its one overload
    return SimpleNamespace(**found)


class _Block(torch.autograd.Function):
    uses_sums = True  # its backward calls attached_sum

    @staticmethod
    def forward(ctx, x, s, plan, *parameters):
        p, ops = Parameters(*parameters), plan.ops
        w = _cast(p, plan.dtype) if plan.autocasting else p
        if s is None:
            h1, stats1 = ops.layer_norm_fwd(x, p.ln_1, p.ln_1_bias, plan.eps[0])
            h1, s1 = h1.to(plan.dtype), x
        else:
            h1, s1, stats1 = ops.add_layer_norm_fwd(x, s, p.ln_1, p.ln_1_bias, plan.eps[0])
        qkv = F.linear(h1, w.c_attn, w.c_attn_bias)
        o, lse = ops.attention_qkv_fwd(qkv, plan.n_head, plan.softmax_scale, 0.0, None)
        a = F.linear(o, w.attn_proj, w.attn_proj_bias)
        h2, s2, stats2 = ops.add_layer_norm_fwd(a, s1, p.ln_2, p.ln_2_bias, plan.eps[1])
        f = F.linear(h2, w.c_fc)
        g = ops.bias_gelu_fwd(f, p.c_fc_bias)
        y = F.linear(g, w.mlp_proj, w.mlp_proj_bias)
        y = torch.ops.aten._unsafe_view(y, y.shape)  # not a view of another tensor
        casts = (w.c_attn, w.attn_proj, w.c_fc, w.mlp_proj) if plan.autocasting else ()
        ctx.save_for_backward(
            s, *parameters, x, s1, stats1, h1, qkv, o, lse, s2, stats2, h2, f, g, *casts
        )
        ctx.plan = plan
        return y, s2

    @staticmethod
    def backward(ctx, dy, ds2):
        s, *saved = ctx.saved_tensors
        p, plan, ops = Parameters(*saved[:12]), ctx.plan, ctx.plan.ops
        x, s1, stats1, h1, qkv, o, lse, s2, stats2, h2, f, g, *casts = saved[12:]
        needs_x, needs_s, _, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = (x, *p) if s is None else (x, s, *p)
            needed = (needs_x, *needs) if s is None else (needs_x, needs_s, *needs)
            found = by_reference(_formula(plan, s is not None), inputs, needed, dy, ds2)
            return found[0], None if s is None else found[1], None, *found[-12:]
        needs, ds2 = Parameters(*needs), ds2.resolve_neg()  # a kernel reads memory
        c_attn, attn_proj, c_fc, mlp_proj = casts or (p.c_attn, p.attn_proj, p.c_fc, p.mlp_proj)

        dmlp_proj_bias = _column_sum(dy) if needs.mlp_proj_bias else None
        dmlp_proj = _product(dy, g, p.mlp_proj) if needs.mlp_proj else None
        df, dc_fc_bias = ops.bias_gelu_bwd(dy @ mlp_proj, f, p.c_fc_bias)
        dc_fc = _product(df, h2, p.c_fc) if needs.c_fc else None
        dh2 = df @ c_fc
        del df

        da, ds1, dln_2, dln_2_bias = _norm_bwd(ops, dh2, ds2, s2, p.ln_2, stats2)
        del dh2
        dattn_proj_bias = _column_sum(da) if needs.attn_proj_bias else None
        dattn_proj = _product(da, o, p.attn_proj) if needs.attn_proj else None

        dqkv, dc_attn_bias = _attention_bwd(plan, da @ attn_proj, qkv, o, lse, p.c_attn_bias)
        dc_attn = _product(dqkv, h1, p.c_attn) if needs.c_attn else None
        dh1 = dqkv @ c_attn
        del dqkv

        if s is None:
            dh1 = dh1.to(x.dtype)
        dx, ds, dln_1, dln_1_bias = _norm_bwd(ops, dh1, ds1, s1, p.ln_1, stats1)
        return (
            *(dx, None if s is None else ds, None),
            *(dln_1, dln_1_bias, dc_attn, dc_attn_bias, dattn_proj, dattn_proj_bias),
            *(dln_2, dln_2_bias, dc_fc, dc_fc_bias, dmlp_proj, dmlp_proj_bias),
        )


def _formula(plan: _Plan, with_s: bool):
    """The block in plain PyTorch, for higher derivatives: a function of x, s if with_s, and the
    parameters."""

    def linear(h, weight, bias=None):
        return F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))

    def block(x, *rest):
        s, p = (rest[0], rest[1:]) if with_s else (None, rest)
        p = Parameters(*p)
        s = x if s is None else s + x
        h = reference.layer_norm(s, p.ln_1, p.ln_1_bias, plan.eps[0]).to(plan.dtype)
        q, k, v = reference.split_heads(linear(h, p.c_attn, p.c_attn_bias), plan.n_head)
        o = reference.attention_by_formula(q, k, v, plan.softmax_scale, 0.0, None).flatten(2)
        s = s + linear(o, p.attn_proj, p.attn_proj_bias)
        h = reference.layer_norm(s, p.ln_2, p.ln_2_bias, plan.eps[1]).to(plan.dtype)
        g = reference.bias_gelu(linear(h, p.c_fc), p.c_fc_bias)
        return linear(g, p.mlp_proj, p.mlp_proj_bias), s

    return block


def _cast(p: Parameters, dtype: torch.dtype) -> Parameters:
    """The linear layers' parameters in dtype. On a GPU one kernel casts all of them, into one
    tensor."""
    names = ("c_attn", "c_attn_bias", "attn_proj", "attn_proj_bias", "c_fc", "mlp_proj")
    names += ("mlp_proj_bias",)  # the GELU kernel reads c_fc_bias in any dtype
    given = [getattr(p, name) for name in names]
    if all(t.dtype == dtype for t in given):
        return p
    starts = [0]
    for t in given:
        starts.append(starts[-1] + -(-t.numel() // 64) * 64)  # aligned to 128 bytes
    flat = torch.empty(starts[-1], dtype=dtype, device=p.c_attn.device)
    casts = [
        flat.as_strided(t.shape, (t.shape[1], 1) if t.dim() == 2 else (1,), start)
        for t, start in zip(given, starts, strict=False)
    ]
    torch._foreach_copy_(casts, given)
    return p._replace(**dict(zip(names, casts, strict=True)))


def _product(dout: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """dout^T rows, the gradient of weight, in its dtype: dout (B, T, out), rows (B, T, in)."""
    dout, rows = dout.flatten(0, 1), rows.flatten(0, 1)
    if dout.is_cuda and dout.dtype != weight.dtype == torch.float32:
        return torch.mm(dout.t(), rows, out_dtype=torch.float32)
    return torch.mm(dout.t(), rows).to(weight.dtype)


def _attention_bwd(plan, do, qkv, o, lse, bias):
    """dqkv, and the gradient of bias."""
    args = do, qkv, o, lse, plan.n_head, plan.softmax_scale, 0.0, None
    if plan.ops.attention_sums and o.numel() // o.shape[-1] >= SUM_ROWS:
        return plan.ops.attention_qkv_bwd(*args, bias.dtype)
    dqkv = plan.ops.attention_qkv_bwd(*args)
    return dqkv, _column_sum(dqkv)


def _norm_bwd(ops, dy, ds, s, weight, stats):
    """The gradient of s in dy's dtype and in s's; the gradients of weight and bias."""
    sums = {"sum_dx": True} if ops.norm_sums and s.shape[-1] <= SUM_FEATURES else {}
    if dy.dtype == s.dtype:
        dx, dparams = ops.layer_norm_bwd(dy, ds, s, weight, stats, **sums)
        dresidual = dx
    else:
        dx, dresidual, dparams = ops.mixed_layer_norm_bwd(dy, ds, s, weight, stats, **sums)
    dweight, dbias, *dx_sum = dparams.unbind()
    if dx_sum:
        attach_sum(dx, dx_sum[0])
    return dx, dresidual, dweight, dbias


def _column_sum(dout: Tensor) -> Tensor:
    """The sum of dout (..., C) over its rows: the gradient of a bias.

    Where dout comes from a norm's backward, possibly the next block's, the kernel has computed it.
    If dout was changed since, its version tells.
    """
    total = attached_sum(dout)
    return dout.sum((0, 1)) if total is None else total
