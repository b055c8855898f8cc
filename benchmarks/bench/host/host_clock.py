"""The clock of host.py."""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable

import torch


class HostClock:
    """Median, 20th and 80th percentile in milliseconds of several functions, in alternating rounds.

    On a CPU it measures the CPU time of this thread, without other processes. On a GPU it measures
    the time to issue the work: a round starts with an empty queue and is too short to fill it.
    """

    def __init__(self, device: torch.device, quick: bool):
        self.device = device
        on_gpu = device.type == "cuda"
        self.now = time.perf_counter_ns if on_gpu else time.thread_time_ns
        self.rounds, self.round_ns = (5, 1e5) if quick else (101, 1e6)
        # Runs in a round. On a GPU an op launches up to 20 kernels. On a CPU a step needs the time
        # that it needs in a training only if it is repeated, without another model in between.
        self.least_runs, self.most_runs = (1, 10) if on_gpu else (1 if quick else 8, 1000)

    def __call__(self, runs: dict) -> dict[object, dict]:
        """runs: key -> (function, context entered around its runs, outside the clock).
        Returns key -> median_ms, p20_ms, p80_ms."""
        return {
            key: {
                "median_ms": statistics.median(times),
                "p20_ms": statistics.quantiles(times, n=5)[0],
                "p80_ms": statistics.quantiles(times, n=5)[3],
            }
            for key, times in self._samples(runs).items()
        }

    def least(self, runs: dict) -> dict[object, float]:
        """key -> the fastest round in ms: differences of minima are steadier than of medians."""
        return {key: min(times) for key, times in self._samples(runs).items()}

    def _samples(self, runs: dict) -> dict[object, list[float]]:
        counts, samples = {}, {key: [] for key in runs}
        gc.collect()
        gc.disable()  # as timeit does: a collection would hit one of many rounds
        try:
            for key, (run, context) in runs.items():
                self._round(run, context, 5)  # compiles, allocates, and records the call
                once = self._round(run, context, 1)
                wanted = math.ceil(self.round_ns / max(once, 1))
                counts[key] = min(self.most_runs, max(self.least_runs, wanted))
            for i in range(self.rounds):
                for key in list(runs)[:: -1 if i % 2 else 1]:
                    samples[key].append(1e-6 * self._round(*runs[key], counts[key]))
        finally:
            gc.enable()
        return samples

    def _round(self, run: Callable, context: Callable, n: int) -> float:
        """The mean time of n runs, in nanoseconds."""
        with context():
            self._wait()
            start = self.now()
            for _ in range(n):
                run()
            stop = self.now()
            self._wait()
        return (stop - start) / n

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def within(*contexts: Callable):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield
