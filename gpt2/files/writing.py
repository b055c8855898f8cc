"""Writes files atomically: a file is complete or absent, whatever stops the program.

A file is written in a temporary folder next to its place, flushed to the disk, and renamed. The
rename replaces the old file atomically, and flushing the folder makes it durable. A killed writer
leaves only the temporary folder behind, including files that a library wrote there.

A full disk becomes a WriteError that names the file.
"""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import InputError, WriteError, brief, quoted
from . import lock

_MARK = ".tmp-"
# Errors of the disk. None: NumPy's tofile gives no number.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, None}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A context in which a full or broken disk raises WriteError for path. Other errors pass
    through."""
    try:
        yield
    except OSError as e:
        if isinstance(e, WriteError) or e.errno not in FULL:
            raise
        raise WriteError(path, e.strerror or brief(e)) from e
    except SafetensorError as e:
        if "os error" not in str(e):
            raise
        raise WriteError(path, re.sub(r".*error: | \(os error \d+\)", "", brief(e))) from e


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to path, whose content is to be renamed to path. Creates path's
    parent folder if it is missing."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
    try:
        yield work
    except WriteError as e:
        if work not in Path(e.path).parents:
            raise
        _, *below = Path(e.path).relative_to(work).parts  # the first part becomes path
        raise WriteError(path.joinpath(*below), e.reason) from e
    finally:
        shutil.rmtree(work)


def write_atomic(path: str | Path, content: str | Callable[[Path], None]) -> None:
    """Writes path atomically. content is the text, or a function that writes to the path that it is
    given."""
    path = Path(path)
    with writing(path), work_folder(path) as work:
        temporary = work / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(temporary)
        temporary.chmod(mode)  # a new file's usual mode; safetensors creates private files
        _flush(temporary)
        os.replace(temporary, path)
    _flush(path.parent)


def identity(folder: str | Path) -> tuple[int, int] | None:
    """Device and inode of a folder, to recognize it later; None if there is no folder."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


def sweep(folder: str | Path) -> None:
    """Removes the temporary folders of killed writers."""
    for stray in Path(folder).glob(f".*{_MARK}*"):
        if stray.is_dir() and not stray.is_symlink():  # no writer leaves anything else
            _remove_folder(stray)


def _remove_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except RecursionError:  # Python 3.12 and older remove a folder by recursion
        raise InputError(f"folder {quoted(folder)} nests too deeply to be removed") from None


def check_new_folder(name: str, folder: str | Path) -> None:
    """Raises InputError unless folder is new or empty, and appears to be writable."""
    check_name(name, folder)
    folder = Path(folder)
    if folder.is_dir() and any(path.name != lock.FILE for path in folder.iterdir()):
        raise InputError(f"{name} must be a new or empty folder, got {quoted(folder)}")
    _check_writable(name, folder)


def check_new(name: str, path: str | Path) -> None:
    """Raises InputError unless path is new, and its folder appears to be writable."""
    check_name(name, path)
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise InputError(f"{name} must be new, got {quoted(path)}, which exists")
    _check_writable(name, path.parent)


def check_name(name: str, path: str | Path) -> None:
    """Raises InputError, naming the argument, for an impossible path: one with NUL or half a
    surrogate pair, or one that is too long."""
    try:
        os.lstat(path)
    except ValueError:  # UnicodeEncodeError is one
        raise InputError(
            f"{name} must be a path without NUL, in characters that the system can encode, "
            f"got {quoted(path)}"
        ) from None
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            raise InputError(f"{name} {quoted(path)}: {e.strerror}") from None


def make_folder(name: str, folder: str | Path) -> None:
    """Creates folder and its parents. Raises InputError if that is not possible."""
    check_name(name, folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"{name} must be a folder that can be written, got {quoted(folder)} ({e.strerror})"
        ) from e


def _check_writable(name: str, folder: Path) -> None:
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{name} must be a folder that can be written, got {quoted(folder)}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
