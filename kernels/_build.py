"""Compiles csrc: which sources, which flags, which compiler; ninja runs them.

One binary serves every Python and every torch >= 2.10: it uses LibTorch's stable ABI alone, and
finds libtorch by name among the libraries that the process has already loaded, so that no path of
torch is in it. Only the sources named for an instruction set get its flags; cpu/library.cpp asks
the processor at run time. To build the CUDA library takes nvcc, but no GPU, and no torch for one.
"""

import contextlib
import hashlib
import os
import platform
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _log, _nvcc

CSRC = Path(__file__).parent.parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")  # asked in this order, where $CXX is not set
X86_64 = platform.machine().lower() in ("x86_64", "amd64")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns of its own intrinsics
)


@dataclass(frozen=True)
class Library:
    title: str  # as progress lines name it
    sources: dict[str, tuple[str, ...]]  # pattern under csrc -> flags of its own; slowest first
    headers: tuple[str, ...]  # what they include, as patterns under csrc
    flags: tuple[str, ...] = ()  # of every source
    link: tuple[str, ...] = ("-ltorch_cpu",)
    nvcc: tuple[str, ...] = ()  # flags of every source in CUDA; with any, nvcc compiles and links
    gencode: tuple[str, ...] = ()  # the GPUs it is for; none: this machine's
    # Libraries that are loaded before it is, but perhaps not there where it is built, and the
    # function that it calls of each: for the linker a stand-in takes their place.
    borrowed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Tools:
    """The commands that compile a library."""

    cxx: list[str]
    nvcc: str | None = None


# The operators of both libraries.
_OPERATORS = tuple(
    f"ops/{op}.cpp"
    for op in ("attention", "cross_entropy", "decode_attention", "gelu", "layer_norm")
)
_CPU_OPERATORS = (*_OPERATORS, "ops/decode_layers.cpp", "ops/linear.cpp", "cpu/library.cpp")
_SOURCES = {
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
        sources=_SOURCES if X86_64 else _PORTABLE,
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
}

# No -ffast-math, not even for linking: the library would turn denormals off in the whole process.
# -ffp-contract=off: a fused multiply-add stands in the source or is none, so that every instruction
# set rounds alike.
_COMPILE = (
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
)
# No --use_fast_math, for the same reasons: denormals, divisions and exp keep their digits.
_NVCC = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
_OPTIMIZE = ("-O3",)
_SANITIZE = (
    *("-O1", "-g1", "-fno-omit-frame-pointer"),  # -g: half as long again to compile
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
)


class BuildError(RuntimeError):
    """A library cannot be built or cached; the message is one line that a person can act on."""


class CompilerError(BuildError):
    """The compiler has failed. lasting: it will again with the same sources and flags."""

    def __init__(self, message: str, log: str, cache: Path):
        super().__init__(message)
        self.log, self.lasting = log, is_lasting(log, cache)


def is_lasting(log: str, cache: Path) -> bool:
    """Whether the compiler will fail again; cache is the library's folder there."""
    return _log.is_lasting(log, cache, CSRC, Path(torch.__file__).parent)


