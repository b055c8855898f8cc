"""Finds, builds and loads the native libraries: csrc/, compiled at its first use.

    native.load("cpu")     # None: torch.ops.gpt2_kernels_cpu is there; else the reason, one line
    native.load("cuda")    # the same of gpt2_kernels_cuda

A library is taken from the first of three places, and its checksum is verified before it is loaded
(a truncated one would end the process):

  1. lib/ in this package: shipped in a wheel, built from the very sources beside it;
  2. the cache of this user, $GPT2_KERNELS_CACHE or ~/.cache/gpt2-kernels, private to them;
  3. built into that cache by _build.py.

    <cache>/cpu/lock                              held by the process that builds
    <cache>/cpu/tmp-x1y2/                         its work; without the lock it is a dead one's
    <cache>/cpu/<recipe>-torch2.13.0-<compiler>/  libgpt2_kernels_cpu.so, .json (its checksum) and
                                                  build.log; or failed.log: load won't try again

An entry is renamed into place whole, and only its builder writes to its tmp folder: processes that
start together build once, and one that is killed leaves nothing that another would trust.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import torch

from . import _build
from ._build import BuildError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SHIPPED = Path(__file__).parent / "lib"
KEEP = 16  # entries of a library in the cache: older sources, other torch versions

_reasons: dict[str, str | None] = {}
_loading = threading.Lock()


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
        cached = None if force else _cached(name)
        library = cached or _build_into_cache(name, force=force, retry=True)
        return library if out is None else _copy(library, Path(out))
    except OSError as error:
        raise BuildError(_one_line(error)) from error


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
        if (SHIPPED / file).exists() or any(_cache_folder().glob(f"{name}/*/{file}")):
            return None
    return reason


def unbuilt(name: str) -> str | None:
    """None where load(name) would compile nothing: the library is there, or its build has failed.
    Else how to build it, or what is missing for that, in one line. Neither loads nor builds."""
    _check(name)
    if name in _reasons:
        return None
    try:
        shipped = SHIPPED / _file_name(name)
        if _is_sound(shipped, _recipe(name)) or _cached(name) or _failed_before(name):
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
        shipped = SHIPPED / _file_name(name)
        if _is_sound(shipped, _recipe(name)):
            reason = _open(shipped)
            if reason is None:
                return None
            _build.say(f"{reason}; not used")
        return _open(_cached(name) or _build_into_cache(name, force=False, retry=False))
    except (BuildError, ImportError, OSError) as error:
        return _one_line(error)


def _open(library: Path) -> str | None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} cannot be loaded: {_one_line(error.__cause__ or error)}"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _recipe(name: str) -> str:
    return _build.recipe(_build.LIBRARIES[name])


def _file_name(name: str) -> str:
    return f"libgpt2_kernels_{name}.so"


def _is_sound(library: Path, recipe: str) -> bool:
    """Whether the file is there, whole, and of this recipe; if it is merely there, says so."""
    if not library.exists():
        return False
    try:
        record = json.loads(library.with_suffix(".json").read_bytes())
        if record["recipe"] != recipe:
            flaw = "was built from other sources or flags"
        elif record["sha256"] != _sha256(library):
            flaw = "is damaged, its checksum differs"
        else:
            return True
    except (OSError, ValueError, KeyError, TypeError) as error:
        flaw = f"has no valid checksum ({_one_line(error)})"
    _build.say(f"{library} {flaw}; not used")
    return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The cache


def _cached(name: str) -> Path | None:
    """A sound library in the cache: this compiler's, or any where there is no compiler."""
    folder, recipe = _cache_folder() / name, _recipe(name)
    try:
        tools = _build.find_tools(_build.LIBRARIES[name])
        entries = [folder / _entry_name(recipe, _build.identity(tools))]
    except BuildError:
        entries = sorted(path for path in folder.glob(f"{recipe[:16]}-*")
                         if path.name.startswith(_entry_name(recipe, "")))  # fmt: skip
    libraries = (entry / _file_name(name) for entry in entries)
    return next((library for library in libraries if _is_sound(library, recipe)), None)


