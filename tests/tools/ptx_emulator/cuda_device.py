"""Runs host code compiled by nvcc, with the emulator as its GPU.

    with EmulatedDevice() as device:
        library = device.load("libkernels.so", [ptx_text])  # linked with -cudart none and build()
        x = torch.empty(1000)           # known to the device, full of the canary
        library.run(x.data_ptr(), ...)  # its <<<>>> runs the PTX

device.cpp replaces libcudart and the allocator of CPU tensors. After a finding the launch returns
cudaErrorLaunchFailure with the finding's text; device.findings also keeps it.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils import cpp_extension

from .findings import Finding, Findings
from .launch import Launch, launch
from .memory import Memory
from .parser import Module

# Symbols are looked up first in the library itself and its dependencies (DEEPBIND). A PyTorch built
# for CUDA has loaded libcudart globally; without DEEPBIND its functions would be called.
# AddressSanitizer does not allow DEEPBIND.
SANITIZED = hasattr(ctypes.CDLL(None), "__asan_init")
MODE = ctypes.RTLD_GLOBAL | (0 if SANITIZED else os.RTLD_DEEPBIND)
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
SOURCE = Path(__file__).with_name("device.cpp")

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t,
)  # fmt: skip


@functools.cache
def build() -> Path:
    """Compiles device.cpp as a library at its first use, for this compiler and torch."""
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [
        *shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-O1", "-fPIC", "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in cpp_extension.include_paths()),
        str(SOURCE), f"-L{torch_lib}", "-lc10", f"-Wl,-rpath,{torch_lib}",
    ]  # fmt: skip
    key = hashlib.sha256(repr((command, torch.__version__)).encode() + SOURCE.read_bytes())
    cache = os.environ.get("GPT2_KERNELS_CACHE") or Path.home() / ".cache" / "gpt2-kernels"
    cache = Path(cache) / "emulator"
    library = cache / f"device-{key.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            output = Path(folder) / "device.so"
            result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")
            output.replace(library)
    return library


@functools.cache
def _runtime() -> ctypes.CDLL:
    runtime = ctypes.CDLL(str(build()), mode=MODE)
    runtime.emulator_activate.argtypes = [_Callback]
    runtime.emulator_fail.argtypes = [ctypes.c_char_p]
    runtime.emulator_allow.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
    runtime.emulator_forbid.argtypes = [ctypes.c_uint64]
    runtime.emulator_allocations.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    runtime.emulator_allocations.restype = ctypes.c_size_t
    return runtime


_texts: dict[str, str] = {}  # kernel -> PTX, of all loaded libraries


def load(library: str | os.PathLike, ptx: list[str]) -> ctypes.CDLL:
    """Loads host code that was linked with -cudart none and the runtime from build(). ptx is the
    PTX of its kernels; each is parsed at its first launch."""
    _runtime()
    for text in ptx:
        _texts.update(dict.fromkeys(re.findall(r"\.entry\s+([\w$]+)", text), text))
    return ctypes.CDLL(str(library), mode=MODE)


_parsed = functools.cache(Module)


class EmulatedDevice:
    """While active, launches run on the emulator, and CPU tensors are allocated by it."""

    def __init__(self, canary: bool = True, banks: bool = False):
        self.canary, self.banks = canary, banks
        self.findings: list[Finding] = []
        self.launches: list[Launch] = []
        self.error: Exception | None = None  # of the last launch, of any type
        self.allowed = []

    load = staticmethod(load)

    def __enter__(self):
        self.runtime = _runtime()
        self.callback = _Callback(self._launch)  # kept alive while C may call it
        self.runtime.emulator_activate(self.callback)
        return self

    def __exit__(self, *exc):
        self.runtime.emulator_deactivate()
        for x in self.allowed:
            self.runtime.emulator_forbid(_extent(x)[0])
        self.allowed.clear()

    def allow(self, *arrays):
        """Makes existing tensors and numpy arrays accessible to launches."""
        for x in arrays:
            self.runtime.emulator_allow(*_extent(x))
            self.allowed.append(x)

    @contextlib.contextmanager
    def allowing(self, *arrays):
        """A context in which these are accessible too."""
        for x in arrays:
            self.runtime.emulator_allow(*_extent(x))
        try:
            yield
        finally:
            for x in arrays:
                self.runtime.emulator_forbid(_extent(x)[0])

    def memory(self) -> Memory:
        """All live allocations."""
        room = 64
        while True:
            pairs = np.empty((room, 2), np.uint64)
            count = self.runtime.emulator_allocations(pairs.ctypes.data, room)
            if count <= room:
                return Memory(pairs[:count].tolist())
            room = 2 * count

    def _launch(self, name, grid, block, args, shared):
        """Called from C: no exception may leave it."""
        try:
            module = _parsed(_texts[name.decode()])
            kernel = module.kernels[name.decode()]
            params = bytearray()
            for i, param in enumerate(kernel.params):
                params += bytes(param.offset - len(params))
                params += ctypes.string_at(args[i], param.nbytes)
            options = {"canary": self.canary, "banks": self.banks}
            self.launches.append(
                launch(
                    module,
                    kernel.name,
                    grid[:3],
                    block[:3],
                    bytes(params),
                    self.memory(),
                    shared,
                    **options,
                )
            )
            return 0
        except Exception as error:
            if isinstance(error, Findings):
                self.findings += error.findings
            self.error = error
            self.runtime.emulator_fail(f"{type(error).__name__}: {error}".encode())
            return LAUNCH_FAILURE


def _extent(x):
    if hasattr(x, "untyped_storage"):
        return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
    return x.ctypes.data, x.nbytes
