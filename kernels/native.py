"""Finds, builds and loads the native libraries: csrc/, compiled at its first use.

    native.load("cpu")     # None: torch.ops.gpt2_kernels_cpu is there; else the reason, one line
    native.load("cuda")    # the same of gpt2_kernels_cuda

A library is taken from the first of three places. It is opened once, its checksum is verified (a
truncated library would end the process), and what was verified is what is loaded:

  1. lib/ in this package: shipped in a wheel, built from the very sources beside it;
  2. the cache of this user, $GPT2_KERNELS_CACHE or ~/.cache/gpt2-kernels, which nobody else can
     write to, at any level (_private.py);
  3. built into that cache by _build.py.

    <cache>/cpu/lock                              held by the process that builds
    <cache>/cpu/tmp-x1y2/                         its work; without the lock it is a dead one's
    <cache>/cpu/<recipe>-torch2.13.0-<compiler>/  libgpt2_kernels_cpu.so, .json (its checksum) and
                                                  build.log; or failed.log, the compiler's own
                                                  error: load won't try again

An entry is renamed into place whole, and only its builder writes to its tmp folder: processes that
start together build once, and one that is killed leaves nothing that another would trust.
"""

import contextlib
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import torch

from . import _build, _cache, _private
from ._build import BuildError

SHIPPED = Path(__file__).parent / "lib"
KEEP = 16  # entries of a library in the cache: older sources, other torch versions
_reasons: dict[str, str | None] = {}
_loading = threading.Lock()


def _renew_lock() -> None:
    """A forked child lacks the thread that may have held the lock: it would wait for ever."""
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def load(name: str = "cpu") -> str | None:
    """None once the library is loaded, built first if need be; else the reason in one line.

    Decided once per process. Raises ValueError for an unknown name, and nothing that a machine
    without a compiler, a full disk or a damaged file could cause.
    """
    _check(name)
    if name not in _reasons:
        with _loading:
            if name not in _reasons:
                _reasons[name] = _load(name)
    return _reasons[name]


def build(name: str = "cpu", *, out: Path | None = None, force: bool = False) -> Path:
    """The library's file, in the cache or copied to the folder `out`; compiled if it must be.

    force compiles in any case; a build that failed is tried again without it. Raises BuildError
    with the compiler's first error and the path of its log.
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
        raise BuildError(_cache.one_line(error)) from error


def missing(name: str) -> str | None:
    """What load(name) would lack to build the library, in one line; None where it lacks nothing, or
    some library is there already. Neither loads nor builds, and looks at no device."""
    _check(name)
    if name in _reasons:
        return _reasons[name]
    try:
        _build.find_tools(_build.LIBRARIES[name])
        return None
    except BuildError as error:
        reason = str(error)
    with contextlib.suppress(BuildError, OSError):
        file = _file_name(name)
        if (SHIPPED / file).exists() or any(_cache.find_root().glob(f"{name}/*/{file}")):
            return None
    return reason


def unbuilt(name: str) -> str | None:
    """None where load(name) would compile nothing: the library is there, or its build has failed.
    Else how to build it, or what is missing for that, in one line. Neither loads nor builds."""
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
        return None  # load says what is wrong
    try:
        _build.find_tools(_build.LIBRARIES[name])
    except BuildError as error:
        return str(error)
    return f"not built: python -m gpt2.kernels build{_flag(name)}"


def _flag(name: str) -> str:
    """The option of `python -m gpt2.kernels build` for this library."""
    return "" if name == "cpu" else f" --{name}"


def _check(name: str) -> None:
    if name not in _build.LIBRARIES:
        raise ValueError(f"name must be one of {', '.join(_build.LIBRARIES)}, got {name!r}")


# Finding and loading


def _load(name: str) -> str | None:
    try:
        shipped = _shipped(name)
        if shipped is not None:
            reason = _open(shipped)
            if reason is None:
                return None
            _build.say(f"{reason}; not used")
        library = _cached(name)
        if library is None:
            _build_into_cache(name, force=False, retry=False)
            library = _cached(name)
        if library is None:
            raise BuildError("the library was changed as soon as it was built; start again")
        return _open(library)
    except (BuildError, ImportError, OSError) as error:
        return _cache.one_line(error)


def _open(library: _private.File) -> str | None:
    with library:
        try:
            library.load()
        except OSError as error:
            return f"{library.path} cannot be loaded: {_cache.one_line(error)}"
    torch.ops.loaded_libraries.add(str(library.path))
    return None


def _recipe(name: str) -> str:
    return _build.recipe(_build.LIBRARIES[name])


def _file_name(name: str) -> str:
    return f"libgpt2_kernels_{name}.so"


def _shipped(name: str) -> _private.File | None:
    return _cache.sound(SHIPPED / _file_name(name), _recipe(name))


# The cache


def _cached(name: str) -> _private.File | None:
    """A sound library in the cache, open: this compiler's, or any where there is no compiler."""
    folder, recipe = _cache.find_root() / name, _recipe(name)
    try:
        tools = _build.find_tools(_build.LIBRARIES[name])
        entries = [folder / _entry_name(recipe, _build.identity(tools))]
    except BuildError:
        entries = sorted(path for path in folder.glob(f"{recipe[:16]}-*")
                         if path.name.startswith(_entry_name(recipe, "")))  # fmt: skip
    found = (_cache.sound_entry(entry, _file_name(name), recipe) for entry in entries)
    return next((library for library in found if library is not None), None)


