"""Time, memory, and the machine they are measured on."""

import contextlib
import importlib.util
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

FLOP, BYTE = "operations", "bytes"


@dataclass(frozen=True)
class Work:
    """What a pass must do at the least: operations, or bytes read and written."""

    amount: float
    of: str  # FLOP or BYTE

    def unit(self, device: torch.device) -> str:
        if self.of == BYTE:
            return "GB/s"
        return "TFLOP/s" if device.type == "cuda" else "GFLOP/s"

    def rate(self, ms: float, device: torch.device) -> float:
        return self.amount / (ms * 1e-3) / (1e12 if self.unit(device) == "TFLOP/s" else 1e9)


class Clock:
    """Median, 20th and 80th percentile in milliseconds of several functions, measured together."""

    def __init__(self, device: torch.device, quick: bool):
        self.device = device
        self.rounds, self.sample_s = (7, 0.002) if quick else (11, 0.02)
        self.slow_s, self.slow_rounds = 30, 3  # where one takes so long, so many rounds must do
        self.rep_ms = 20 if quick else 200

    def __call__(self, runs: dict) -> dict:
        """runs: key -> (function, context entered around its runs, outside the clock)"""
        return self._gpu(runs) if self.device.type == "cuda" else self._cpu(runs)

    def _gpu(self, runs):
        from triton.testing import do_bench

        times = {}
        for name, (run, context) in runs.items():
            with context():
                times[name] = tuple(do_bench(run, rep=self.rep_ms, quantiles=[0.5, 0.2, 0.8]))
        return times

    def _cpu(self, runs):
        """Rounds in which each takes its turn, to and fro: a busy moment hits all alike."""
        repeats, slowest = {}, 0
        for name, (run, context) in runs.items():
            with context():
                run()
                start = time.perf_counter()
                run()
                once = time.perf_counter() - start
                repeats[name] = max(1, math.ceil(self.sample_s / once))
                slowest = max(slowest, once)
        samples = {name: [] for name in runs}
        for i in range(self.rounds if slowest < self.slow_s else self.slow_rounds):
            for name in list(runs)[:: -1 if i % 2 else 1]:
                run, context = runs[name]
                with context():
                    start = time.perf_counter()
                    for _ in range(repeats[name]):
                        run()
                    samples[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
        return {
            name: (statistics.median(t), *(statistics.quantiles(t, n=5)[i] for i in (0, 3)))
            for name, t in samples.items()
        }


def limits(clock: Clock, dtype: torch.dtype, quick: bool) -> dict[str, float]:
    """What this machine does at best, measured now: a copy and a matrix product."""
    device = clock.device
    elements = 2**28 if device.type == "cuda" else 2**23 if quick else 2**25
    n = 8192 if device.type == "cuda" else 256 if quick else 1536
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    none = contextlib.nullcontext
    times = clock({"copy": (lambda: target.copy_(source), none), "gemm": (lambda: a @ b, none)})
    copied, multiplied = Work(2 * source.nbytes, BYTE), Work(2 * n**3, FLOP)
    return {
        copied.unit(device): copied.rate(times["copy"][0], device),
        multiplied.unit(device): multiplied.rate(times["gemm"][0], device),
    }


def peak_memory(run: Callable, device: torch.device) -> int | None:
    """What `run` allocates at most, in bytes; None on a CPU, where PyTorch keeps no count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def environment(device: torch.device) -> dict:
    """What a number means nothing without."""
    on_gpu = device.type == "cuda"
    spec = importlib.util.find_spec("triton")
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if spec else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "commit": _git("describe", "--always", "--abbrev=12"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),  # beyond that commit
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", Path(__file__).parent, *command],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
