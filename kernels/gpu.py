"""The supported GPUs: NVIDIA's, of compute capability 8.0 and newer."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsuitable(device_type: str, index: int | None) -> str | None:
    """The reason why GPU kernels do not run on this device; None if they do."""
    if device_type != "cuda":
        return f"needs a CUDA tensor, got one on {device_type}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, this build of PyTorch is for ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None


def unsupported(op: str, dtype: torch.dtype) -> str | None:
    """The reason why GPU kernels do not support this op in this dtype; None if they do."""
    if op == "linear":
        return "PyTorch's own matrix product is used"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of float32, bfloat16, float16"
    return None
