"""A CUDA driver that launches nothing, to time Triton's launcher on the host without a GPU.

    with stub_driver.active():
        kernels.layer_norm(x, weight, bias)      # CPU tensors; y is left as it was allocated

Everything above the driver runs as on a GPU: Triton's binder, cache, compiler (for sm_90) and its
launcher in C. That launcher is linked with a stub libcuda.so.1, whose functions return at once. The
C compiler that Triton needs anyway builds the stub into a temporary folder.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch

from gpt2 import kernels
from gpt2.kernels import triton as backend

ARCH = 90
# The functions that Triton's driver.c calls. It needs the largest shared memory (an attribute of
# the device) and the most threads of a block (attribute 0 of a function); other results do not
# matter.
LIBCUDA = """
#include <stdint.h>
static long launched;
long stub_launches(void) { return launched; }
int cuLaunchKernelEx(const void *config, void *f, void **params, void **extra) {
  launched++;
  return 0;
}
int cuPointerGetAttribute(uint64_t *to, int what, uint64_t pointer) { *to = pointer; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int what, void *f) { *value = what ? 0 : 1024; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)1; return 0; }
int cuDeviceGet(int *device, int i) { *device = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "stub"; return 0; }
#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuDevicePrimaryCtxRetain) NOTHING(cuCtxSetCurrent) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuFuncSetAttribute) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit)
NOTHING(cuTensorMapEncodeTiled)
"""


class _Driver:
    """The driver interface of Triton's JIT, for one GPU of compute capability 9.0."""

    def __init__(self, utils, launcher_cls, target):
        self.utils, self.launcher_cls, self.target = utils, launcher_cls, target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


@contextlib.contextmanager
def active():
    """A context in which the triton backend computes CPU tensors, and its launches do nothing."""
    import triton

    _, stub = _built()
    config, before = triton.runtime.driver, triton.runtime.driver._active
    config.set_active(stub)
    device = mock.patch.object(backend, "_device_reason", lambda device_type, index: None)
    # The backend is forced, so that calls are recorded apart from those without the stub.
    with device, kernels.use("triton"):
        try:
            yield
        finally:
            config._active = before


def launches() -> int:
    """The number of kernels that Triton's launcher has passed to the stub in this process."""
    return _built()[0].stub_launches()


@functools.cache
def why_not() -> str | None:
    """None if the stub can replace a GPU, else the reason in one line."""
    if torch.cuda.is_available():
        return "there is a GPU here: --device cuda times its own driver"
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    if _compiler() is None:
        return "Triton's launcher needs a C compiler"
    try:
        _built()
    except Exception as error:  # a compiler without Python's headers fails in its own way
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None


@functools.cache
def _built() -> tuple[ctypes.CDLL, _Driver]:
    """Returns (the stub of libcuda, a driver whose launcher is linked with it)."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder, knobs.nvidia.scope():
        library = Path(folder) / "libcuda.so.1"
        subprocess.run(
            [_compiler(), "-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}",
             "-o", library, "-x", "c", "-"],
            input=LIBCUDA, text=True, check=True, capture_output=True,
        )  # fmt: skip
        # Loaded before Triton's module, so that it resolves libcuda.so.1 to the stub
        loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        loaded.stub_launches.restype = ctypes.c_long
        knobs.nvidia.libcuda_path = folder
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        return loaded, _Driver(CudaUtils(), CudaLauncher, GPUTarget("cuda", ARCH, 32))


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
