"""Compiles csrc (recipes.py) with the machine's compiler and ninja.

The CUDA library needs nvcc, but neither a GPU nor a torch that supports one.
"""

import atexit
import contextlib
import hashlib
import itertools
import os
import platform
import re
import select
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import build_log, cuda_toolkit
from .recipes import COMPILE, NVCC, OPTIMIZE, SANITIZE, STABLE, Library

CSRC = Path(__file__).parents[2] / "csrc"
COMPILERS = ("c++", "g++", "clang++")  # tried in this order if $CXX is not set


@dataclass(frozen=True)
class Tools:
    """The commands that compile a library."""

    cxx: list[str]
    nvcc: str | None = None


_running: set[subprocess.Popen] = set()


@atexit.register
def _end_compilers() -> None:
    """A build that another thread has started ends with the process; a later one begins anew."""
    for process in list(_running):
        process.terminate()  # ninja ends its compilers, too


class BuildError(RuntimeError):
    """A library cannot be built or cached. The message is one line that says what to do."""


class CompilerError(BuildError):
    """The compiler has failed. lasting says whether it would fail again with the same input."""

    def __init__(self, message: str, log: str, cache: Path):
        super().__init__(message)
        self.log, self.lasting = log, is_lasting(log, cache)


def is_lasting(log: str, cache: Path) -> bool:
    """Whether the compiler would fail again. cache is the library's folder in the cache."""
    return build_log.is_lasting(log, cache, CSRC, Path(torch.__file__).parent)


