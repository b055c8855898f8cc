"""The CUDA backend: the kernels of csrc/cuda, for NVIDIA GPUs of compute capability 8.0 and newer.

The library is built at the first call that needs it (libraries.py). That takes nvcc most of a
minute, so dispatch.py prefers triton. Importing this module loads nothing.
"""

import torch

from ..gpu import unsuitable, unsupported
from ..tracing import cached_untraced
from . import libraries

MAX_HEAD_SIZE = 128


def why_not(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """The reason why the kernels do not support this call, or None (see dispatch.py)."""
    reason = _device_reason(device.type, device.index)
    reason = reason or unsupported(op, dtype)
    if reason is not None:
        return reason
    if op in ("attention", "decode_attention") and (size % 8 or size > MAX_HEAD_SIZE):
        return f"head size {size} is not a multiple of 8 up to {MAX_HEAD_SIZE}"
    return None


def module(op: str):
    """The operators of the library. Each has the signature of the raw op of the same name."""
    return torch.ops.gpt2_kernels_cuda


@cached_untraced
def _device_reason(device_type: str, index: int | None) -> str | None:
    """Loads the library if this device can run it; returns the reason if that is not possible, else
    None. For an unsuitable device it builds nothing, but also reports missing build tools.

    Tests replace it, after loading a library for CPU tensors: tests/tools/cuda_backend.py.
    """
    reason = unsuitable(device_type, index)
    if reason is None:
        return libraries.load("cuda")
    return "; ".join(filter(None, [reason, libraries.missing("cuda")]))
