"""The autograd functions around the raw ops (raw_ops.py): saved tensors, forward and backward.

Autograd wraps the raw ops from outside, which costs the least per call. The forward fixes the
backends of both passes. With create_graph=True, a backward computes its gradients by the reference
instead, so that PyTorch computes all higher derivatives.
"""

import torch
from torch import Tensor

from . import recorder as recorders
from . import reference
from .ids import guard, poison
from .raw_ops import raw


class _NoBackward:
    """A ctx that saves nothing."""

    def save_for_backward(self, *tensors):
        pass


def call(function: type[torch.autograd.Function], *args):
    """function.apply(*args), or only its forward if no argument needs a gradient, which takes a
    third of the time in a small call."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        recorder = recorders.current()
        return function.apply(*args) if recorder is None else recorder.apply(function, *args)
    return function.forward(_NoBackward(), *args)


def _wants_graph() -> bool:
    """Whether a backward runs with create_graph=True. torch.compile has no second derivatives."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def by_reference(function, inputs, needed, *grad_outputs):
    """The gradients of function(*inputs), with a graph; None for inputs that need none.

    They are taken with respect to fresh views of the inputs. One input may have been computed from
    another, and gradients through that history are the engine's task.
    """
    inputs = [x.view_as(x) for x in inputs]
    wanted = [x for x, needs in zip(inputs, needed, strict=False) if needs]
    with torch.autocast(inputs[0].device.type, enabled=False):
        outputs = function(*inputs)
        found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True))
    return tuple(next(found) if needs else None for _, needs in zip(inputs, needed, strict=False))


# ---- attention


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, dropout_p, seed, backend):
        o, lse = raw.attention_fwd(q, k, v, softmax_scale, dropout_p, seed, backend)
        ctx.save_for_backward(q, k, v, o, lse, seed)
        ctx.softmax_scale, ctx.dropout_p, ctx.backend = softmax_scale, dropout_p, backend
        return o

    @staticmethod
    def backward(ctx, do):
        *saved, seed = ctx.saved_tensors
        options = ctx.softmax_scale, ctx.dropout_p, seed
        if _wants_graph():
            gradients = by_reference(
                lambda q, k, v: reference.attention_by_formula(q, k, v, *options),
                *(saved[:3], ctx.needs_input_grad, do),
            )
        else:
            gradients = raw.attention_bwd(do, *saved, *options, ctx.backend)
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
    def backward(ctx, do):
        qkv, o, lse, seed = ctx.saved_tensors
        options = ctx.softmax_scale, ctx.dropout_p, seed
        if _wants_graph():

            def attend(qkv):
                q, k, v = reference.split_heads(qkv, ctx.n_head)
                return reference.attention_by_formula(q, k, v, *options).flatten(2)

            (dqkv,) = by_reference(attend, (qkv,), ctx.needs_input_grad, do)
        else:
            dqkv = raw.attention_qkv_bwd(do, qkv, o, lse, ctx.n_head, *options, ctx.backend)
        return dqkv, None, None, None, None, None


# ---- layer_norm


def _norm_by_reference(ctx, dy, x, weight, bias, needed):
    """dx, dweight and dbias of the norm without the addition, with a graph."""
    return by_reference(
        lambda *inputs: reference.layer_norm(*inputs, ctx.eps).to(dy.dtype),
        *((x, weight, bias), needed, dy),
    )


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, backend):
        y, stats = raw.layer_norm_fwd(x, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.eps, ctx.backend = eps, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, stats = ctx.saved_tensors
        if _wants_graph():
            gradients = _norm_by_reference(ctx, dy, x, weight, bias, ctx.needs_input_grad)
            return *gradients, None, None
        dx, (dweight, dbias) = raw.layer_norm_bwd(dy, None, x, weight, stats, ctx.backend)
        return dx, dweight, dbias, None, None


class AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, backend):
        y, s, stats = raw.add_layer_norm_fwd(x, residual, weight, bias, eps, backend)
        ctx.save_for_backward(s, weight, bias, stats)
        ctx.eps, ctx.backend = eps, backend
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):
        s, weight, bias, stats = ctx.saved_tensors
        if _wants_graph():
            _, *needed = ctx.needs_input_grad[:4]
            needed[0] = s.requires_grad  # for x or for residual
            dnorm, dweight, dbias = _norm_by_reference(ctx, dy, s, weight, bias, needed)
            both = ds if dnorm is None else dnorm + ds
            return both.to(dy.dtype), both, dweight, dbias, None, None
        if dy.dtype != s.dtype:
            dx, dresidual, (dweight, dbias) = raw.mixed_layer_norm_bwd(
                dy, ds, s, weight, stats, ctx.backend
            )
            return dx, dresidual, dweight, dbias, None, None
        # s = x + residual: one tensor is the gradient of both.
        dx, (dweight, dbias) = raw.layer_norm_bwd(dy, ds, s, weight, stats, ctx.backend)
        return dx, dx, dweight, dbias, None, None