def _failed_before(name: str) -> bool:
    """Whether load(name) would find that this compiler has failed to build these sources."""
    try:
        compiler = _build.identity(_build.find_tools(_build.LIBRARIES[name]))
    except BuildError:
        return False
    entry = _cache.find_root() / name / _entry_name(_recipe(name), compiler)
    return _cache.failure(entry / "failed.log") is not None


def _entry_name(recipe: str, compiler: str) -> str:
    return f"{recipe[:16]}-torch{torch.__version__}-{compiler[:8]}"


def _build_into_cache(name: str, *, force: bool, retry: bool) -> Path:
    """Compiles the library into the cache, alone, unless another process has just done so."""
    library, recipe = _build.LIBRARIES[name], _recipe(name)
    tools = _build.find_tools(library)
    with _cache.work_folder(name, library.title) as work:
        entry = work.parent / _entry_name(recipe, _build.identity(tools))
        target, failed = entry / _file_name(name), entry / "failed.log"
        if not force and (found := _cache.sound_entry(entry, target.name, recipe)):
            with found:
                return target
        if not retry and (reason := _cache.failure(failed)):
            raise BuildError(reason)
        new = work / "entry"
        new.mkdir(mode=0o700)
        try:
            log = _build.run(library, tools, work, new / target.name)
        except _build.CompilerError as error:
            if not error.lasting:
                raise BuildError(f"{error} (the next start tries again)") from None
            again = f"python -m gpt2.kernels build{_flag(name)}"
            told = f"{error} (log: {failed}; to try again: {again})"
            _cache.write(work / "failed.log", f"{told}\n\n{error.log}"[: _cache.LOG_BYTES // 4])
            with _cache.opened(entry) as folder:
                if folder is None:  # missing, or not to be trusted
                    _cache.remove(entry)
                    entry.mkdir(mode=0o700)
            os.replace(work / "failed.log", failed)
            raise BuildError(told) from None
        _cache.flush(new / target.name)
        _cache.write(new / "build.log", log)
        with _private.open_file(new / target.name) as file:
            record = {"sha256": file.sha256(), "recipe": recipe}
        _cache.write(new / target.with_suffix(".json").name, json.dumps(record))
        for path in new.iterdir():
            path.chmod(path.stat().st_mode & ~0o022)  # whatever the umask
        _cache.flush(new)
        _cache.remove(entry)  # damaged, failed, or to be forced
        os.replace(new, entry)
        _cache.flush(entry.parent)
        _cache.forget_oldest(entry.parent, KEEP)
    return target


def _copy(library: Path, out: Path) -> Path:
    """Copies a library and its checksum to the folder out, each file at once."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out) as work:
        for path in (library, library.with_suffix(".json")):
            os.replace(shutil.copy(path, work), out / path.name)
    return out / library.name
