"""Finds, builds and loads the native libraries: csrc/, compiled at its first use.

    libraries.load("cpu")   # loads torch.ops.gpt2_kernels_cpu; returns None, or the reason if not
    libraries.load("cuda")  # the same for gpt2_kernels_cuda
    libraries.load("replay")  # csrc/replay, which recording.py uses

A library comes from the first of three places that has it:

  1. lib/ in this package: shipped in a wheel, if built from the same sources as csrc;
  2. the cache of this user, $GPT2_KERNELS_CACHE or ~/.cache/gpt2-kernels; nobody else may be able
     to write to any folder on its path (trust.py);
  3. a new build into that cache by compiler.py.

Its checksum is verified first, because loading a truncated library would crash the process. The
file is opened only once, so the verified file is the one that is loaded.

    <cache>/cpu/lock                              held by the process that builds
    <cache>/cpu/tmp-x1y2/                         its work; without the lock, left by a dead process
    <cache>/cpu/<recipe>-torch2.13.0-<compiler>/  libgpt2_kernels_cpu.so, .json (its checksum) and
                                                  build.log; or failed.log, with an error in the
                                                  sources: load does not try again

A complete entry is renamed into place, and only its builder writes to its tmp folder. So processes
that start together build once, and a killed process leaves nothing that another would load.
"""

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import torch

from . import build_cache, compiler, recipes, trust
from .compiler import BuildError

SHIPPED = Path(__file__).parents[1] / "lib"
KEEP = 16  # entries per library in the cache: older sources, other torch versions
_reasons: dict[str, str | None] = {}
_handles: dict[str, ctypes.CDLL] = {}  # by file name
_loading = threading.Lock()


def _renew_lock() -> None:
    """Replaces the lock in a forked child. The thread that may have held it does not exist there,
    so the child would wait forever."""
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def load(name: str = "cpu") -> str | None:
    """Loads the library, and builds it first if necessary. Returns None, or the reason in one line
    if that fails.

    The result is decided once per process. Raises ValueError for an unknown name; a missing
    compiler, a full disk or a damaged file never raises.
    """
    _check(name)
    if name not in _reasons:
        with _loading:
            if name not in _reasons:
                _reasons[name] = _load(name)
    return _reasons[name]


def decided(name: str) -> bool:
    """Whether load(name) has its result."""
    return name in _reasons


def python_function(name: str, function: str):
    """A function of a loaded library that takes one Python object and returns one."""
    found = getattr(ctypes.PyDLL(None, handle=_handles[_file_name(name)]._handle), function)
    found.argtypes, found.restype = [ctypes.py_object], ctypes.py_object
    return found


def build(name: str = "cpu", *, out: Path | None = None, force: bool = False) -> Path:
    """The library's file in the cache, or its copy in the folder `out`. Compiles it if necessary.

    A build that failed before is tried again. force also compiles a library that is already built.
    Raises BuildError with the compiler's first error and the path of its log.
    """
    _check(name)
    try:
        if b"\0" in os.fsencode(out or ""):
            raise BuildError(f"out must be the path of a folder, got {str(out)!r:.200}")
    except UnicodeEncodeError as error:
        raise BuildError(f"out must be the path of a folder, got {str(out)!a:.200}") from error
    try:
        cached = None if force else _cached(name)
        if cached is None:
            library = _build_into_cache(name, force=force, retry=True)
        else:
            with cached:
                library = cached.path
        return library if out is None else _copy(library, Path(out))
    except OSError as error:
        raise BuildError(build_cache.one_line(error)) from error


def missing(name: str) -> str | None:
    """The build tools that load(name) would lack, in one line. None if it lacks none, or if a
    library exists already. Neither loads nor builds, and touches no device."""
    _check(name)
    if name in _reasons:
        return _reasons[name]
    try:
        compiler.find_tools(recipes.LIBRARIES[name])
        return None
    except BuildError as error:
        reason = str(error)
    with contextlib.suppress(BuildError, OSError):
        file = _file_name(name)
        if (SHIPPED / file).exists() or any(build_cache.find_root().glob(f"{name}/*/{file}")):
            return None
    return reason


def unbuilt(name: str) -> str | None:
    """The command that builds a library which load(name) would have to compile, or what is missing
    to build it, in one line. None if it is built, or its build has failed before. Neither loads nor
    builds."""
    _check(name)
    if name in _reasons:
        return None
    try:
        found = _shipped(name) or _cached(name)
        if found is not None:
            with found:
                return None
        if _failed_before(name):
            return None
    except (BuildError, OSError):
        return None  # load reports the error
    try:
        compiler.find_tools(recipes.LIBRARIES[name])
    except BuildError as error:
        return str(error)
    return f"not built: python -m gpt2.kernels build{_flag(name)}"


def _flag(name: str) -> str:
    """The option of `python -m gpt2.kernels build` for this library."""
    return "" if name == "cpu" else f" --{name}"


