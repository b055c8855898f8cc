"""x weight^T + bias: PyTorch's own product, in the dtype that this machine multiplies fast.

A CPU without 16-bit matrix instructions has no fast 16-bit product in PyTorch: on two EPYC cores
with AVX2, bfloat16 runs at 0.9 GFLOP/s and float32 at 55 (docs/log.md). There the operands are
rounded to 16 bits as they would be anyway, multiplied in float32, and the result is rounded: the
same numbers, or better ones.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (V, C), bias (V,): (..., V), in the autocast dtype under autocast.

    Shapes and errors are torch.nn.functional.linear's.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if is_autocasting(device) else x.dtype
    if multiplies(dtype, device):
        return F.linear(x, weight, bias)
    with torch.autocast(device, enabled=False):
        operands = (None if t is None else t.to(dtype).float() for t in (x, weight, bias))
        return F.linear(*operands).to(dtype)


def is_autocasting(device: str) -> bool:
    """Whether autocast is on for this kind of device; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def times_transposed(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x weight^T, x (N, C) and weight (V, C): written to out (N, V), or, where oneDNN multiplies,
    in memory of its own. For few rows and many columns PyTorch's choice on a CPU, MKL, is slow: 128
    rows of logits at 65 GFLOP/s on two EPYC cores, oneDNN's at 106 (docs/log.md)."""
    if onednn_multiplies(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.mm(x, weight.t(), out=out)


def onednn_multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether times_transposed() leaves `out` alone. Strided operands are not for oneDNN: they go
    through its reference code, a thousand times slower."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous()
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether PyTorch's products of this dtype are made for this machine."""
    return device != "cpu" or dtype not in (torch.bfloat16, torch.float16) or _on_cpu(dtype)


def _on_cpu(dtype: torch.dtype) -> bool:
    return _cached_on_cpu(dtype)


_on_cpu._dynamo_marked_constant = True  # see dispatch._say_once


@functools.cache
def _cached_on_cpu(dtype: torch.dtype) -> bool:
    try:
        if dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except AttributeError:  # a build without oneDNN: nothing is known, nothing is changed
        return True
