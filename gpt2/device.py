"""Chooses devices and dtypes, and finds the peak rates of a device.

MFU, model FLOPs utilisation, is the share of the peak rate that the model's own arithmetic uses
(Chowdhery et al., PaLM, appendix B).
"""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import bars, kernels
from .errors import InputError, quoted

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

PEAK_SECONDS = 1.0  # to measure; with only six products, two runs differed by a third
_CPUINFO = Path("/proc/cpuinfo")


def pick_device(name: str) -> torch.device:
    """The device called name; auto is CUDA if there is one. Raises InputError for other names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except Exception as e:  # unavailable devices raise many kinds of errors
        raise InputError(f"device must be auto or one that works here, got {quoted(name)}") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: auto, float32 or bfloat16; auto is bfloat16 on a GPU whose
    tensor cores support it. Raises InputError for other names."""
    if name not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype must be auto, float32 or bfloat16, got {quoted(name)}")
    if name == "auto":
        ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


LEAST_PEAK = 1.0  # FLOP/s: with 5e-324 the MFU was infinite


class Peak(NamedTuple):
    """FLOP/s of matrix products."""

    flops: float | None  # None: unknown
    source: str  # where the figure comes from
    machine: str  # see describe


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Everything that the peak depends on, as text: the device, the dtype, and for a CPU the number
    of threads."""
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {kind}"
    return f"{_cpu_name()}, {kind}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of device in dtype.

    For a known GPU in bfloat16 it is taken from the data sheet; otherwise it is measured, in about
    a second.
    """
    machine = describe(device, dtype)
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for model, tflops in _BF16_TFLOPS.items():
            if re.search(rf"\b{model}\b", name):
                source = f"{tflops:,.0f} TFLOP/s, {model}'s dense bfloat16 peak"
                return Peak(tflops * 1e12, source, machine)
    # On a shared CPU a small product is more likely to run undisturbed. In five processes the best
    # within a second was 66 to 123 GFLOP/s for 1024 x 1024, and 285 to 300 for 512 x 512.
    n = 4096 if device.type == "cuda" else 512
    rate = _measured_flops(n, device, dtype)
    if rate is None:
        return Peak(None, "an unknown peak, because the clock stands still", machine)
    kind = str(dtype).removeprefix("torch.")
    source = f"{rate / 1e12:.3g} TFLOP/s, measured on {kind} products of {n} x {n} matrices"
    return Peak(rate, source, machine)


def _measured_flops(n: int, device: torch.device, dtype: torch.dtype) -> float | None:
    a = torch.ones(n, n, device=device, dtype=dtype)
    # item() synchronizes
    return bars.per_second(2 * n**3, _best(lambda: (a @ a)[0, 0].item(), PEAK_SECONDS))


def _best(compute: Callable[[], object], seconds: float = 0.0) -> float:
    """The time of the fastest of at least 6 calls, in seconds; calls go on until `seconds` have
    passed. The first calls warm up, and other programs disturb some others. 0 if the clock stands
    still."""
    best, count, began = float("inf"), 0, time.perf_counter()
    while count < 6 or (best > 0 and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        compute()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def read_bandwidth(device: torch.device) -> float | None:
    """The memory bandwidth of device in bytes per second, measured now: the better of a sum and a
    matrix-vector product over more data than its caches hold. None if the clock stands still."""
    numbers = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    matrix, vector = numbers.view(-1, 1024), torch.ones(1, 1024, device=device)
    seconds = _best(lambda: numbers.sum().item())
    with torch.no_grad():
        multiplied = _best(lambda: kernels.linear(vector, matrix)[0, 0].item())
    return bars.per_second(numbers.nbytes, min(seconds, multiplied))
