"""Computes a model's layers by kernels, if that is allowed.

A kernel reads the parameters of a layer and bypasses its forward. That is right only for an
unchanged layer. A layer that was replaced or wrapped (an adapter, a parametrization), or that has
hooks, is called as a module.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from . import kernels


class Int8Linear(nn.Module):
    """nn.Linear with weight (N, K rounded up to 64) packed int8 and scale (N,) float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        packed, scale = kernels.quantize_int8(linear.weight)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear_int8(x, self.weight, self.scale, self.bias)

    def _apply(self, fn, recurse=True):
        """Keeps scale float32 when the model is converted to another dtype."""
        super()._apply(fn, recurse)
        self.scale = self.scale.float()
        return self


def is_stock(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether layer has exactly one of these types, no hooks, and the forward of its class."""
    return type(layer) in kinds and not is_hooked(layer)


def stock_parameters(*layers: tuple[nn.Module, type[nn.Module]]) -> list[nn.Parameter] | None:
    """The weight and the bias of each (layer, its type); None unless all layers are stock and all
    of these are plain parameters."""
    found = []
    for layer, kind in layers:
        if not is_stock(layer, kind):
            return None
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if not type(weight) is type(bias) is nn.Parameter:  # None, or a DTensor
            return None
        found += weight, bias
    return found


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of module runs hooks, or another forward than that of its class."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # replaced, for example by accelerate
        or module._compiled_call_impl is not None
    ):
        return True
    return not torch.compiler.is_compiling() and _has_any_global_hook()


def project(layer: nn.Module, h: Tensor, ops) -> Tensor:
    """layer(h), computed by ops if layer is stock."""
    if is_stock(layer, nn.Linear):
        return ops.linear(h, layer.weight, layer.bias)
    if is_stock(layer, Int8Linear):
        return ops.linear_int8(h, layer.weight, layer.scale, layer.bias)
    return layer(h)


def project_gelu(layer: nn.Module, h: Tensor, ops) -> Tensor:
    """gelu(layer(h)); the GELU kernel adds the bias if layer is stock."""
    if is_stock(layer, nn.Linear) and layer.bias is not None:
        return ops.bias_gelu(ops.linear(h, layer.weight), layer.bias)
    if is_stock(layer, Int8Linear) and layer.bias is not None:
        return ops.bias_gelu(ops.linear_int8(h, layer.weight, layer.scale), layer.bias)
    return ops.gelu(project(layer, h, ops))


def add_norm(norm: nn.Module, x: Tensor, s: Tensor | None, ops) -> tuple[Tensor, Tensor]:
    """(norm(s + x), s + x); s is None before the first block."""
    if not is_stock(norm, nn.LayerNorm):
        s = x if s is None else s + x
        return norm(s), s
    if s is None:
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps), x
    return ops.add_layer_norm(x, s, norm.weight, norm.bias, norm.eps)


def first_rows(table: nn.Module, T: int, device: torch.device) -> Tensor:
    """table(0, ..., T - 1), (T, C). If table is stock, a view of its weight: the gradient of an
    embedding would sort the ids first."""
    if is_stock(table, nn.Embedding) and type(table.weight) is nn.Parameter:
        options = table.max_norm, table.padding_idx, table.scale_grad_by_freq, table.sparse
        if options == (None, None, False, False) and len(table.weight) >= T:
            return table.weight if len(table.weight) == T else table.weight[:T]
    return table(torch.arange(T, device=device))


def own(x: Tensor) -> Tensor:
    """x without a copy, but not as a view of another tensor.

    The output of nn.Linear is a view. FSDP2 warns about modules that return a view, because its
    hooks would be lost if the view were changed in place.
    """
    if torch.compiler.is_compiling() or x._base is None:
        return x
    return torch.ops.aten._unsafe_view(x, x.shape)