def recipe(library: Library) -> str:
    """Hash of all that decides what the library does: the bytes of its sources, flags, platform."""
    settled = (sys.platform, platform.machine(), *_COMPILE, *_link_flags(library), *_level(library))
    if library.nvcc:
        settled += (*_NVCC, *_gencode(library))
    digest = hashlib.sha256(repr((settled, library)).encode())
    headers = {name for pattern in library.headers for name in _files(pattern)}
    for name in sorted(headers.union(_sources(library))):
        content = (CSRC / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def find_compiler() -> list[str]:
    """$CXX (with its arguments, where it has some), else the first of COMPILERS on PATH."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        try:
            command = shlex.split(chosen)
        except ValueError:  # a quotation mark without its twin
            command = [chosen]
        if shutil.which(command[0]) is None:
            raise BuildError(f"no C++ compiler: CXX is {chosen!r}, which cannot be run")
        return command
    found = next(filter(shutil.which, COMPILERS), None)
    if found is None:
        raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on PATH; set CXX")
    return [found]


def find_tools(library: Library) -> Tools:
    """What compiles this library; BuildError names what is missing and how to get it."""
    finders = {"cxx": find_compiler, "nvcc": find_nvcc} if library.nvcc else {"cxx": find_compiler}
    found, missing = {}, []
    for name, find in finders.items():
        try:
            found[name] = find()
        except BuildError as error:
            missing.append(str(error))
    if missing:
        raise BuildError("; ".join(missing))
    return Tools(**found)


def find_nvcc() -> str:
    found = _nvcc.find()
    if found is None:
        chosen = os.environ.get("NVCC", "").strip()
        raise BuildError(
            f"no nvcc: NVCC is {chosen!r}, which cannot be run" if chosen else _nvcc.MISSING
        )
    return found


def identity(tools: Tools) -> str:
    """Hash of which programs these are, by path, size and date: cheap, as no process is started."""
    commands = [*tools.cxx, *filter(None, [tools.nvcc])]
    parts: list[object] = [commands]
    for program in filter(None, map(shutil.which, commands)):
        stat = os.stat(program)
        parts.append((os.path.realpath(program), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def run(library: Library, tools: Tools, work: Path, output: Path) -> str:
    """Compiles library to the file output, with all by-products in the folder work.

    Returns the log; CompilerError has it where the compiler fails.
    """
    ninja = _find_ninja()
    commands = _ninja_file(library, tools, work, output)
    (work / "build.ninja").write_bytes(os.fsencode(commands))  # paths need not be UTF-8
    before, start = recipe(library), time.monotonic()
    # Compilers need neither a taste in progress lines nor a sanitizer's runtime.
    inherited = {k: v for k, v in os.environ.items() if k not in ("NINJA_STATUS", "LD_PRELOAD")}
    # A builder that is killed leaves ninja alone with a pipe that nobody reads: it ends with the
    # first line it prints, and nothing that it or its compilers wrote is ever looked at.
    process = subprocess.Popen(
        [*ninja, "-f", str(work / "build.ninja")],
        cwd=CSRC, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=inherited,
    )  # fmt: skip
    try:
        log = _follow(process, library, start)
    except BaseException:
        process.terminate()  # ninja ends its compilers, too
        process.wait()
        raise
    if process.returncode != 0 or not output.exists():
        compiler = "nvcc" if library.nvcc else "the C++ compiler"
        raise CompilerError(f"{compiler} failed: {_log.first_error(log)}", log, work.parent)
    if recipe(library) != before:
        raise BuildError("the sources changed while they were compiled; start again")
    say(f"built {library.title} in {time.monotonic() - start:.0f} s")
    return log


def say(text: str, end: str = "\n") -> None:
    """One line for the person at the terminal."""
    _show(f"gpt2-kernels: {text}{end}")


def _show(text: str) -> None:
    """Writes to stderr, where that is possible: no build fails because nobody can watch it."""
    with contextlib.suppress(OSError, ValueError):  # full or broken; closed
        if sys.stderr is not None:
            print(text, end="", file=sys.stderr, flush=True)


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def _files(pattern: str) -> list[str]:
    return sorted(path.relative_to(CSRC).as_posix() for path in CSRC.glob(pattern))


def _sources(library: Library) -> dict[str, tuple[str, ...]]:
    """Each source file of the library, and the flags of its own."""
    found = {}
    for pattern, flags in library.sources.items():
        files = _files(pattern)
        if not files:
            raise BuildError(f"the source file {CSRC / pattern} is missing")
        found.update(dict.fromkeys(files, flags))
    return found


def _find_ninja() -> list[str]:
    if found := shutil.which("ninja"):
        return [found]
    try:
        import ninja  # noqa: F401  the package: its program need not be on PATH
    except ImportError:
        raise BuildError("ninja is missing: pip install ninja") from None
    return [sys.executable, "-m", "ninja"]


def _level(library: Library) -> tuple[str, ...]:
    """How far to optimise; with GPT2_KERNELS_SANITIZE=1 a CPU watches memory and sums instead."""
    sanitized = os.environ.get("GPT2_KERNELS_SANITIZE") == "1" and not library.nvcc
    return _SANITIZE if sanitized else _OPTIMIZE


def _link_flags(library: Library) -> tuple[str, ...]:
    # What stays undefined is an error here, not when the library is loaded. Sanitizers leave their
    # own functions to the program.
    strict = sys.platform == "linux" and _level(library) is _OPTIMIZE
    defs = ("-Xlinker", "-zdefs") if library.nvcc else ("-Wl,-z,defs",)
    return ("-shared", *library.link, *(defs if strict else ()))


def _gencode(library: Library) -> tuple[str, ...]:
    try:
        return library.gencode or _nvcc.architectures()
    except ValueError as error:
        raise BuildError(str(error)) from error


def _ninja_file(library: Library, tools: Tools, work: Path, output: Path) -> str:
    """Every command in full. Sources are named relative to csrc, where ninja runs: a path of this
    machine comes into the binary by no __FILE__."""
    root = Path(torch.__file__).parent
    cxx = [*tools.cxx, *_COMPILE, *_level(library), *library.flags]
    cxx += ["-isystem", str(root / "include"), f"-ffile-prefix-map={root}=torch"]
    linker = [*tools.cxx, *_level(library)]
    if library.nvcc:
        program, *arguments = tools.cxx
        host = ["-ccbin", program, *(f"-Xcompiler={argument}" for argument in arguments)]
        nvcc = [tools.nvcc, *host, *_NVCC, *library.flags, *library.nvcc, *_gencode(library)]
        linker = [tools.nvcc, *host, *library.nvcc, "-nodlink"]  # no calls between .cu files
    lines = [f"builddir = {_escape(str(work))}", "rule run", "  command = $run", ""]

    def step(target: Path, inputs: list[str], command: list[str]) -> None:
        names = " ".join(map(_escape_path, inputs))
        lines.append(f"build {_escape_path(str(target))}: run {names}")
        lines.append(f"  run = {_escape(shlex.join(map(str, command)))}")

    objects = []
    for source, own in _sources(library).items():
        target = work / f"{source.replace('/', '-')}.o"
        compiler = nvcc if source.endswith(".cu") else cxx
        step(target, [source], [*compiler, *own, "-c", source, "-o", target])
        objects.append(str(target))
    for name, function in library.borrowed:
        source, target = work / f"{name}.cpp", work / name
        source.write_text(f'extern "C" void {function}() {{}}\n')
        command = [*tools.cxx, "-shared", "-fPIC", f"-Wl,-soname,{name}", source, "-o", target]
        step(target, [str(source)], command)
        objects.append(str(target))
    link = [*linker, *objects, f"-L{root / 'lib'}", *_link_flags(library), "-o", output]
    step(output, objects, link)
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    if re.search(r"[\n\r]", text):
        raise BuildError(f"ninja cannot run a command with a line break: {text!r:.200}")
    return text.replace("$", "$$")


def _escape_path(path: str) -> str:
    if re.search(r"[|\n\r]", path):
        raise BuildError(f"ninja cannot use a path with | or a line break: {path!r:.200}")
    return re.sub(r"[$ :]", r"$\g<0>", path)


def _follow(process: subprocess.Popen, library: Library, start: float) -> str:
    """Reads ninja's output to its end; a terminal shows each second how far it is."""
    live = _is_terminal()
    files, log = len(_sources(library)), b""
    if not live:
        say(f"building {library.title}, once ({files} files)…")
    while True:
        if live:
            done = max(map(int, re.findall(rb"^\[(\d+)/\d+\]", log, re.M)), default=0)
            took = f"{min(done, files)}/{files} files, {time.monotonic() - start:.0f} s"
            say(f"building {library.title}, once ({took})…", end="\r")
        if select.select([process.stdout], [], [], 1)[0]:
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            log += chunk
    process.wait()
    process.stdout.close()
    if live:
        _show("\x1b[K")
    return log.decode(errors="replace")
