"""What nvcc makes of csrc/cuda for GPUs that this machine need not have: no warning, no spill,
registers within a budget, tensor cores where they belong.

    pytest tests/test_compile_cuda.py            the small files, for sm_80
    pytest tests/test_compile_cuda.py --full     every file, for sm_80 and sm_90a
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt2.kernels import _build, _nvcc

CSRC = _build.CSRC
ARCHITECTURES = ("80", "90a")
SMALL = ("cross_entropy", "gelu")  # seconds to compile
SHARED = 48 << 10  # bytes that a kernel may have without asking

# The most registers that a thread may take, of all dtypes and sizes. 32 is what two blocks of 1024
# threads leave to each; where __launch_bounds__ says more than one block, ptxas sees to it.
REGISTERS = {
    "attention_fwd_kernel": 255,
    "attention_bwd_dkdv_kernel": 255,
    "attention_bwd_dq_kernel": 255,
    "decode_attention_kernel": 80,
    "decode_attention_sum_kernel": 32,
    "layer_norm_fwd_kernel": 104,
    "layer_norm_bwd_kernel": 232,  # a block of 256 threads is alone up to 255
    "gelu_fwd_kernel": 32,
    "gelu_bwd_kernel": 40,
    "bias_gelu_fwd_kernel": 40,
    "bias_gelu_bwd_kernel": 56,
    "cross_entropy_fwd_kernel": 32,
    "cross_entropy_bwd_kernel": 32,
    "cross_entropy_fwd_bwd_kernel": 32,
    "sum_partial_kernel": 32,
}


def find_cuobjdump() -> str | None:
    """Beside nvcc, on PATH, or in Triton, which brings its own."""
    nvcc = _nvcc.find()
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
    pytest.mark.skipif(_nvcc.find() is None, reason=_nvcc.MISSING),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump beside nvcc, on PATH or in triton"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt"),
]


def kernels_of(cubin: Path) -> dict[str, dict[str, int]]:
    """By a kernel's name with its template arguments: what it takes, and its MMA instructions."""

    def dump(flag):
        command = [CUOBJDUMP, flag, cubin]
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


def cases():
    for source in sorted(CSRC.glob("cuda/*.cu")):
        for arch in ARCHITECTURES:
            small = source.stem in SMALL and arch == ARCHITECTURES[0]
            marks = [] if small else [pytest.mark.full]
            yield pytest.param(source.stem, arch, marks=marks, id=f"{source.stem}-sm_{arch}")


@pytest.mark.parametrize("name, arch", list(cases()))
def test_compiles_cleanly(name, arch, tmp_path):
    library, cubin = _build.LIBRARIES["cuda"], tmp_path / f"{name}.cubin"
    tools = _build.find_tools(library)
    command = [
        tools.nvcc, "-ccbin", tools.cxx[0], *_build._NVCC, *library.flags, "-Werror=all-warnings",
        "-Xcompiler=-Werror", f"-arch=sm_{arch}", "-cubin", f"cuda/{name}.cu", "-o", cubin,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=CSRC)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr

    kernels = kernels_of(cubin)
    assert kernels
    for kernel, usage in kernels.items():
        budget = REGISTERS[kernel.partition("<")[0]]
        print(f"sm_{arch} {kernel}: {usage['REG']} registers, {usage['SHARED']} bytes shared")
        assert usage["REG"] <= budget, f"{kernel} takes {usage['REG']} registers, not {budget}"
        assert usage["STACK"] == usage["LOCAL"] == usage["SPILLS"] == 0, f"{kernel}: {usage}"
        assert usage["SHARED"] <= SHARED, f"{kernel} has {usage['SHARED']} bytes of shared memory"
        on_tensor_cores = kernel.startswith("attention_") and "<float" not in kernel
        assert (usage["MMA"] > 0) == on_tensor_cores, f"{kernel} has {usage['MMA']} MMA"
