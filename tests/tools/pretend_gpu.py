"""A pytest plugin that pretends there is a GPU: pytest -p pretend_gpu (see test_pretend_gpu.py).

It finds tests that would fail on a GPU for reasons other than the kernels. torch.cuda reports a
GPU, and every tensor claims to be on it but is in CPU memory. The kernels of csrc/cpu replace those
of triton and cuda, which still refuse what they do not support. There is one stream, and
CUDA graphs are those of fake_graphs.py.

It does not work for torch.compile, activation checkpointing or anything else below Python.
"""

import contextlib
import types

import fake_graphs
import pytest
import torch
from on_the_gpu import OnTheGpu


class Stream:
    def __init__(self, device=None): ...

    def synchronize(self): ...

    def wait_stream(self, other): ...


class Event:
    """A CUDA event; all recorded work has already finished."""

    def record(self, stream=None): ...

    def synchronize(self): ...

    def query(self):
        return True


@contextlib.contextmanager
def autocast(device_type, *args, **kwargs):
    """torch.autocast for both devices, because PyTorch's operators see the tensors' real device."""
    with contextlib.ExitStack() as both:
        for kind in ("cuda", "cpu") if device_type == "cuda" else (device_type,):
            both.enter_context(torch.amp.autocast(kind, *args, **kwargs))
        yield


PROPERTIES = types.SimpleNamespace(
    name="a GPU that is not there", major=9, minor=0, total_memory=80 << 30, multi_processor_count=4
)
CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda device=None: PROPERTIES,
    "is_bf16_supported": lambda including_emulation=True: True,
    "mem_get_info": lambda device=None: (PROPERTIES.total_memory,) * 2,
    "empty_cache": lambda: None,
    "synchronize": lambda device=None: None,
    "set_sync_debug_mode": lambda mode: None,
    "device": lambda device: contextlib.nullcontext(),
    "Stream": Stream,
    "Event": Event,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: Stream(),
    **fake_graphs.CUDA,
}
for name, value in CUDA.items():  # before conftest.py checks for a GPU
    setattr(torch.cuda, name, value)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    from gpt2.kernels import triton
    from gpt2.kernels.native import cuda, libraries

    assert libraries.load("cpu") is None, libraries.load("cpu")
    for backend in (triton, cuda):
        backend._device_reason = lambda device_type, index: None
        backend.module = lambda op: torch.ops.gpt2_kernels_cpu
    torch.autocast = autocast
    OnTheGpu().__enter__()


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items if item.module.__name__.endswith("test_gpu")}:
        module.B, module.T, module.ROWS, module.V = 1, 33, 12, 257
        module.REPEATS, module.HUGE = 2, 2**20
