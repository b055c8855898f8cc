"""x weight^T + bias, for training and for decoding.

Many rows use PyTorch's matrix product (matmul.py). A few rows without a gradient, on a CPU, use a
kernel (csrc/cpu/linear.h): each weight is used only once then, so the time is that of reading the
weights. int8 weights shorten it, with one byte per weight instead of two or four:

    weight[n, k] = scale[n] * number[n, k]      scale[n] = max_k |weight[n, k]| / 127

    N rows of the weight   K features   M rows of x
"""

import math

import torch
from torch import Tensor

from . import dispatch, reference
from .matmul import matmul
from .raw_ops import raw

FEW = 8  # most rows for the kernel; with more, a matrix product is faster (docs/log.md)
FEW_INT8 = 64  # the same for int8; with more, dequantizing the weight first is faster
BLOCK = 64  # int8 numbers of a row that are packed together


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,): (..., N), in the autocast dtype under autocast.

    Shapes and errors are torch.nn.functional.linear's. On a CPU, up to 8 rows of x without a
    gradient use a kernel, in which the bits of a row do not depend on the other rows.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "bias"):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if weight.dtype == x.dtype and (backend := gemv_backend(x, weight, bias)):
        return _gemv(x, weight, bias, None, backend)
    return matmul(x, weight, bias)


def linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear with the weight of quantize_int8: packed (N, K rounded up to 64) int8, scale (N,).

    x (..., K) has any floating dtype. On a CPU, up to 64 rows without a gradient use a kernel that
    reads the int8 numbers directly; if x has 16 bits, it rounds each block of 64 elements of x to
    steps of 2^-13 of the block's largest magnitude (docs/decoding.md). Otherwise the weight is
    dequantized to x's dtype first. Gradients reach x and bias, not the weight. Raises TypeError or
    ValueError, naming the argument.
    """
    _check_int8(x, packed, scale, bias)
    if backend := gemv_backend(x, packed, bias, FEW_INT8):
        return _gemv(x, packed, bias, scale, backend)
    return matmul(x, reference.dequantize_int8(packed, scale, x.shape[-1], x.dtype), bias)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes weight (N, K) to (packed, scale): int8 numbers (N, K rounded up to 64), and scale
    (N,) float32.

    Each weight is rounded to the nearest multiple of its row's scale; the largest of a row becomes
    +-127. packed holds each 64 numbers of a row as 32 words: byte j of word i is number 32 j + i.
    Raises TypeError if weight is not a floating tensor, and ValueError if it is not a finite
    matrix.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating tensor, got {got}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (N, K), got {tuple(weight.shape)}")
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, got NaN or infinity")
    N, K = weight.shape
    largest = weight.abs().amax(dim=1) if K else weight.new_zeros(N)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    numbers = weight.new_zeros(N, _padded(K), dtype=torch.int8)
    numbers[:, :K] = (weight / scale[:, None]).round().clamp(-127, 127)
    packed = numbers.view(N, -1, 2, 32).transpose(-1, -2).reshape(numbers.shape)
    return packed, scale


def gemv_backend(x: Tensor, weight: Tensor, bias: Tensor | None, most: int = FEW) -> str | None:
    """The backend with a kernel for x, or None. Kernels take up to `most` rows, on a CPU, without
    autocast and without a gradient."""
    if torch.compiler.is_compiling():  # checked first: the number of rows may be dynamic there
        return None
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if not x.dim() or not 0 < math.prod(x.shape[:-1]) <= most:
        return None
    if weight.dim() != 2 or weight.device != x.device or not weight.numel():
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        return None
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return None
    return dispatch.kernel_for("linear", x.device, x.dtype)


def _gemv(x, weight, bias, scale, backend) -> Tensor:
    if scale is None and x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must have x's features, got x {tuple(x.shape)} and weight "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}")
    rows = x.reshape(-1, x.shape[-1]).split(FEW)
    y = [raw.linear(some, weight, bias, scale, backend) for some in rows]
    y = torch.cat(y) if len(y) > 1 else y[0]
    return y.view(*x.shape[:-1], len(weight))


def _check_int8(x, packed, scale, bias) -> None:
    for name, t in (("x", x), ("packed", packed), ("scale", scale)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {t.device}")
    if not x.is_floating_point() or not x.dim():
        raise TypeError(f"x must be a floating tensor (..., K), got {x.dtype} {tuple(x.shape)}")
    expected = (len(scale) if scale.dim() else 0, _padded(x.shape[-1]))
    if packed.dtype != torch.int8 or packed.shape != expected:
        raise ValueError(
            f"packed must be int8 of shape {expected}, got {packed.dtype} {tuple(packed.shape)}"
        )
    if scale.dtype != torch.float32 or scale.dim() != 1:
        raise ValueError(f"scale must be float32 (N,), got {scale.dtype} {tuple(scale.shape)}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
    if bias is not None and bias.shape != scale.shape:
        raise ValueError(f"bias must have shape {tuple(scale.shape)}, got {tuple(bias.shape)}")


def _padded(K: int) -> int:
    return -(-K // BLOCK) * BLOCK
