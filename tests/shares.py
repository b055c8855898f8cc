"""Which cases of the grids run, in how many processes, and in which order."""

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
# Without --full, one in so many cases of a grid runs, for each instruction set of cpu. What is
# emulated is sampled with --full, too.
SAMPLE = {"triton": 16, "cuda": 80, "cpu": 60}
GPU_SAMPLE = {"triton": 32, "cuda": 16}  # nearly every case compiles Triton's kernels once more
FULL_SAMPLE = {"triton": 24 if EMULATED else 1, "cuda": 6, "cpu": 1}
FULL_SAMPLE_AVX512 = 1 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 3


def workers(cores, gpu_memory=None):
    """How many processes share the suite: one a core, and no more than the GPU has memory for."""
    if gpu_memory is None:
        return min(cores, MOST_WORKERS)
    return max(1, min(cores, MOST_WORKERS_ON_GPU, gpu_memory // GPU_MEMORY_OF_A_WORKER))


def long_ones_first(items, processes):
    """The tests in the order in which xdist hands them out, a piece to each process: every piece
    begins with its share of those that take long."""
    long = [item for item in items if "long" in item.keywords]
    others = iter([item for item in items if "long" not in item.keywords])
    ordered = []
    for i in range(processes):
        piece = long[i::processes]
        size = max(0, len(items) - len(ordered)) // (processes - i)
        ordered += [*piece, *itertools.islice(others, max(0, size - len(piece)))]
    return [*ordered, *others]


def sample(config, items):
    """Leaves a share of each grid."""
    grids = collections.defaultdict(list)  # a grid: a test function, a dtype and a backend
    for item in items:
        if "grid" in item.keywords:
            backend = next(iter(backends_of(item)), None)
            grids[item.function, item.callspec.params.get("dtype"), backend].append(item)
    dropped = set()
    for (_, _, backend), grid in grids.items():
        random.Random(0).shuffle(grid)
        share = sample_of(backend or "triton", config.option.full)
        if config.option.full:
            share = grid[0].get_closest_marker("grid").kwargs.get("full", share)
        dropped.update(grid[-(-len(grid) // share) :])
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def keep_those_of(backend, config, items):
    """Leaves the tests that ask for this backend by a fixture."""
    others = [item for item in items if backend not in backends_of(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def sample_of(backend, full):
    """N, where one in N cases of a grid runs on this backend."""
    if ON_GPU:
        return 1 if full else GPU_SAMPLE.get(backend, SAMPLE["triton"])
    if full and backend.startswith("cpu-avx512"):
        return FULL_SAMPLE_AVX512
    return (FULL_SAMPLE if full else SAMPLE)[backend.partition("-")[0]]


def backends_of(item):
    """What the test's backend fixtures are set to."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return [params[name] for name in BACKEND_FIXTURES if name in params]
