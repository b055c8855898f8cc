"""The CUDA backend: the kernels of csrc/cuda, for NVIDIA GPUs of compute capability 8.0 and newer.

The library is built at the first call that asks for it (native.py), which takes nvcc most of a
minute: dispatch.py asks triton first. Importing this module loads nothing.
"""

import functools

import torch

from . import native
from .gpu import unsuitable

MAX_HEAD_SIZE = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """None where the kernels can serve `op`, else the reason (see dispatch.py)."""
    reason = _device_reason(device.type, device.index)
    if reason is not None:
        return reason
    if op == "linear":
        return "PyTorch's own product serves"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of float32, bfloat16, float16"
    if op in ("attention", "decode_attention") and (size % 8 or size > MAX_HEAD_SIZE):
        return f"head size {size} is not a multiple of 8 up to {MAX_HEAD_SIZE}"
    return None


def module(op: str):
    """The operators of the library: each has the signature of the launcher of its name."""
    return torch.ops.gpt2_kernels_cuda


def _device_reason(device_type: str, index: int | None) -> str | None:
    return _cached_device_reason(device_type, index)


_device_reason._dynamo_marked_constant = True  # see dispatch._say_once


@functools.cache
def _cached_device_reason(device_type: str, index: int | None) -> str | None:
    """None once the library is loaded and this device runs it. For a device that does not, nothing
    is built, but what a build would lack is told, too.

    Tests replace it, after loading a library that takes CPU tensors: tests/cuda_backend.py.
    """
    reason = unsuitable(device_type, index)
    if reason is None:
        return native.load("cuda")
    return "; ".join(filter(None, [reason, native.missing("cuda")]))