def _failed_before(name: str) -> bool:
    """Whether load(name) would find that this compiler has failed to build these sources."""
    try:
        compiler = _build.identity(_build.find_tools(_build.LIBRARIES[name]))
    except BuildError:
        return False
    return (_cache_folder() / name / _entry_name(_recipe(name), compiler) / "failed.log").exists()


def _entry_name(recipe: str, compiler: str) -> str:
    return f"{recipe[:16]}-torch{torch.__version__}-{compiler[:8]}"


def _cache_folder(*, create: bool = False) -> Path:
    """The root of this user's cache. BuildError where somebody else could write to it."""
    if fcntl is None:
        raise BuildError("needs Linux or macOS")
    chosen, xdg = os.environ.get("GPT2_KERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    base = xdg if os.path.isabs(xdg) else os.path.expanduser("~/.cache")
    if not chosen and not os.path.isabs(base):
        raise BuildError("there is no home folder for a cache; set GPT2_KERNELS_CACHE")
    root = Path(chosen or f"{base}/gpt2-kernels").absolute()
    if create:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not root.exists():
        return root
    stat = root.stat()
    if stat.st_uid != os.geteuid():
        raise BuildError(
            f"the cache {root} belongs to user {stat.st_uid}, not to {os.geteuid()} who runs this; "
            f"set GPT2_KERNELS_CACHE to a folder of your own"
        )
    if stat.st_mode & 0o022:
        raise BuildError(f"others can write to the cache {root}; chmod go-w {root}")
    return root


def _build_into_cache(name: str, *, force: bool, retry: bool) -> Path:
    """Compiles the library into the cache, alone, unless another process has just done so."""
    library, recipe = _build.LIBRARIES[name], _recipe(name)
    tools = _build.find_tools(library)
    with _work_folder(name, library.title) as work:
        entry = work.parent / _entry_name(recipe, _build.identity(tools))
        target, failed = entry / _file_name(name), entry / "failed.log"
        if not force and _is_sound(target, recipe):
            return target
        if not retry and failed.exists():
            raise BuildError(failed.read_text().partition("\n")[0])
        new = work / "entry"
        new.mkdir()
        try:
            log = _build.run(library, tools, work, new / target.name)
        except _build.CompilerError as error:
            again = f"python -m gpt2.kernels build{_flag(name)}"
            told = f"{error} (log: {failed}; to try again: {again})"
            entry.mkdir(exist_ok=True)
            _write(work / "failed.log", f"{told}\n\n{error.log}")
            os.replace(work / "failed.log", failed)
            raise BuildError(told) from None
        _flush(new / target.name)
        _write(new / "build.log", log)
        record = {"sha256": _sha256(new / target.name), "recipe": recipe}
        _write(new / target.with_suffix(".json").name, json.dumps(record))
        _flush(new)
        if entry.exists():  # damaged, failed, or to be forced
            shutil.rmtree(entry)
        os.replace(new, entry)
        _flush(entry.parent)
        _forget_oldest(entry.parent)
    return target


@contextlib.contextmanager
def _work_folder(name: str, title: str):
    """A folder of our own in the cache, while no other process has one; dead ones' are swept."""
    with contextlib.ExitStack() as stack:
        try:
            folder = _cache_folder(create=True) / name
            folder.mkdir(mode=0o700, exist_ok=True)
            stack.enter_context(_locked(folder / "lock", title))
            for stray in folder.glob("tmp-*"):
                shutil.rmtree(stray, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
        except OSError as error:
            raise BuildError(
                f"the cache cannot be written ({_one_line(error)}); "
                f"set GPT2_KERNELS_CACHE to a folder that can"
            ) from error
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        yield work


@contextlib.contextmanager
def _locked(path: Path, title: str):
    """Holds the lock; the system takes it back from a process that dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _build.say(f"another process is building {title}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        fcntl.flock(handle, fcntl.LOCK_UN)  # also for a child that was forked meanwhile
    finally:
        os.close(handle)


def _forget_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*-torch*"), key=lambda entry: entry.stat().st_mtime)
    for entry in entries[:-KEEP]:
        shutil.rmtree(entry, ignore_errors=True)


def _copy(library: Path, out: Path) -> Path:
    """Copies a library and its checksum to the folder out, each file at once."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out) as work:
        for path in (library, library.with_suffix(".json")):
            os.replace(shutil.copy(path, work), out / path.name)
    return out / library.name


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
