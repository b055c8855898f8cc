"""The layers of a model as the kernels use them, and whether they may.

A kernel takes the parameters of a layer and passes its forward by. That is right for a layer as
this package makes it. One that was replaced or wrapped (an adapter, a parametrization), or that has
hooks, is called as the module that it is, so that nothing of it is lost.
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
        """scale stays float32 where the model is turned to another dtype."""
        super()._apply(fn, recurse)
        self.scale = self.scale.float()
        return self


def is_stock(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether layer is exactly one of these, and its forward does nothing but what their class
    says: no hooks, no forward of its own."""
    return type(layer) in kinds and not is_hooked(layer)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of module does more, or other, than its class says."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # as accelerate replaces it
        or module._compiled_call_impl is not None
    ):
        return True
    return not torch.compiler.is_compiling() and _has_any_global_hook()


def project(layer: nn.Module, h: Tensor, ops) -> Tensor:
    """layer(h), by the kernels where they may."""
    if is_stock(layer, nn.Linear):
        return ops.linear(h, layer.weight, layer.bias)
    if is_stock(layer, Int8Linear):
        return ops.linear_int8(h, layer.weight, layer.scale, layer.bias)
    return layer(h)


def project_gelu(layer: nn.Module, h: Tensor, ops) -> Tensor:
    """gelu(layer(h)), the bias added by the kernel of the GELU where it may be."""
    if is_stock(layer, nn.Linear) and layer.bias is not None:
        return ops.bias_gelu(ops.linear(h, layer.weight), layer.bias)
    if is_stock(layer, Int8Linear) and layer.bias is not None:
        return ops.bias_gelu(ops.linear_int8(h, layer.weight, layer.scale), layer.bias)
    return ops.gelu(project(layer, h, ops))


def add_norm(norm: nn.Module, x: Tensor, s: Tensor | None, ops) -> tuple[Tensor, Tensor]:
    """(norm(s + x), s + x); before the first block there is no s."""
    if not is_stock(norm, nn.LayerNorm):
        s = x if s is None else s + x
        return norm(s), s
    if s is None:
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps), x
    return ops.add_layer_norm(x, s, norm.weight, norm.bias, norm.eps)


def own(x: Tensor) -> Tensor:
    """x, not as a view of another tensor, without a copy. The output of nn.Linear is a view, and
    FSDP2 warns of modules that return one: its hooks would be lost if it were changed in place."""
    if torch.compiler.is_compiling() or x._base is None:
        return x
    return torch.ops.aten._unsafe_view(x, x.shape)