def _check(name: str) -> None:
    if name not in recipes.LIBRARIES:
        raise ValueError(f"name must be one of {', '.join(recipes.LIBRARIES)}, got {name!r}")


# Finding and loading


def _load(name: str) -> str | None:
    try:
        shipped = _shipped(name)
        if shipped is not None:
            reason = _open(shipped)
            if reason is None:
                return None
            compiler.say(f"{reason}; not used")
        library = _cached(name)
        if library is None:
            _build_into_cache(name, force=False, retry=False)
            library = _cached(name)
        if library is None:
            raise BuildError("the library was changed as soon as it was built; start again")
        return _open(library)
    except (BuildError, ImportError, OSError) as error:
        return build_cache.one_line(error)


def _open(library: trust.File) -> str | None:
    with library:
        try:
            _handles[library.path.name] = library.load()
        except OSError as error:
            return f"{library.path} cannot be loaded: {build_cache.one_line(error)}"
    torch.ops.loaded_libraries.add(str(library.path))
    return None


def _recipe(name: str) -> str:
    return compiler.recipe(recipes.LIBRARIES[name])


def _file_name(name: str) -> str:
    return f"libgpt2_kernels_{name}.so"


def _shipped(name: str) -> trust.File | None:
    return build_cache.sound(SHIPPED / _file_name(name), _recipe(name))


# The cache


def _cached(name: str) -> trust.File | None:
    """An intact library in the cache, opened: this compiler's, or any if there is no compiler."""
    folder, recipe = build_cache.find_root() / name, _recipe(name)
    try:
        tools = compiler.find_tools(recipes.LIBRARIES[name])
        entries = [folder / _entry_name(recipe, compiler.identity(tools))]
    except BuildError:
        entries = sorted(path for path in folder.glob(f"{recipe[:16]}-*")
                         if path.name.startswith(_entry_name(recipe, "")))  # fmt: skip
    found = (build_cache.sound_entry(entry, _file_name(name), recipe) for entry in entries)
    return next((library for library in found if library is not None), None)


def _failed_before(name: str) -> bool:
    """Whether the cache records that this compiler failed to build these sources."""
    try:
        identity = compiler.identity(compiler.find_tools(recipes.LIBRARIES[name]))
    except BuildError:
        return False
    entry = build_cache.find_root() / name / _entry_name(_recipe(name), identity)
    return build_cache.failure(entry / "failed.log") is not None


def _entry_name(recipe: str, identity: str) -> str:
    return f"{recipe[:16]}-torch{torch.__version__}-{identity[:8]}"


def _build_into_cache(name: str, *, force: bool, retry: bool) -> Path:
    """Compiles the library into the cache under the lock, unless another process has just done
    so."""
    library, recipe = recipes.LIBRARIES[name], _recipe(name)
    tools = compiler.find_tools(library)
    with build_cache.work_folder(name, library.title) as work:
        entry = work.parent / _entry_name(recipe, compiler.identity(tools))
        target, failed = entry / _file_name(name), entry / "failed.log"
        if not force and (found := build_cache.sound_entry(entry, target.name, recipe)):
            with found:
                return target
        if not retry and (reason := build_cache.failure(failed)):
            raise BuildError(reason)
        new = work / "entry"
        new.mkdir(mode=0o700)
        try:
            log = compiler.run(library, tools, work, new / target.name)
        except compiler.CompilerError as error:
            if not error.lasting:
                raise BuildError(f"{error} (the next start tries again)") from None
            again = f"python -m gpt2.kernels build{_flag(name)}"
            told = f"{error} (log: {failed}; to try again: {again})"
            build_cache.write(
                work / "failed.log", f"{told}\n\n{error.log}"[: build_cache.LOG_BYTES // 4]
            )
            with build_cache.opened(entry) as folder:
                if folder is None:  # missing, or not trusted
                    build_cache.remove(entry)
                    entry.mkdir(mode=0o700)
            os.replace(work / "failed.log", failed)
            raise BuildError(told) from None
        build_cache.flush(new / target.name)
        build_cache.write(new / "build.log", log)
        with trust.open_file(new / target.name) as file:
            record = {"sha256": file.sha256(), "recipe": recipe}
        build_cache.write(new / target.with_suffix(".json").name, json.dumps(record))
        for path in new.iterdir():
            path.chmod(path.stat().st_mode & ~0o022)  # regardless of the umask
        build_cache.flush(new)
        build_cache.remove(entry)  # an entry that is damaged, failed, or replaced by force
        os.replace(new, entry)
        build_cache.flush(entry.parent)
        build_cache.forget_oldest(entry.parent, KEEP)
    return target


def _copy(library: Path, out: Path) -> Path:
    """Copies a library and its checksum to the folder out, each file atomically."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out) as work:
        for path in (library, library.with_suffix(".json")):
            os.replace(shutil.copy(path, work), out / path.name)
    return out / library.name
