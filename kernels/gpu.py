"""The GPUs that the kernels are for: NVIDIA's, of compute capability 8.0 and newer."""

import torch


def unsuitable(device_type: str, index: int | None) -> str | None:
    """Why no kernel runs on this device, or None where they do."""
    if device_type != "cuda":
        return f"needs a CUDA tensor, this one is on {device_type}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, this build of PyTorch is for ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None
