"""Locks the folder of a run, so that one process at a time writes it.

The lock is a flock on the file .lock in the folder. The system releases it when its process ends,
even by a kill, so a .lock that was left behind locks nothing. A .lock that is a link or a second
name of another file is refused and left unchanged.
"""

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, brief, quoted

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None

FILE = ".lock"
_ONLY_HERE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_said: set[str] = set()


@contextmanager
def held(name: str, folder: str | Path) -> Iterator[None]:
    """Locks an existing folder inside the with block.

    Raises InputError, beginning with name, if another process holds the lock or the folder cannot
    be written. On a file system without locks, prints one line to stderr and goes on without one.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / FILE
    handle = _locked(name, path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if _is_still(path, handle):  # another folder may have taken the name of a moved one
            path.unlink(missing_ok=True)  # before the lock is released
        os.close(handle)


def check_free(name: str, folder: str | Path) -> None:
    """Raises InputError, as held does, if another process holds the lock now. Writes nothing."""
    path = Path(folder) / FILE
    if fcntl is None or not os.path.lexists(path):
        return
    try:
        handle = os.open(path, os.O_RDONLY | _ONLY_HERE)
    except OSError as e:
        _check_no_link(name, path, e)
        return  # it has just been removed, or held will report the error
    try:
        _check_own(name, path, os.fstat(handle))
        _lock(name, path, handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _locked(name: str, path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _ONLY_HERE, 0o666)
        except OSError as e:
            _check_no_link(name, path, e)
            raise InputError(
                f"{name} must be a folder that can be written, got {quoted(path.parent)} "
                f"({e.strerror})"
            ) from e
        try:
            _check_own(name, path, os.fstat(handle))
            _lock(name, path, handle, fcntl.LOCK_EX)
            if _is_still(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _check_no_link(name: str, path: Path, error: OSError) -> None:
    if error.errno == errno.ELOOP:
        _refuse(name, path, "a link")


def _check_own(name: str, path: Path, found: os.stat_result) -> None:
    """Raises InputError if writing the file would change something outside the folder."""
    if not stat.S_ISREG(found.st_mode):
        _refuse(name, path, "no regular file")
    if found.st_nlink > 1:
        _refuse(name, path, "a second name of another file")


def _refuse(name: str, path: Path, kind: str) -> None:
    raise InputError(
        f"{name} must be a folder with a {FILE} of its own or none, got {quoted(path)}, "
        f"which is {kind}; remove it"
    )


def _is_still(path: Path, handle: int) -> bool:
    """Whether path is still the locked file. The previous holder may have removed that file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _lock(name: str, path: Path, handle: int, how: int) -> None:
    folder = str(path.parent)
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = brief(os.pread(handle, 100, 0).decode(errors="replace")) or "that is not known"
        raise InputError(
            f"{name} must be a folder that no other process trains in, got {folder!r}, "
            f"which process {holder} has"
        ) from None
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        if folder not in _said:
            _said.add(folder)
            print(
                f"gpt2: {folder!r} cannot be locked ({e.strerror}): let one process alone train "
                f"in it",
                file=sys.stderr,
            )
