"""Launches from Triton and from nvcc's host code run on the emulator."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT
from util import environment

pytestmark = pytest.mark.usefixtures("own_coverage")
TRITON_SCRIPT = """
import torch
from ptx_emulator import triton_device
from gpt2.kernels.triton import gelu
x = torch.randn(3001)
with triton_device.active() as device:
    y = gelu.gelu_fwd(x)
torch.testing.assert_close(y, torch.nn.functional.gelu(x, approximate="tanh"))
assert [launch.kernel.name for launch in device.launches] == ["_gelu_fwd_kernel"]
"""


def test_triton_launches_run_on_the_emulator():
    """Runs in another process, because this one may have imported triton as an interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(ROOT)])
    subprocess.run([sys.executable, "-c", TRITON_SCRIPT], env=environment, check=True)


CUDA_SOURCE = """
#include <cuda_runtime.h>
__global__ void add_one(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + 1.0f;
}
extern "C" const char* run(const float* x, float* y, int n) {
  add_one<<<(n + 127) / 128, 128>>>(x, y, n);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
"""


@pytest.mark.no_poison
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_launches_run_on_the_emulator(tmp_path):
    import ctypes

    from ptx_emulator.cuda_device import EmulatedDevice, build

    (tmp_path / "small.cu").write_text(CUDA_SOURCE)
    flags = "-cudart none -gencode arch=compute_80,code=compute_80 --keep -shared -Xcompiler -fPIC"
    files = ["small.cu", str(build()), "-o", "small.so"]
    subprocess.run(["nvcc", *flags.split(), *files], cwd=tmp_path, check=True)
    with EmulatedDevice() as device:
        library = device.load(tmp_path / "small.so", [(tmp_path / "small.ptx").read_text()])
        library.run.restype = ctypes.c_char_p
        library.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        x, y = torch.randn(300), torch.empty(300)
        assert library.run(x.data_ptr(), y.data_ptr(), 300) is None
        assert torch.equal(y, x + 1)
        fresh = torch.empty(300)
        assert b"nobody has written" in library.run(fresh.data_ptr(), y.data_ptr(), 300)
        assert b"load of 4 bytes at byte 1200" in library.run(x.data_ptr(), y.data_ptr(), 301)
        assert b"launch has no" not in library.run(x.data_ptr(), y.data_ptr() + 4, 300)
        known = len(device.memory().allocations)
        del fresh, x
        assert len(device.memory().allocations) == known - 2
    assert [f.kind for f in device.findings] == ["uninitialized", "bounds", "bounds"]
    assert len(device.launches) == 1
    before = len(device.memory().allocations)
    z = torch.ones(300)  # no longer allocated by the emulator
    assert len(device.memory().allocations) == before and z.sum() == 300


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_cuda_runtime_that_is_loaded_is_not_asked(tmp_path):
    """A PyTorch built for CUDA loads libcudart first. Its functions were called instead of the
    emulator's, so that every launch failed on a machine with a hidden GPU."""
    names = ("__cudaRegisterFatBinary", "__cudaPushCallConfiguration", "__cudaPopCallConfiguration",
             "__cudaLaunchKernel", "cudaLaunchKernel", "cudaGetLastError")  # fmt: skip
    source = "".join(f"int {name}(void) {{ return 35; }}\n" for name in names)
    (tmp_path / "cudart.c").write_text(source)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    options = ["-shared", "-fPIC", "cudart.c", "-o", "cudart.so"]
    subprocess.run([*compiler, *options], cwd=tmp_path, check=True)
    test = f"{__file__}::{test_cuda_launches_run_on_the_emulator.__name__}"
    program = (
        "import ctypes, sys, pytest\n"
        f"ctypes.CDLL({str(tmp_path / 'cudart.so')!r}, ctypes.RTLD_GLOBAL)\n"
        f"sys.exit(pytest.main([{test!r}, '-p', 'no:cacheprovider', '-p', 'no:xdist']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch was built without oneDNN"
)
def test_bare_pointers_go_back_to_where_they_came_from():
    """oneDNN frees pointers without their deleters, null pointers included."""
    from ptx_emulator.cuda_device import EmulatedDevice

    x, weight = torch.randn(1, 1), torch.randn(64, 1)
    with EmulatedDevice() as device:
        known = len(device.memory().allocations)
        for _ in range(3):
            y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        assert len(device.memory().allocations) == known + 1
    assert torch.allclose(y, x @ weight.t(), atol=1e-5)
    del y
    assert len(device.memory().allocations) == known
