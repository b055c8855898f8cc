"""The libraries of csrc: their sources, headers and flags.

A library of kernels works with every Python and every torch >= 2.10. It uses only LibTorch's stable
ABI. Every library finds libtorch by name among the loaded libraries of the process, so it contains
no path of torch.
Only the sources for an instruction set get its flags; cpu/library.cpp detects the processor at run
time.
"""

import platform
from dataclasses import dataclass

X86_64 = platform.machine().lower() in ("x86_64", "amd64")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns about its own intrinsics
)


@dataclass(frozen=True)
class Library:
    title: str  # its name in progress messages
    sources: dict[str, tuple[str, ...]]  # pattern under csrc -> extra flags; slowest file first
    headers: tuple[str, ...]  # included headers, as patterns under csrc
    flags: tuple[str, ...] = ()  # for every source
    # Whether it uses only LibTorch's stable ABI. Otherwise it is for one torch and one Python.
    stable: bool = True
    quiet: bool = False  # whether its build shows no progress
    link: tuple[str, ...] = ("-ltorch_cpu",)
    nvcc: tuple[str, ...] = ()  # flags for .cu files; if not empty, nvcc compiles and links
    gencode: tuple[str, ...] = ()  # target GPUs; empty: this machine's
    # Other libraries whose functions it calls, as pairs (library, function). They are loaded before
    # it, but may be missing on the machine that builds it, so the linker gets a stub for each.
    borrowed: tuple[tuple[str, str], ...] = ()


# The operators of both libraries.
_OPERATORS = tuple(
    f"ops/{op}.cpp"
    for op in ("attention", "cross_entropy", "decode_attention", "gelu", "layer_norm")
)
_CPU_OPERATORS = (*_OPERATORS, "ops/decode_layers.cpp", "ops/linear.cpp", "cpu/library.cpp")
SOURCES = {
    "cpu/kernels_scalar.cpp": (),
    "cpu/kernels_avx512_bf16.cpp": (*_AVX512, "-mavx512bf16"),
    "cpu/kernels_avx512.cpp": _AVX512,
    "cpu/kernels_avx2.cpp": _AVX2,
    **dict.fromkeys(_CPU_OPERATORS, ()),
}
_PORTABLE = dict.fromkeys(("cpu/kernels_scalar.cpp", *_CPU_OPERATORS), ())

LIBRARIES = {
    "cpu": Library(
        title="the CPU kernels",
        sources=SOURCES if X86_64 else _PORTABLE,
        headers=("*.h", "ops/*.h", "cpu/*.h"),
        flags=() if X86_64 else ("-DGPT2_KERNELS_PORTABLE",),
    ),
    "cuda": Library(
        title="the CUDA kernels",
        sources={
            **dict.fromkeys(("cuda/attention_bwd.cu", "cuda/attention.cu", "cuda/*.cu"), ()),
            **dict.fromkeys((*_OPERATORS, "cuda/library.cpp"), ("-DUSE_CUDA",)),
        },
        headers=("*.h", "ops/*.h", "cuda/*.h", "cuda/*.cuh"),
        flags=("-DGPT2_KERNELS_CUDA",),
        nvcc=("-lineinfo", "-cudart=static"),
        borrowed=(("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"),),
    ),
    "replay": Library(
        title="the replay of calls",
        sources={"replay/replay.cpp": ()},
        headers=("replay/*.h",),
        stable=False,
        quiet=True,  # built beside a training whose progress is shown
        link=("-ltorch_python", "-ltorch_cpu", "-lc10"),
    ),
}

# No -ffast-math, not even for linking: the library would turn denormals off in the whole process.
# -ffp-contract=off: the compiler adds no fused multiply-adds of its own, so that every instruction
# set rounds alike.
COMPILE = (
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
STABLE = ("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# No --use_fast_math: denormals, divisions and exp keep their accuracy.
NVCC = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
OPTIMIZE = ("-O3",)
SANITIZE = (
    *("-O1", "-g1", "-fno-omit-frame-pointer"),  # -g would take half as long again to compile
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
)
