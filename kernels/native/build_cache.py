"""The cache of built libraries: its place, the checks before reading, and the lock for writing.

libraries.py describes the layout. Every file is opened through trust.py, so only this user or root
can have written it. A file that is damaged or not trusted is treated as missing, with a message.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import compiler, trust
from .compiler import BuildError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RECORD_BYTES, LOG_BYTES = 2**12, 2**24  # most bytes read from a library's .json and failed.log
_locks: set[int] = set()  # descriptors of the locks that this process holds


def find_root(*, create: bool = False) -> Path:
    """The root of this user's cache. Raises BuildError if somebody else can write to it."""
    if fcntl is None:
        raise BuildError("needs Linux or macOS")
    chosen, xdg = os.environ.get("GPT2_KERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    base = xdg if os.path.isabs(xdg) else os.path.expanduser("~/.cache")
    if not chosen and not os.path.isabs(base):
        raise BuildError("there is no home folder for a cache; set GPT2_KERNELS_CACHE")
    path = os.path.expanduser(chosen or f"{base}/gpt2-kernels")
    if path.startswith("~"):
        raise BuildError(f"the cache {path!r:.200} is in no known home; set GPT2_KERNELS_CACHE")
    root = trust.resolve(path)
    handle = trust.open_folder(root, create=create)
    if handle is not None:
        os.close(handle)
    return root


def one_line(said: object) -> str:
    """The text of `said` as one printable line. Escapes paths that are not UTF-8."""
    return " ".join(str(said).encode(errors="backslashreplace").decode().split())


def sound(library: Path, recipe: str, folder: int | None = None) -> trust.File | None:
    """The opened library if it is intact and of this recipe, else None. Prints the reason if the
    file exists but is not used. folder is a descriptor of its folder in the cache."""
    try:
        file = trust.open_file(library, folder)
    except FileNotFoundError:
        return None
    except (BuildError, OSError) as error:
        compiler.say(f"{one_line(error)}; not used")
        return None
    try:
        with trust.open_file(library.with_suffix(".json"), folder) as record_file:
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
        compiler.say(f"{library} {flaw}; not used")
    return None


def sound_entry(entry: Path, file: str, recipe: str) -> trust.File | None:
    """The opened library `file` in an entry of the cache, or None (see sound)."""
    with opened(entry) as folder:
        return None if folder is None else sound(entry / file, recipe, folder)


@contextlib.contextmanager
def opened(entry: Path) -> Iterator[int | None]:
    """A descriptor of an entry of the cache, or None if it is missing. If somebody else could have
    written it, it is reported and treated as missing."""
    handle = None
    try:
        root = entry.parent.parent
        library = trust.open_folder(root, entry.parent.name)
        if library is not None:
            os.close(library)
            try:
                handle = trust.open_folder(root, entry.parent.name, entry.name)
            except BuildError as error:
                compiler.say(f"{one_line(error)}; not used")
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def failure(log: Path) -> str | None:
    """The first line of failed.log. None if there is no trusted log, or if a retry may succeed."""
    with opened(log.parent) as folder:
        if folder is None:
            return None
        try:
            with trust.open_file(log, folder) as file:
                content = file.read(LOG_BYTES).decode(errors="replace")
        except (BuildError, OSError, ValueError):
            return None
    told, _, said = content.partition("\n")
    return told if compiler.is_lasting(said, log.parents[1]) else None


@contextlib.contextmanager
def work_folder(name: str, title: str) -> Iterator[Path]:
    """A temporary folder in the cache. Holds the lock, so that one process builds at a time, and
    first removes the folders of dead processes."""
    with contextlib.ExitStack() as stack:
        try:
            root = find_root(create=True)
            os.close(trust.open_folder(root, name, create=True))
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
    """Holds the lock on path. The system releases it if the process dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | trust.NO_LINK, 0o600)
    _locks.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            compiler.say(f"another process is building {title}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        _locks.discard(handle)
        os.close(handle)


def _drop_locks() -> None:
    """Closes the parent's locks in a forked child, which would otherwise keep them after the parent
    is killed."""
    for handle in _locks:
        os.close(handle)
    _locks.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_drop_locks)


def forget_oldest(folder: Path, keep: int) -> None:
    """Removes all entries of a library except the `keep` newest."""
    entries = sorted(folder.glob("*-torch*"), key=lambda entry: entry.lstat().st_mtime)
    for entry in entries[:-keep]:
        with contextlib.suppress(OSError):
            remove(entry)


def remove(entry: Path) -> None:
    """Removes an entry of the cache, whether it is a folder, a file or a link."""
    if not entry.is_dir() or entry.is_symlink():
        entry.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(entry)
    except RecursionError:
        _remove_deep(entry)


def _remove_deep(entry: Path) -> None:
    """Removes a folder that nests too deeply for shutil.rmtree: each inner folder is moved up."""
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
    path.chmod(0o600)  # regardless of the umask
    flush(path)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
