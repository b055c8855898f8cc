"""What conftest.py does to every test."""

import pytest
import torch
from conftest import MOST_WORKERS, MOST_WORKERS_ON_GPU, workers

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
    """torch.utils.checkpoint asks for torch.empty((0,), requires_grad=True): filling it raised."""
    x = allocate(shape, requires_grad=True)
    assert x.shape == shape and x.requires_grad and x.is_leaf


def test_processes_of_a_run():
    GiB = 1 << 30
    assert workers(4) == 4 and workers(64) == MOST_WORKERS
    assert workers(16, 140 * GiB) == workers(16, 80 * GiB) == MOST_WORKERS_ON_GPU
    assert workers(4, 140 * GiB) == 4
    assert workers(16, 15 * GiB) == 2 and workers(16, 4 * GiB) == 1
