"""What there is to compute on, and how fast it could be at most.

MFU, model FLOPs utilisation, is the part of that rate which goes into the model's own arithmetic
(Chowdhery et al., PaLM, appendix B).
"""

import re
import time
from collections.abc import Callable

import torch

from . import kernels
from .errors import InputError

# Dense bfloat16 TFLOP/s with float32 accumulation, from NVIDIA's data sheets.
_BF16_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 311.8,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "RTX A6000": 154.8,
}


def pick_device(name: str) -> torch.device:
    """The device called name; auto is CUDA where there is one. Raises InputError for no device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # a build without CUDA asserts
        raise InputError(f"device must be auto or one that works here, got {name!r}") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; auto is bfloat16 where tensor cores multiply it. Raises
    InputError for any but auto, float32 and bfloat16."""
    if name not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype must be auto, float32 or bfloat16, got {name!r}")
    if name == "auto":
        ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of matrix products on device in dtype, and where the figure comes from.

    Known GPUs in bfloat16: the data sheet. Everything else: measured here, in a moment.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for model, tflops in _BF16_TFLOPS.items():
            if re.search(rf"\b{model}\b", name):
                return tflops * 1e12, f"{tflops:,.0f} TFLOP/s, {model}'s dense bfloat16 peak"
    n = 4096 if device.type == "cuda" else 1024
    rate = _measured_flops(n, device, dtype)
    kind = str(dtype).removeprefix("torch.")
    return rate, f"{rate / 1e12:.3g} TFLOP/s, measured on {kind} products of {n} x {n} matrices"


def _measured_flops(n: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best(lambda: (a @ a)[0, 0].item())  # waits for the device


def _best(compute: Callable[[], object]) -> float:
    """The seconds that it takes at best."""
    best = float("inf")
    for _ in range(6):  # the first ones warm up
        start = time.perf_counter()
        compute()
        best = min(best, time.perf_counter() - start)
    return best


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that device reads from its memory, measured here, in a moment: the best of a
    sum and a matrix times a vector, of more numbers than its caches hold."""
    numbers = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    matrix, vector = numbers.view(-1, 1024), torch.ones(1, 1024, device=device)
    seconds = _best(lambda: numbers.sum().item())
    with torch.no_grad():
        multiplied = _best(lambda: kernels.linear(vector, matrix)[0, 0].item())
    return numbers.nbytes / min(seconds, multiplied)
