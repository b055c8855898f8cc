"""The backends by the names that fixtures use, and what each needs to run here.

"cpu-avx2" is the cpu backend with that instruction set forced. Without a GPU, CUDA kernels run on
the emulator; Triton's run in its interpreter or, compiled, on the emulator.
"""

import contextlib
import functools
import itertools
import os
import re
from pathlib import Path

import cuda_backend
import pytest
import torch
from processes import ROOT
from shares import EMULATED as EMULATE_TRITON
from shares import ON_GPU, backends_of

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")  # instruction sets of the cpu backend
TRITON = pytest.param("triton", marks=pytest.mark.triton)
CUDA = pytest.param("cuda", marks=pytest.mark.cuda_kernels)
CPU = pytest.param("cpu", marks=pytest.mark.cpu_kernels)
CPU_SETS = [pytest.param(f"cpu-{isa}", marks=pytest.mark.cpu_kernels) for isa in ISAS]


def serving(param, monkeypatch, **options):
    """A context in which the backend computes the tests' tensors. Yields the emulated device, if
    there is one; the options are passed to it."""
    name = param.partition("-")[0]
    if name == "cuda":
        return cuda_backend.serving(monkeypatch, **options)
    if name == "triton" and EMULATE_TRITON:
        return emulated_triton(monkeypatch, **options)
    return cpu_set(param)


@contextlib.contextmanager
def emulated_triton(monkeypatch, **options):
    """Compiles Triton's kernels for sm_80 and runs their PTX on CPU tensors by the emulator."""
    from ptx_emulator import triton_device

    from gpt2.kernels import triton

    monkeypatch.setattr(triton, "_device_reason", lambda device_type, index: None)
    with triton_device.active(**options) as device:
        yield device


@contextlib.contextmanager
def cpu_set(param):
    """Forces the instruction set that param names ("cpu-avx2"). Also fills memory that the library
    allocates with NaN: poisoned_memory cannot patch torch.empty inside C++."""
    isa = param.partition("-")[2]
    if not isa:
        yield
        return
    library = torch.ops.gpt2_kernels_cpu
    before, deterministic = library.isa(), torch.are_deterministic_algorithms_enabled()
    library.use_isa(isa)
    torch.use_deterministic_algorithms(True, warn_only=True)  # at::empty fills what it returns
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        library.use_isa(before)


def isa_of(item):
    """The instruction set that a test forces, or ""."""
    return next(iter(backends_of(item)), "").partition("-")[2]


@contextlib.contextmanager
def avx512_emulated():
    """With GPT2_TEST_AVX512=1, on a machine without AVX-512: compiles the library with an emulation
    of the AVX-512 instructions (tests/tools/avx512), so that it runs every instruction set."""
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    if has_avx512 or os.environ.get("GPT2_TEST_AVX512") != "1":
        yield
        return
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CXX", str(Path(__file__).parent / "avx512" / "c++"))
        environment.setenv("GPT2_KERNELS_ISA", "avx2")
        yield


@functools.cache
def why_no_cpu_kernels(isa):
    """None if the cpu backend runs here (with the instruction set isa, if given), else the reason.
    Builds the library if necessary."""
    if ON_GPU:
        return "the tests' tensors are on the GPU"
    from gpt2.kernels.native import cpu

    with avx512_emulated():
        reason = cpu._library_reason()
    if reason is not None:
        return reason
    here = torch.ops.gpt2_kernels_cpu.isas().split()
    if "avx512" not in here and os.environ.get("GPT2_TEST_AVX512") == "1":
        raise pytest.UsageError("the native library was loaded before its tests set it up")
    return None if not isa or isa in here else f"this machine runs {', '.join(here)}"


def our_kernels():
    """A regular expression that matches the mangled names of our kernels and no others."""
    sources = (ROOT / "kernels" / "triton").glob("*.py")
    triton = [re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M) for file in sources]
    return "|".join(["_ZN4gpt24cuda", *itertools.chain(*triton)])
