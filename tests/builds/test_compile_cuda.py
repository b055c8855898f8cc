"""csrc/cuda compiled by nvcc for GPUs that this machine need not have: no warning, no spill,
registers within a budget, tensor cores for matrix products.

    pytest tests/builds/test_compile_cuda.py            the small files, for sm_80
    pytest tests/builds/test_compile_cuda.py --full     every file, for sm_80 and sm_90a
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT

from gpt2.kernels.native import compiler, cuda_toolkit, recipes

CSRC = compiler.CSRC
ARCHITECTURES = {"80": "8.0", "90a": "9.0a"}  # and their names in TORCH_CUDA_ARCH_LIST
SMALL = ("cross_entropy", "gelu")  # seconds to compile
SHARED = 48 << 10  # bytes available without opting in

# The largest number of registers per thread, over all dtypes and sizes. 32 is what two blocks of
# 1024 threads leave to each thread; for more than one block, ptxas enforces __launch_bounds__.
REGISTERS = {
    "attention_fwd_kernel": 255,
    "attention_bwd_dkdv_kernel": 255,
    "attention_bwd_dq_kernel": 255,
    "decode_attention_kernel": 80,
    "decode_attention_sum_kernel": 32,
    "layer_norm_fwd_kernel": 104,
    "layer_norm_bwd_kernel": 232,  # one block of 256 threads may use up to 255
    "gelu_fwd_kernel": 32,
    "gelu_bwd_kernel": 40,
    "bias_gelu_fwd_kernel": 40,
    "bias_gelu_bwd_kernel": 56,
    "cross_entropy_fwd_kernel": 32,
    "cross_entropy_bwd_kernel": 32,
    "cross_entropy_fwd_bwd_kernel": 32,
    "cross_entropy_ring_kernel": 64,  # one block of 1024 threads
    "sum_partial_kernel": 32,
}


def find_cuobjdump() -> str | None:
    """Finds it beside nvcc, on PATH, or in Triton."""
    nvcc = cuda_toolkit.find()
    beside = str(Path(nvcc).resolve().parent) if nvcc else None
    found = shutil.which("cuobjdump", path=beside) or shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        folder = Path(triton.__file__).parent / "backends/nvidia/bin"
        found = shutil.which("cuobjdump", path=str(folder))
    return found


CUOBJDUMP = find_cuobjdump()

pytestmark = [
    pytest.mark.skipif(cuda_toolkit.find() is None, reason=cuda_toolkit.MISSING),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump beside nvcc, on PATH or in triton"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt"),
]


def kernels_of(binary: Path, arch: str) -> dict[str, dict[str, int]]:
    """Kernel name with template arguments -> its costs on sm_`arch`, and its MMA instructions."""

    def dump(flag):
        command = [CUOBJDUMP, flag, "-arch", f"sm_{arch}", binary]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        named = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
        return re.sub(r"gpt2::cuda::|\(anonymous namespace\)::|\bvoid ", "", named.stdout)

    found = {}
    for name, usage in re.findall(
        r"Function (\w+(?:<.*?>)?)\(.*\):\n\s*(REG.*)", dump("-res-usage")
    ):
        found[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    for name, sass in re.findall(
        r"Function : (\w+(?:<.*?>)?)\((.*?)(?=Function :|\Z)", dump("-sass"), re.S
    ):
        found[name]["MMA"] = len(re.findall(r"\bHG?MMA\.", sass))
        found[name]["SPILLS"] = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return found


@pytest.mark.parametrize("name", SMALL)
def test_small_files(name, tmp_path):
    library, cubin = recipes.LIBRARIES["cuda"], tmp_path / f"{name}.cubin"
    tools = compiler.find_tools(library)
    command = [
        tools.nvcc, "-ccbin", tools.cxx[0], *recipes.NVCC, *library.flags, "-Werror=all-warnings",
        "-Xcompiler=-Werror", "-arch=sm_80", "-cubin", f"cuda/{name}.cu", "-o", cubin,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=CSRC)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    check(cubin, "80")


@pytest.mark.full
@pytest.mark.long
def test_every_file(tmp_path):
    """The library is built as the command builds it without a GPU."""
    environment = os.environ | {
        "GPT2_KERNELS_CACHE": str(tmp_path / "cache"),
        "TORCH_CUDA_ARCH_LIST": " ".join(ARCHITECTURES.values()),
    }
    command = [sys.executable, "-m", "gpt2.kernels", "build", "--cuda", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("cache/cuda/*/build.log")
    warned = re.findall(r"^(?:.*\.cuh?[(:]|nvcc|ptxas).*\bwarning\b.*$", log.read_text(), re.M)
    assert not warned, "\n".join(warned)

    library = tmp_path / "libgpt2_kernels_cuda.so"
    for arch in ARCHITECTURES:
        check(library, arch)
    content = library.read_bytes()
    assert b"libtorch_cuda.so" in content, "the loader must find a torch with CUDA"
    assert b"gpt2_kernels_cuda" in content
    assert str(Path(torch.__file__).parent).encode() not in content


def check(binary, arch):
    kernels = kernels_of(binary, arch)
    assert kernels
    for kernel, usage in kernels.items():
        budget = REGISTERS[kernel.partition("<")[0]]
        print(f"sm_{arch} {kernel}: {usage['REG']} registers, {usage['SHARED']} bytes shared")
        assert usage["REG"] <= budget, f"{kernel} takes {usage['REG']} registers, not {budget}"
        assert usage["STACK"] == usage["LOCAL"] == usage["SPILLS"] == 0, f"{kernel}: {usage}"
        assert usage["SHARED"] <= SHARED, f"{kernel} has {usage['SHARED']} bytes of shared memory"
        on_tensor_cores = kernel.startswith("attention_") and "<float" not in kernel
        assert (usage["MMA"] > 0) == on_tensor_cores, f"{kernel} has {usage['MMA']} MMA"
