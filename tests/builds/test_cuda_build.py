"""Building, finding and refusing the CUDA library, possibly without nvcc or a GPU.

nvcc is a script here that passes the C++ of a .cu file to the C++ compiler; test_compile_cuda.py
tests the real nvcc's output for csrc/cuda.
"""

import inspect
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_command
from small_library import COMPILER, lines, needs_compiler

from gpt2 import kernels
from gpt2.kernels import dispatch
from gpt2.kernels.native import compiler, cuda, cuda_toolkit, libraries, recipes

pytestmark = needs_compiler

NVCC = """#!{python} -SE
import os, sys
given = sys.argv[1:]
open({calls!r}, "a").write(" ".join(given) + "\\n")
of_nvcc = ("-ccbin", "-gencode=", "-cudart=", "-Xcompiler=", "-Xlinker", "-lineinfo", "-nodlink")
kept, before = [], ""
for argument in given:
    if before == "-Xlinker":
        kept.append("-Wl," + argument)
    elif argument.endswith(".cu"):
        kept += ["-x", "c++", argument]
    elif before != "-ccbin" and not argument.startswith(of_nvcc):
        kept.append(argument)
    before = argument
os.execv({compiler!r}, [{compiler!r}, "-fPIC", *kept])
"""

SMALL_CU = """
extern "C" void of_torch();
#pragma GCC visibility push(default)
extern "C" int on_gpu(int call) { if (call) of_torch(); return 1; }
"""


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """A machine with a C++ compiler and no CUDA."""
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("c++", "ninja"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    others = [place for place in os.get_exec_path() if not shutil.which("nvcc", path=place)]
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), *others]))
    monkeypatch.setattr(cuda_toolkit, "_pip_folders", lambda: [])
    return folder