def recipe(library: Library) -> str:
    """The hash of everything that determines the library: its sources, flags and platform."""
    settled = (sys.platform, platform.machine(), *COMPILE, *_link_flags(library), *_level(library))
    settled += STABLE if library.stable else (sys.implementation.cache_tag,)
    if library.nvcc:
        settled += (*NVCC, *_gencode(library))
    digest = hashlib.sha256(repr((settled, library)).encode())
    headers = {name for pattern in library.headers for name in _files(pattern)}
    for name in sorted(headers.union(_sources(library))):
        content = (CSRC / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, which may have arguments, else the first of COMPILERS
    on PATH. Raises BuildError if there is none."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        try:
            command = shlex.split(chosen)
        except ValueError:  # an unmatched quotation mark
            command = [chosen]
        if shutil.which(command[0]) is None:
            raise BuildError(f"no C++ compiler: CXX is {chosen!r}, which cannot be run")
        return command
    found = next(filter(shutil.which, COMPILERS), None)
    if found is None:
        raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on PATH; set CXX")
    return [found]


def find_tools(library: Library) -> Tools:
    """The tools that compile this library. Raises BuildError that names what is missing and how to
    get it."""
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
    found = cuda_toolkit.find()
    if found is None:
        chosen = os.environ.get("NVCC", "").strip()
        raise BuildError(
            f"no nvcc: NVCC is {chosen!r}, which cannot be run" if chosen else cuda_toolkit.MISSING
        )
    return found


def identity(tools: Tools) -> str:
    """The hash of the compilers' paths, sizes and dates. This is cheap: no process is started."""
    commands = [*tools.cxx, *filter(None, [tools.nvcc])]
    parts: list[object] = [commands]
    for program in filter(None, map(shutil.which, commands)):
        stat = os.stat(program)
        parts.append((os.path.realpath(program), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def run(library: Library, tools: Tools, work: Path, output: Path) -> str:
    """Compiles library into the file output, with intermediate files in the folder work.

    Returns the log. Raises CompilerError, which also has the log, if the compiler fails.
    """
    ninja = _find_ninja()
    commands = _ninja_file(library, tools, work, output)
    (work / "build.ninja").write_bytes(os.fsencode(commands))  # paths need not be UTF-8
    before, start = recipe(library), time.monotonic()
    # NINJA_STATUS would change the progress lines; LD_PRELOAD may be a sanitizer's runtime.
    inherited = {k: v for k, v in os.environ.items() if k not in ("NINJA_STATUS", "LD_PRELOAD")}
    # If this process is killed, ninja ends at the first line that it prints, because nobody reads
    # the pipe. Its output files are never used.
    process = subprocess.Popen(
        [*ninja, "-f", str(work / "build.ninja")],
        cwd=CSRC, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=inherited,
    )  # fmt: skip
    _running.add(process)
    try:
        log = _follow(process, library, start)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        _running.discard(process)
    if process.returncode != 0 or not output.exists():
        compiler = "nvcc" if library.nvcc else "the C++ compiler"
        raise CompilerError(f"{compiler} failed: {build_log.first_error(log)}", log, work.parent)
    if recipe(library) != before:
        raise BuildError("the sources changed while they were compiled; start again")
    if not library.quiet:
        say(f"built {library.title} in {time.monotonic() - start:.0f} s")
    return log


def say(text: str, end: str = "\n") -> None:
    """One line for the person at the terminal."""
    _show(f"gpt2-kernels: {text}{end}")


def _show(text: str) -> None:
    """Writes to stderr, and ignores errors, so that a build does not fail because of them."""
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
    """The source files of the library, each with its extra flags."""
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
        import ninja  # noqa: F401  the package, whose program need not be on PATH
    except ImportError:
        raise BuildError("ninja is missing: pip install ninja") from None
    return [sys.executable, "-m", "ninja"]


def _level(library: Library) -> tuple[str, ...]:
    """The optimization flags; for the CPU library with GPT2_KERNELS_SANITIZE=1, the sanitizers'."""
    sanitized = os.environ.get("GPT2_KERNELS_SANITIZE") == "1" and library.stable
    sanitized = sanitized and not library.nvcc
    return SANITIZE if sanitized else OPTIMIZE


def _link_flags(library: Library) -> tuple[str, ...]:
    flags = []
    if sys.platform == "linux":
        # A compiler may link libstdc++ statically. Beside the process's own, a visible second one
        # fails: a message with a number in it ended the process.
        flags.append("--exclude-libs=ALL")
        # Sanitizers and Python leave their own symbols undefined.
        if _level(library) is OPTIMIZE and library.stable:
            flags.append("-zdefs")  # reports undefined symbols now, not when the library is loaded
    pairs = (("-Xlinker", flag) for flag in flags)
    return ("-shared", *library.link, *itertools.chain.from_iterable(pairs))


def _gencode(library: Library) -> tuple[str, ...]:
    try:
        return library.gencode or cuda_toolkit.architectures()
    except ValueError as error:
        raise BuildError(str(error)) from error


def _ninja_file(library: Library, tools: Tools, work: Path, output: Path) -> str:
    """The content of build.ninja, with every command in full. Sources are named relative to csrc,
    where ninja runs, so that __FILE__ puts no path of this machine into the binary."""
    root = Path(torch.__file__).parent
    cxx = [*tools.cxx, *COMPILE, *_level(library), *library.flags]
    cxx += ["-isystem", str(root / "include"), f"-ffile-prefix-map={root}=torch"]
    if library.stable:
        cxx += STABLE
    else:
        python = sysconfig.get_path("include")
        cxx += ["-isystem", str(root / "include/torch/csrc/api/include"), "-isystem", python]
    linker = [*tools.cxx, *_level(library)]
    if library.nvcc:
        program, *arguments = tools.cxx
        host = ["-ccbin", program, *(f"-Xcompiler={argument}" for argument in arguments)]
        nvcc = [
            tools.nvcc,
            *host,
            *NVCC,
            *STABLE,
            *library.flags,
            *library.nvcc,
            *_gencode(library),
        ]
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
    """Reads ninja's output to its end, and returns it. On a terminal, shows the progress every
    second."""
    live = _is_terminal() and not library.quiet
    files, log = len(_sources(library)), b""
    if not live and not library.quiet:
        say(f"building {library.title}, once ({files} file{'s' * (files > 1)})…")
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
