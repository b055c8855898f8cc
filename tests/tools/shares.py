"""Chooses the cases of the grids to run, the number of processes, and the order of tests."""

import collections
import itertools
import os
import random

import torch

ON_GPU = torch.cuda.is_available()
EMULATED = os.environ.get("GPT2_TEST_TRITON") == "emulator"  # Triton's kernels: see conftest.py

MOST_WORKERS = 8  # each has its own PyTorch and Triton: some gigabytes
MOST_WORKERS_ON_GPU = 10
GPU_MEMORY_OF_A_WORKER = 6 << 30
BACKEND_FIXTURES = ("kernel_backend", "cpu_backend", "accelerated", "backend")
# Without --full one in N cases of a grid runs, for each instruction set of cpu.
SAMPLE = {"triton": 24, "cuda": 160, "cpu": 60}
GPU_SAMPLE = {"triton": 32, "cuda": 16}  # nearly every case compiles more Triton kernels
# With --full, emulated kernels run a few chosen cases of a grid. For Triton the others run in the
# interpreter.
FEW = "few"
EMULATED_BACKEND = None if ON_GPU else "triton" if EMULATED else "cuda"
FULL_SAMPLE_AVX512 = 1 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 3


def workers(cores, gpu_memory=None):
    """The number of test processes: one per core, limited by the memory of the GPU."""
    if gpu_memory is None:
        return min(cores, MOST_WORKERS)
    return max(1, min(cores, MOST_WORKERS_ON_GPU, gpu_memory // GPU_MEMORY_OF_A_WORKER))


def long_ones_first(items, processes):
    """The tests in the order in which xdist distributes them, one piece per process. Every piece
    starts with its share of the long tests."""
    long = [item for item in items if "long" in item.keywords]
    others = iter([item for item in items if "long" not in item.keywords])
    ordered = []
    for i in range(processes):
        piece = long[i::processes]
        size = max(0, len(items) - len(ordered)) // (processes - i)
        ordered += [*piece, *itertools.islice(others, max(0, size - len(piece)))]
    return [*ordered, *others]


def sample(config, items):
    """Keeps a share of each grid."""
    full, kept = config.option.full, set()
    grids = collections.defaultdict(list)  # a grid is a test function, a dtype and a backend
    for item in items:
        if "grid" in item.keywords and is_of_the_dtype(item):
            backend = next(iter(backends_of(item)), None)
            grids[item.function, item.callspec.params.get("dtype"), backend].append(item)
    for (_, _, backend), grid in grids.items():
        share = sample_of(backend or "triton", full)
        if full:
            share = grid[0].get_closest_marker("grid").kwargs.get("full", share)
        if share == FEW:
            kept.update(few_of(grid))
        else:
            random.Random(0).shuffle(grid)
            kept.update(grid[: -(-len(grid) // share)])
    dropped = [item for item in items if "grid" in item.keywords and item not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if "grid" not in item.keywords or item in kept]


def is_of_the_dtype(item):
    """False for cases that grid(one_dtype=True) leaves out: see conftest.py."""
    one_dtype = EMULATED and item.get_closest_marker("grid").kwargs.get("one_dtype")
    return not one_dtype or item.callspec.params["dtype"] == "bf16"


def few_of(grid):
    """A few cases in which every value of every parameter occurs: repeatedly the case with the most
    new values, the last of these, which has the largest sizes."""
    values = [{(k, repr(v)) for k, v in item.callspec.params.items()} for item in grid]
    missing, kept = set().union(*values), []
    while missing:
        most = max(reversed(range(len(grid))), key=lambda i: len(values[i] & missing))
        kept.append(grid[most])
        missing -= values[most]
    return kept


def keep_those_of(backend, config, items):
    """Keeps the tests that request this backend by a fixture."""
    others = [item for item in items if backend not in backends_of(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def sample_of(backend, full):
    """N if one in N cases of a grid runs on this backend, or FEW."""
    if ON_GPU:
        return 1 if full else GPU_SAMPLE.get(backend, SAMPLE["triton"])
    if full and backend == EMULATED_BACKEND:
        return FEW
    if full and backend.startswith("cpu-avx512"):
        return FULL_SAMPLE_AVX512
    return 1 if full else SAMPLE[backend.partition("-")[0]]


def backends_of(item):
    """The values of the test's backend fixtures."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return [params[name] for name in BACKEND_FIXTURES if name in params]
