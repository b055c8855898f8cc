"""The settings that conftest.py applies to every test."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from processes import TESTS
from shares import MOST_WORKERS, MOST_WORKERS_ON_GPU, few_of, long_ones_first, workers
from util import environment

ALLOCATE = {
    "empty": lambda shape, **kwargs: torch.empty(shape, **kwargs),
    "empty_like": lambda shape, **kwargs: torch.empty_like(torch.zeros(shape), **kwargs),
    "new_empty": lambda shape, **kwargs: torch.zeros(1).new_empty(shape, **kwargs),
}


@pytest.mark.parametrize("allocate", ALLOCATE.values(), ids=ALLOCATE)
def test_new_memory_is_poisoned(allocate):
    assert allocate((2, 3)).isnan().all()
    assert (allocate((2, 3), dtype=torch.int32) == -(2**31)).all()
    assert not allocate((0, 3)).numel()


@pytest.mark.parametrize("shape", [(0,), (2, 3)], ids=str)
@pytest.mark.parametrize("allocate", ALLOCATE.values(), ids=ALLOCATE)
def test_leaves_of_a_gradient_are_not_poisoned(allocate, shape):
    """torch.utils.checkpoint calls torch.empty((0,), requires_grad=True); filling it raised."""
    x = allocate(shape, requires_grad=True)
    assert x.shape == shape and x.requires_grad and x.is_leaf


def test_processes_of_a_run():
    GiB = 1 << 30
    assert workers(4) == 4 and workers(64) == MOST_WORKERS
    assert workers(16, 140 * GiB) == workers(16, 80 * GiB) == MOST_WORKERS_ON_GPU
    assert workers(4, 140 * GiB) == 4
    assert workers(16, 15 * GiB) == 2 and workers(16, 4 * GiB) == 1


def test_a_few_cases_have_every_value():
    """The emulator's cases of a grid contain every value, and are the same in every process and
    run."""
    params = [
        {"T": T, "D": D, "dtype": dtype} for T in (1, 5, 17) for D in (16, 64) for dtype in "ab"
    ]
    grid = [SimpleNamespace(callspec=SimpleNamespace(params=p)) for p in params]
    few = [tuple(item.callspec.params.values()) for item in few_of([*grid])]
    assert few == [(17, 64, "b"), (5, 16, "a"), (1, 64, "b")]


def test_every_process_begins_with_long_tests():
    """Long tests are spread over the processes: all in the first one's share kept it busy for
    minutes."""
    tests = [SimpleNamespace(name=i, keywords={"long"} if i in (3, 7, 8) else {}) for i in range(9)]

    def order(processes):
        return [test.name for test in long_ones_first(tests, processes)]

    assert order(1) == [3, 7, 8, 0, 1, 2, 4, 5, 6]
    assert order(2) == [3, 8, 0, 1, 7, 2, 4, 5, 6]  # xdist gives 4 and 5
    assert order(4) == [3, 0, 7, 1, 8, 2, 4, 5, 6]  # and here 2, 2, 2, 3
    assert sorted(order(20)) == list(range(9))


@pytest.mark.full
def test_processes_take_tests_from_each_other():
    pytest.importorskip("xdist")
    arguments = [
        "tools/test_conftest.py",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "--setup-plan",
        "-k",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "poisoned", "-v", "-v"],
        cwd=TESTS, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "WorkStealingScheduling" in done.stdout, done.stdout
