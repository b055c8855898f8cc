"""The folder that keeps built libraries: where it is, what in it can be trusted, who writes to it.

native.py gives the layout. Whatever is read here is opened by _private.py, so nobody else can have
written it; a file that is damaged, or that cannot be trusted, counts as missing and is named.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import _build, _private
from ._build import BuildError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RECORD_BYTES, LOG_BYTES = 2**12, 2**24  # most that is read of a library's .json, of failed.log
_locks: set[int] = set()  # descriptors of the locks that this process holds


def find_root(*, create: bool = False) -> Path:
    """The root of this user's cache. BuildError where somebody else could write to it."""
    if fcntl is None:
        raise BuildError("needs Linux or macOS")
    chosen, xdg = os.environ.get("GPT2_KERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    base = xdg if os.path.isabs(xdg) else os.path.expanduser("~/.cache")
    if not chosen and not os.path.isabs(base):
        raise BuildError("there is no home folder for a cache; set GPT2_KERNELS_CACHE")
    path = os.path.expanduser(chosen or f"{base}/gpt2-kernels")
    if path.startswith("~"):
        raise BuildError(f"the cache {path!r:.200} is in no known home; set GPT2_KERNELS_CACHE")
    root = _private.resolve(path)
    handle = _private.open_folder(root, create=create)
    if handle is not None:
        os.close(handle)
    return root


def one_line(said: object) -> str:
    """Its text in one line that can be printed: a path need not be UTF-8."""
    return " ".join(str(said).encode(errors="backslashreplace").decode().split())


def sound(library: Path, recipe: str, folder: int | None = None) -> _private.File | None:
    """The library, open, where it is whole and of this recipe. Says why not where it is merely
    there. folder is a descriptor of its folder in the cache."""
    try:
        file = _private.open_file(library, folder)
    except FileNotFoundError:
        return None
    except (BuildError, OSError) as error:
        _build.say(f"{one_line(error)}; not used")
        return None
    try:
        with _private.open_file(library.with_suffix(".json"), folder) as record_file:
            record = json.loads(record_file.read(RECORD_BYTES))
        if record["recipe"] != recipe:
            flaw = "was built from other sources or flags"
        elif record["sha256"] != file.sha256():
            flaw = "is damaged, its checksum differs"
        else:
            return file
    except (BuildError, OSError, ValueError, KeyError, TypeError) as error:
        flaw = f"has no valid checksum ({one_line(error)})"
    except RecursionError:
        flaw = "has no valid checksum (its record nests too deeply)"
    with file:
        _build.say(f"{library} {flaw}; not used")
    return None


def sound_entry(entry: Path, file: str, recipe: str) -> _private.File | None:
    """The library of this name in an entry, open, where sound finds no flaw."""
    with opened(entry) as folder:
        return None if folder is None else sound(entry / file, recipe, folder)


@contextlib.contextmanager
def opened(entry: Path) -> Iterator[int | None]:
    """A descriptor of an entry of the cache; None where it is missing. One that somebody else could
    have written is named and counts as missing."""
    handle = None
    try:
        root = entry.parent.parent
        library = _private.open_folder(root, entry.parent.name)
        if library is not None:
            os.close(library)
            try:
                handle = _private.open_folder(root, entry.parent.name, entry.name)
            except BuildError as error:
                _build.say(f"{one_line(error)}; not used")
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def failure(log: Path) -> str | None:
    """The first line of failed.log; None without one that can be trusted, and where another try may
    succeed."""
    with opened(log.parent) as folder:
        if folder is None:
            return None
        try:
            with _private.open_file(log, folder) as file:
                content = file.read(LOG_BYTES).decode(errors="replace")
        except (BuildError, OSError, ValueError):
            return None
    told, _, said = content.partition("\n")
    return told if _build.is_lasting(said, log.parents[1]) else None


@contextlib.contextmanager
def work_folder(name: str, title: str) -> Iterator[Path]:
    """A folder of our own in the cache, while no other process has one; dead ones' are swept."""
    with contextlib.ExitStack() as stack:
        try:
            root = find_root(create=True)
            os.close(_private.open_folder(root, name, create=True))
            folder = root / name
            stack.enter_context(locked(folder / "lock", title))
            for stray in folder.glob("tmp-*"):
                with contextlib.suppress(OSError):
                    remove(stray)
            work = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
        except OSError as error:
            raise BuildError(
                f"the cache cannot be written ({one_line(error)}); "
                f"set GPT2_KERNELS_CACHE to a folder that can"
            ) from error
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        yield work


@contextlib.contextmanager
def locked(path: Path, title: str) -> Iterator[None]:
    """Holds the lock; the system takes it back from a process that dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _private.NO_LINK, 0o600)
    _locks.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _build.say(f"another process is building {title}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        _locks.discard(handle)
        os.close(handle)


def _drop_locks() -> None:
    """A forked child holds no lock of its parent's: it would outlive a parent that is killed."""
    for handle in _locks:
        os.close(handle)
    _locks.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_drop_locks)


def forget_oldest(folder: Path, keep: int) -> None:
    """Removes all entries of a library but the newest."""
    entries = sorted(folder.glob("*-torch*"), key=lambda entry: entry.lstat().st_mtime)
    for entry in entries[:-keep]:
        with contextlib.suppress(OSError):
            remove(entry)


def remove(entry: Path) -> None:
    """Removes an entry of the cache, or whatever has its name."""
    if not entry.is_dir() or entry.is_symlink():
        entry.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(entry)
    except RecursionError:
        _remove_deep(entry)


def _remove_deep(entry: Path) -> None:
    """Removes a folder whose folders nest too deeply for shutil.rmtree: each is moved up first."""
    top = Path(tempfile.mkdtemp(prefix="tmp-", dir=entry.parent))
    names = map(str, itertools.count())
    folders = [entry.rename(top / next(names))]
    while folders:
        folder = folders.pop()
        for path in list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                folders.append(path.rename(top / next(names)))
            else:
                path.unlink()
        folder.rmdir()
    top.rmdir()


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")
    path.chmod(0o600)  # whatever the umask
    flush(path)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
