"""The Triton backend: NVIDIA GPUs of compute capability 8.0 and newer.

Importing this package imports neither triton nor a kernel: that happens at the first call that
why_not has let through. With TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly, in
Triton's interpreter: how the tests check them on a machine without a GPU.
"""

import importlib
import os

import torch

from ..gpu import unsuitable, unsupported
from ..tracing import cached_untraced

HEAD_SIZES = (16, 32, 64, 80, 96, 128)
MAX_DECODE_HEAD_SIZE = 256
MAX_ROW = 8192  # widest layer_norm row held in registers


def why_not(op: str, device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """None where the kernels can serve `op`, else the reason (see dispatch.py)."""
    reason = _device_reason(device.type, device.index)
    reason = reason or unsupported(op, dtype)
    if reason is not None:
        return reason
    if op == "decode_attention" and size > MAX_DECODE_HEAD_SIZE:
        return f"head size {size} is larger than {MAX_DECODE_HEAD_SIZE}"
    if op == "attention" and size not in HEAD_SIZES:
        return f"head size {size} is not one of {', '.join(map(str, HEAD_SIZES))}"
    if op == "layer_norm" and size > MAX_ROW:
        return f"rows of {size} are longer than {MAX_ROW}"
    return None


@cached_untraced
def _device_reason(device_type: str, index: int | None) -> str | None:
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return import_error()
    return unsuitable(device_type, index) or import_error()


def import_error() -> str | None:
    """Why triton cannot be imported, or None where it can."""
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return f"triton cannot be imported: {error}"
    return None


def module(op: str):
    """The module that holds the launchers of `op`."""
    return importlib.import_module(f".{op}", __name__)