def write_nvcc(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    calls = str(path.with_name("nvcc-calls"))
    path.write_text(NVCC.format(python=sys.executable, calls=calls, compiler=COMPILER))
    path.chmod(0o755)
    return path


@pytest.fixture
def small_cuda(small, no_nvcc, monkeypatch):
    """small_library.py's library with a CUDA source, which calls a library that does not exist
    yet."""
    small.nvcc = write_nvcc(no_nvcc / "nvcc")
    small.cuda_source = small.csrc / "small.cu"
    small.cuda_source.write_text(SMALL_CU)
    small.cuda_library = replace(
        recipes.Library("the CUDA sample", {"*.cu": (), "*.cpp": ()}, ("*.h",)),
        nvcc=("-lineinfo", "-cudart=static"),
        gencode=("-gencode=arch=compute_80,code=sm_80",),
        borrowed=(("libof_torch.so", "of_torch"),),
    )
    monkeypatch.setattr(recipes, "LIBRARIES", {"cpu": small.library, "cuda": small.cuda_library})
    return small


# ---- nvcc


def test_nvcc_is_looked_for_in_this_order(no_nvcc, monkeypatch, tmp_path):
    assert cuda_toolkit.find() is None
    pip = write_nvcc(tmp_path / "site-packages/nvidia/cu13/bin/nvcc")
    monkeypatch.setattr(cuda_toolkit, "_pip_folders", lambda: [str(pip.parent)])
    assert cuda_toolkit.find() == str(pip)
    for name in ("CUDA_PATH", "CUDA_HOME"):
        home = tmp_path / name
        monkeypatch.setenv(name, str(home))
        assert cuda_toolkit.find() != str(home / "bin/nvcc")
        there = write_nvcc(home / "bin/nvcc")
        assert cuda_toolkit.find() == str(there), name
    on_path = write_nvcc(no_nvcc / "nvcc")
    assert cuda_toolkit.find() == str(on_path)
    chosen = write_nvcc(tmp_path / "chosen/nvcc-13")
    monkeypatch.setenv("NVCC", str(chosen))
    assert cuda_toolkit.find() == str(chosen)


def test_pip_packages_are_found(monkeypatch, tmp_path):
    (tmp_path / "nvidia/cu13/bin").mkdir(parents=True)
    (tmp_path / "nvidia/cublas/bin").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    assert cuda_toolkit._pip_folders() == [str(tmp_path / "nvidia/cu13/bin")]


def test_what_is_missing_and_how_to_get_it(no_nvcc, monkeypatch):
    nothing = (
        "no nvcc: none is on PATH, in $CUDA_HOME/bin or among the pip packages; "
        "pip install 'gpt2-kernels[cuda]', or set NVCC"
    )
    with pytest.raises(compiler.BuildError) as error:
        compiler.find_tools(recipes.LIBRARIES["cuda"])
    assert str(error.value) == nothing
    assert compiler.find_tools(recipes.LIBRARIES["cpu"]).nvcc is None, "the CPU's needs no nvcc"
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    with pytest.raises(
        compiler.BuildError, match="NVCC is '/nonexistent/nvcc', which cannot be run"
    ):
        compiler.find_tools(recipes.LIBRARIES["cuda"])
    monkeypatch.delenv("NVCC")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(compiler.BuildError) as error:
        compiler.find_tools(recipes.LIBRARIES["cuda"])
    assert str(error.value).startswith("no C++ compiler: ") and nothing in str(error.value)


# ---- architectures


@pytest.mark.parametrize(
    "wanted, flags",
    [
        ("8.0", ["compute_80,code=sm_80"]),
        ("8.0;9.0a", ["compute_80,code=sm_80", "compute_90a,code=sm_90a"]),
        ("8.6 10.0+PTX", ["compute_86,code=sm_86", "compute_100,code=sm_100",
                          "compute_100,code=compute_100"]),
    ],
)  # fmt: skip
def test_the_list_of_architectures(wanted, flags, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert cuda_toolkit.architectures() == tuple(f"-gencode=arch={flag}" for flag in flags)


@pytest.mark.parametrize("wanted", ["Ampere", "7.5", "90", "8.0;7.0", "9.0-PTX"])
def test_a_list_that_cannot_be_built(wanted, small_cuda, monkeypatch):
    monkeypatch.setattr(
        recipes, "LIBRARIES", {"cuda": replace(small_cuda.cuda_library, gencode=())}
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    entry = wanted.partition(";")[2] or wanted
    reason = f"TORCH_CUDA_ARCH_LIST: {entry!r} is not like 8.0, 9.0a or 9.0+PTX"
    assert libraries.load("cuda") == libraries.missing("cuda") == reason
    with pytest.raises(libraries.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        libraries.build("cuda")


def test_the_present_gpus_are_built_for(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_toolkit.architectures() == cuda_toolkit.EVERYWHERE
    present = [(9, 0), (8, 6), (9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(present))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: present[device])
    assert cuda_toolkit.architectures() == (
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
    )


# ---- the library


def test_it_is_built_and_finds_torchs_cuda_when_it_is_loaded(small_cuda, capfd):
    """Only the linker sees a stand-in for torch's CUDA library, which a CPU build of torch does not
    have."""
    library = libraries.build("cuda")
    assert library.name == "libgpt2_kernels_cuda.so" and library.parent.parent.name == "cuda"
    assert lines(capfd)[0] == "gpt2-kernels: building the CUDA sample, once (2 files)…"
    load = f"import ctypes; print(ctypes.CDLL({str(library)!r}).on_gpu(0))"
    torchs = Path(torch.__file__).parent / "lib"
    empty = dict(os.environ, LD_LIBRARY_PATH=str(torchs))
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, env=empty)
    assert "libof_torch.so: cannot open shared object file" in done.stderr
    there = small_cuda.csrc.parent / "there"
    there.mkdir()
    source = there / "of_torch.cpp"
    source.write_text('extern "C" void of_torch() {}\n')
    command = [COMPILER, "-shared", "-fPIC", source, "-o", there / "libof_torch.so"]
    subprocess.run(command, check=True)
    full = dict(os.environ, LD_LIBRARY_PATH=f"{torchs}{os.pathsep}{there}")
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, env=full)
    assert done.stdout == "1\n", done.stderr


def test_what_is_undefined_is_found_when_it_is_linked(small_cuda):
    small_cuda.cuda_source.write_text(SMALL_CU.replace("of_torch", "other"))
    assert "undefined reference to `other'" in libraries.load("cuda")


def change_architecture(small, monkeypatch):
    gencode = ("-gencode=arch=compute_90a,code=sm_90a",)
    changed = {"cuda": replace(small.cuda_library, gencode=gencode)}
    monkeypatch.setattr(recipes, "LIBRARIES", changed)


def change_nvcc(small, monkeypatch):
    monkeypatch.setenv("NVCC", str(write_nvcc(small.nvcc.with_name("nvcc-14"))))


def change_source(small, monkeypatch):
    small.cuda_source.write_text(SMALL_CU + "// more\n")


@pytest.mark.parametrize("change", [change_architecture, change_nvcc, change_source])
def test_a_change_is_a_new_build(small_cuda, change, monkeypatch):
    first = libraries.build("cuda")
    assert libraries.build("cuda") == first
    change(small_cuda, monkeypatch)
    assert libraries.build("cuda") != first and libraries.build("cuda") != first
    assert len(list(small_cuda.cache.glob("cuda/*/*.so"))) == 2, "the old one is kept"


def test_sanitizers_are_the_cpus(small_cuda, monkeypatch):
    first = libraries.build("cuda")
    monkeypatch.setenv("GPT2_KERNELS_SANITIZE", "1")
    assert libraries.build("cuda") == first


def test_nvccs_error_becomes_one_line(small_cuda, capfd):
    small_cuda.nvcc.write_text(
        "#!/bin/sh\necho 'nvcc fatal   : Unsupported gpu architecture'; exit 1\n"
    )
    reason = libraries.load("cuda")
    assert reason.startswith(
        "nvcc failed: nvcc fatal   : Unsupported gpu architecture".replace("   ", " ")
    )
    assert reason.endswith("; to try again: python -m gpt2.kernels build --cuda)")
    assert libraries.missing("cuda") == reason


def test_the_command_builds_it(small_cuda, capfd, monkeypatch, tmp_path):
    assert run_command(monkeypatch, "build", "--cuda", "--out", tmp_path / "out") == 0
    assert capfd.readouterr().out.startswith(f"{tmp_path}/out/libgpt2_kernels_cuda.so (")
    small_cuda.nvcc.unlink()
    assert run_command(monkeypatch, "build", "--cuda", "--force") == 1
    assert lines(capfd)[-1] == f"error: {cuda_toolkit.MISSING}"


def test_missing_asks_and_does_nothing(small_cuda):
    assert libraries.missing("cuda") is None
    assert not small_cuda.cache.exists() and not small_cuda.nvcc.with_name("nvcc-calls").exists()
    libraries.build("cuda")
    small_cuda.nvcc.unlink()
    assert libraries.missing("cuda") is None, "one in the cache will do"
    shutil.rmtree(small_cuda.cache)
    assert libraries.missing("cuda") == cuda_toolkit.MISSING


# ---- the backend

device_reason = inspect.unwrap(cuda._device_reason)  # not cached


def test_forced_without_gpu_and_nvcc_both_are_told(no_nvcc, monkeypatch):
    monkeypatch.setattr(libraries, "_reasons", {})
    monkeypatch.setattr(libraries, "SHIPPED", no_nvcc / "lib")
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(no_nvcc / "cache"))
    monkeypatch.setattr(cuda, "_device_reason", device_reason)
    with kernels.use("cuda"), pytest.raises(kernels.BackendUnavailable) as error:
        kernels.gelu(torch.ones(3))
    assert str(error.value) == (
        f"cuda cannot serve gelu: needs a CUDA tensor, got one on cpu; {cuda_toolkit.MISSING}"
    )


@pytest.mark.parametrize(
    "capability, hip, reason",
    [
        ((7, 5), None, "needs compute capability 8.0 or newer, this GPU has 7.5"),
        ((9, 0), "6.0", "needs an NVIDIA GPU, this build of PyTorch is for ROCm"),
        ((8, 0), None, "asked for"),
    ],
)
def test_reasons_with_a_gpu(capability, hip, reason, monkeypatch):
    """The library is requested only if the GPU can run it."""
    monkeypatch.setattr(libraries, "load", lambda name: "asked for")
    monkeypatch.setattr(libraries, "missing", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert device_reason("cuda", 0) == reason


@pytest.mark.parametrize("op", dispatch.OPS)
def test_a_cpu_tensor_starts_no_build(op, monkeypatch):
    monkeypatch.setattr(cuda, "_device_reason", device_reason)
    monkeypatch.setattr(libraries, "load", lambda name: pytest.fail(f"{name} was asked for"))
    assert "needs a CUDA tensor" in kernels.why_not("cuda", op, torch.device("cpu"), torch.float32)


def test_a_gpu_that_triton_serves_starts_no_build(small_cuda, monkeypatch):
    monkeypatch.setattr(kernels.triton, "why_not", lambda *args: None)
    monkeypatch.setattr(dispatch, "_built", {})
    monkeypatch.setattr(libraries, "load", lambda name: pytest.fail(f"{name} was asked for"))
    for op in set(dispatch.OPS) - {"linear"}:
        assert dispatch.choose(op, torch.device("cuda", 0), torch.float32, 64) == "triton"


def test_reasons_of_dtype_and_size(monkeypatch):
    monkeypatch.setattr(cuda, "_device_reason", lambda device_type, index: None)

    def why_not(op, dtype=torch.bfloat16, size=0):
        return kernels.why_not("cuda", op, torch.device("cuda", 0), dtype, size)

    assert why_not("gelu", torch.float64) == (
        "dtype torch.float64 is not one of float32, bfloat16, float16"
    )
    for op in ("attention", "decode_attention"):
        assert [why_not(op, size=D) for D in (8, 64, 128)] == [None] * 3
        for D in (4, 60, 136):
            assert why_not(op, size=D) == f"head size {D} is not a multiple of 8 up to 128"
    assert why_not("layer_norm", size=1_000_003) is None