# ---- gelu


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.save_for_backward(x)
        ctx.backend = backend
        return raw.gelu_fwd(x, backend)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if _wants_graph():
            return *by_reference(reference.gelu, (x,), ctx.needs_input_grad, dy), None
        return raw.gelu_bwd(dy, x, ctx.backend), None


class BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, backend):
        ctx.save_for_backward(x, bias)
        ctx.backend = backend
        return raw.bias_gelu_fwd(x, bias, backend)

    @staticmethod
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        if _wants_graph():
            inputs = x, bias
            return *by_reference(reference.bias_gelu, inputs, ctx.needs_input_grad, dy), None
        return *raw.bias_gelu_bwd(dy, x, bias, ctx.backend), None


# ---- cross_entropy


def _reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str):
    """The reduced losses (N,); and for the mean the number of targets that are not ignored, ()."""
    if reduction == "none":
        return losses, None
    total = losses.sum()
    if reduction == "sum":
        return total, None
    count = (targets != ignore_index).count_nonzero()
    return total / count, count


class CrossEntropy(torch.autograd.Function):
    """The loss of logits (N, V): (), or (N,) for reduction "none"; float32, or float64 for float64
    logits."""

    @staticmethod
    def forward(
        ctx, logits, targets, ignore_index, smoothing, reduction, inplace_backward, backend
    ):
        losses, stats = raw.cross_entropy_fwd(logits, targets, ignore_index, smoothing, backend)
        loss, count = _reduced(losses, targets, ignore_index, reduction)
        ctx.save_for_backward(logits, targets, stats, count)
        ctx.options = ignore_index, smoothing
        ctx.reduction, ctx.inplace, ctx.backend = reduction, inplace_backward, backend
        return loss

    @staticmethod
    def backward(ctx, dloss):
        logits, targets, stats, count = ctx.saved_tensors
        if _wants_graph():
            loss = _loss_by_reference(reference.cross_entropy, targets, ctx)
            return *by_reference(loss, (logits,), ctx.needs_input_grad, dloss), *[None] * 6
        # If all targets are ignored, this is 1 / 0, but a kernel writes 0 to ignored rows.
        dlosses = dloss if count is None else dloss / count
        args = (dlosses, logits, targets, stats, *ctx.options, ctx.backend)
        if ctx.inplace and logits.stride(-1) == 1 and logits.stride(0) >= logits.shape[1]:
            raw.cross_entropy_bwd_(*args)
            recorders.refuse("it changes the version of a tensor")
            torch.autograd.graph.increment_version(logits)  # a second backward is refused
            return logits.detach(), *[None] * 6
        return raw.cross_entropy_bwd(*args), *[None] * 6


class LinearCrossEntropy(torch.autograd.Function):
    """The loss of logits x weight^T, like CrossEntropy's.

    For a mean or a sum, the forward also computes the gradients of x and weight, for a loss
    gradient of 1. need_dx and need_dweight say which are needed; under no_grad neither is. With
    reduction "none", each loss has its own gradient, so the backward computes the logits again.
    """

    @staticmethod
    def forward(
        ctx, x, weight, targets, ignore_index, smoothing, reduction, need_dx, need_dweight, backend
    ):
        now = reduction != "none"
        losses, dx, dweight = raw.linear_cross_entropy_fwd(
            *(x, weight, targets, ignore_index, smoothing),
            *(need_dx and now, need_dweight and now, backend),
        )
        loss, count = _reduced(losses, targets, ignore_index, reduction)
        ctx.save_for_backward(x, weight, targets, count, dx, dweight)
        ctx.options, ctx.reduction = (ignore_index, smoothing), reduction
        ctx.need_dx, ctx.need_dweight, ctx.backend = need_dx, need_dweight, backend
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, weight, targets, count, dx, dweight = ctx.saved_tensors
        if _wants_graph():
            loss = _loss_by_reference(reference.linear_cross_entropy, targets, ctx)
            return *by_reference(loss, (x, weight), ctx.needs_input_grad, dloss), *[None] * 7
        # If all targets are ignored, the gradients are 0, and 0 / 0 would make them NaN.
        scale = dloss if count is None else dloss / count.clamp(min=1)
        if ctx.reduction == "none":
            dx, dweight = raw.linear_cross_entropy_bwd(
                *(x, weight, scale, targets, *ctx.options, ctx.need_dx, ctx.need_dweight),
                ctx.backend,
            )
            scale = 1
        # New tensors, since the saved ones serve a second backward, too.
        dx = dx * scale if ctx.need_dx else None
        dweight = (dweight * scale).to(weight.dtype) if ctx.need_dweight else None
        return dx, dweight, *[None] * 7


def _loss_by_reference(function, targets, ctx):
    """function, a loss of the reference, with the targets and ctx's options filled in."""
    ignore_index, smoothing = ctx.options
    options = {"reduction": ctx.reduction, "label_smoothing": smoothing}

    def loss(first, *weight):
        V = weight[0].shape[0] if weight else first.shape[-1]
        inside, valid = guard(targets, V, ignore_index)
        return poison(function(first, *weight, inside, ignore_index, **options), valid)

    return loss
