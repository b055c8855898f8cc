"""x weight^T + bias by PyTorch's own matrix product, in a dtype that is fast on this machine.

On a CPU without 16-bit matrix instructions, PyTorch's 16-bit product is slow: on two EPYC cores
with AVX2, bfloat16 runs at 0.9 GFLOP/s and float32 at 55 (docs/log.md). There the operands are
rounded to 16 bits as usual, multiplied in float32, and the result is rounded. It is at least as
accurate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import cached_untraced

# Multiplications from which oneDNN is preferred: its call takes 15 µs longer than MKL's.
LARGE = 2**23


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (V, C), bias (V,): (..., V), in the autocast dtype under autocast.

    Shapes and errors are torch.nn.functional.linear's.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if is_autocasting(device) else x.dtype
    if has_fast_matmul(dtype, device):
        return F.linear(x, weight, bias)
    with torch.autocast(device, enabled=False):
        operands = (None if t is None else t.to(dtype).float() for t in (x, weight, bias))
        return F.linear(*operands).to(dtype)


def is_autocasting(device: str) -> bool:
    """Whether autocast is on for this kind of device; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def matmul_transposed(x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """x weight^T for x (N, C) and weight (V, C), written to out (N, V). If out is None, oneDNN
    computes and allocates the result (see prefers_onednn).

    PyTorch's default on a CPU, MKL, is slow for few rows and many columns: 128 rows of logits run
    at 65 GFLOP/s on two EPYC cores, with oneDNN at 106 (docs/log.md).
    """
    if out is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.mm(x, weight.t(), out=out)


def prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is faster for matmul_transposed. Operands must be contiguous: for others,
    oneDNN uses its reference code, which is a thousand times slower."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() * weight.shape[0] >= LARGE
        and x.is_contiguous()
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def has_fast_matmul(dtype: torch.dtype, device: str) -> bool:
    """Whether PyTorch has fast matrix products of this dtype on this machine."""
    return (
        device != "cpu"
        or dtype not in (torch.bfloat16, torch.float16)
        or _cpu_has_fast_matmul(dtype)
    )


@cached_untraced
def _cpu_has_fast_matmul(dtype: torch.dtype) -> bool:
    try:
        if dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except AttributeError:  # a build without oneDNN: unknown, so use PyTorch's product as it is
        return True
