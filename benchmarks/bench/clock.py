"""Measures time, memory, and the limits of the machine."""

import contextlib
import ctypes
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2 import kernels

FLOP, BYTE, READ = "operations", "bytes", "bytes read"


@dataclass(frozen=True)
class Work:
    """The least work of a pass: operations, bytes read and written, or bytes read."""

    amount: float
    of: str  # FLOP, BYTE or READ

    def unit(self, device: torch.device) -> str:
        if self.of != FLOP:
            return "GB/s" if self.of == BYTE else "GB/s read"
        return "TFLOP/s" if device.type == "cuda" else "GFLOP/s"

    def rate(self, ms: float, device: torch.device) -> float:
        return self.amount / (ms * 1e-3) / (1e12 if self.unit(device) == "TFLOP/s" else 1e9)


class Clock:
    """Median, 20th and 80th percentile in milliseconds of several functions, measured together."""

    def __init__(self, device: torch.device, quick: bool):
        self.device, self.quick = device, quick
        self.rounds, self.sample_s = (7, 0.002) if quick else (11, 0.02)
        self.slow_s, self.slow_rounds = 30, 3  # above slow_s seconds, slow_rounds are enough
        # On a GPU: repeat for rep_ms, or least_runs times, but for at most most_ms
        self.rep_ms, self.least_runs, self.most_ms = (20, 3, 500) if quick else (200, 10, 3000)

    def __call__(self, runs: dict) -> dict[object, dict]:
        """runs: key -> (function, context entered around its runs, outside the clock).
        Returns key -> median_ms, p20_ms, p80_ms."""
        times = self._gpu(runs) if self.device.type == "cuda" else self._cpu(runs)
        names = ("median_ms", "p20_ms", "p80_ms")
        return {key: dict(zip(names, t, strict=True)) for key, t in times.items()}

    def _gpu(self, runs):
        from triton.testing import do_bench

        times = {}
        for name, (run, context) in runs.items():
            with context():
                run()  # compiles, plans and allocates
                torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                torch.cuda.synchronize()
                once_ms = (time.perf_counter() - start) * 1e3
                rep = max(self.rep_ms, min(self.least_runs * once_ms, self.most_ms))
                times[name] = tuple(do_bench(run, rep=int(rep), quantiles=[0.5, 0.2, 0.8]))
        return times

    def _cpu(self, runs):
        """Alternating rounds, forwards and backwards: a busy moment slows all functions alike."""
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
    """Measures this machine's highest rates, by unit: of a copy, of a matrix product, and of
    reading. Reading is the faster of a sum and of our product of a matrix and one vector."""
    device = clock.device
    elements = 2**28 if device.type == "cuda" else 2**23 if quick else 2**25
    n = 8192 if device.type == "cuda" else 256 if quick else 1536
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    matrix, vector = source.view(-1, 1024), torch.randn(1, 1024, device=device)
    none = contextlib.nullcontext
    read = Work(source.nbytes, READ)
    done = {
        "copy": (lambda: target.copy_(source), Work(2 * source.nbytes, BYTE)),
        "sum": (source.sum, read),
        "vector": (lambda: kernels.linear(vector, matrix), read),
        "product": (lambda: a @ b, Work(2 * n**3, FLOP)),
    }
    times = clock({name: (run, none) for name, (run, _) in done.items()})
    found = {}
    for name, (_, work) in done.items():
        unit, rate = work.unit(device), work.rate(times[name]["median_ms"], device)
        found[unit] = max(rate, found.get(unit, 0.0))
    return found


def peak_memory(run: Callable, device: torch.device) -> int | None:
    """The peak memory of `run` in bytes, beyond what was allocated before. On a CPU this is
    resident memory, exact to some hundred kilobytes; None if the system does not report it."""
    if device.type != "cuda":
        return _peak_resident(run)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_resident(run: Callable) -> int | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that memory freed by earlier runs counts again
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (man 5 proc)
        before = _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].removesuffix("kB")) * 1024
