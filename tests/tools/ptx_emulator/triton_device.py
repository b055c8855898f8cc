"""A Triton driver whose GPU is the emulator.

    with triton_device.active():
        gelu.gelu_fwd(torch.randn(1000))        # the package's own launcher, on CPU tensors

Triton compiles each kernel for sm_80 as usual. Loading a kernel reads the PTX beside its cubin;
launching it runs that PTX with the arguments that Triton's own launcher would pass. A launch may
access only the storages of its tensors. TRITON_INTERPRET must be unset when triton is imported.
"""

import contextlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from .coverage import coverage
from .findings import UnsupportedPTX
from .launch import MAX_SHARED, Launch, launch
from .memory import Memory
from .parser import Module

ARCH = 80

_SCALARS = {"fp32": np.float32, "fp64": np.float64} | {
    f"{sign}{bits}": np.dtype(f"{kind}{max(bits // 8, 1)}").type
    for sign, kind in (("i", "i"), ("u", "u"))
    for bits in (8, 16, 32, 64)
} | {"i1": np.uint8, "u1": np.uint8}  # fmt: skip


class Device:
    """The interface that Triton expects of a driver."""

    def __init__(self, canary: bool = True, banks: bool = False):
        self.utils = self
        self.canary, self.banks = canary, banks
        self.launches: list[Launch] = []
        self.loading = None
        self.launcher_cls = lambda src, metadata: _Launcher(self, src, metadata)

    # The driver

    def get_current_device(self):
        return ARCH  # Triton caches compiled kernels per device number

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", ARCH, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    # The driver's utils

    def get_device_properties(self, device):
        return {"max_shared_mem": MAX_SHARED, "multiprocessor_count": 108, "warpSize": 32}

    def load_binary(self, name, cubin, shared, device):
        """(module, function, registers, spills, largest number of threads per block)"""
        module = self.loading
        return module, (module, name, shared), 0, 0, 1024

    def before_load(self, module, function, name, metadata_group, hash):
        """Triton's hook, the only one that gets the compiled kernel's files."""
        (ptx,) = (path for file, path in metadata_group.items() if file.endswith(".ptx"))
        self.loading = _module(Path(ptx).read_text())


_modules = {}


def _module(text):
    """Parses each PTX text once per process."""
    if text not in _modules:
        _modules[text] = Module(text)
    return _modules[text]


def _title(src):
    """The kernel as its author sees it: the types of its pointers, and its own constants. Triton
    makes several variants of it, for arguments that are 1 or multiples of 16."""
    own = []
    for i, p in enumerate(src.fn.params):
        if p.is_constexpr:
            own.append(str(src.constants.get((i,))))
        else:
            own += [kind for kind in _flat([src.signature[p.name]]) if kind[0] == "*"]
    return f"{src.name}<{','.join(own)}>"


def _flat(items):
    """The items of nested tuples in order, as a kernel receives them."""
    for item in items:
        if isinstance(item, tuple):
            yield from _flat(item)
        else:
            yield item


class _Launcher:
    """Replaces the C function that Triton compiles for a signature."""

    def __init__(self, device, src, metadata):
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise UnsupportedPTX(f"{metadata.name} asks for scratch memory")
        self.device, self.types = device, list(_flat(src.signature.values()))
        self.title = _title(src)

    def __call__(
        self, x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *args
    ):  # fmt: skip
        module, name, shared = function
        kernel, memory = module.kernels[name], Memory()
        coverage.titles[name, module.hash] = self.title
        values = [
            self._argument(kind, value, memory)
            for kind, value in zip(self.types, _flat(args), strict=True)
            if kind != "constexpr"  # compiled in, as are arguments that are 1
        ]
        values += [0, 0][: len(kernel.params) - len(values)]  # global and profile scratch
        options = {"canary": self.device.canary, "banks": self.device.banks}
        self.device.launches.append(
            launch(module, name, (x, y, z), kernel.block_size, values, memory, shared, **options)
        )

    def _argument(self, kind, value, memory):
        if kind[0] == "*":
            if hasattr(value, "untyped_storage"):
                memory.add(value.untyped_storage().data_ptr(), value.untyped_storage().nbytes())
                return value.data_ptr()
            if value is None:
                return 0
        elif kind in _SCALARS:
            return _SCALARS[kind](value)
        raise UnsupportedPTX(f"an argument of type {kind}: {value!r}")


@contextlib.contextmanager
def active(canary: bool = True, banks: bool = False):
    """A context in which Triton launches kernels on the emulator. Yields the device with its
    launches."""
    device = Device(canary, banks)
    driver, hooks = triton.runtime.driver, knobs.runtime.kernel_load_start_hook
    before = driver._active
    driver.set_active(device)
    hooks.add(device.before_load)
    # Only the PTX is run, so it is not translated further, which would take longer than running it.
    # The cache is separate from that of real binaries.
    folder = f"{knobs.cache.dir}-emulated"
    with mock.patch.object(CUDABackend, "make_cubin", return_value=b""), knobs.cache.scope():
        knobs.cache.dir = folder
        try:
            yield device
        finally:
            hooks.remove(device.before_load)
            driver._active = before
