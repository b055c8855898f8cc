"""Folders and files that only this user and root can have written: what the native cache trusts.

A path is resolved once. Every folder on the way is then opened from the one before it, by
descriptor and without following links, and is checked while it is open:

  - it belongs to this user or to root;
  - nobody else can write to it; above the root of the cache a sticky folder such as /tmp may be
    written by all, because only its owner can rename what lies in it. A group of this user alone,
    whose umask is 002 on many systems, is nobody else, unless an access control list is there:
    the group's bits are then the most that any user of the list has.

A file is checked, read and loaded through one descriptor, so what runs is what was checked.
"""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ._build import BuildError

MOST_BYTES = 2**30  # of a library: a larger file is none
PATH_BYTES = 3000  # of the cache; the system takes 4096, the names of what is built among them
ACCOUNTS = Path("/etc/passwd")

_HINT = "set GPT2_KERNELS_CACHE to a folder of your own"


def _flags(*names: str) -> int:
    return sum(getattr(os, name, 0) for name in names)  # Windows has none of them, and no cache


NO_LINK = _flags("O_NOFOLLOW")
_FOLDER = NO_LINK | _flags("O_DIRECTORY", "O_PATH")
_FILE = NO_LINK | _flags("O_NONBLOCK")  # without it, a FIFO would wait for a writer

_loads = itertools.count()
_loaded: set[tuple[int, int]] = set()  # device and inode, which no other file gets meanwhile
_loading = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    # A fork waits for the load of another thread, some milliseconds: half a library is of no use.
    os.register_at_fork(
        before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
    )


def resolve(path: str) -> Path:
    """The absolute path of the cache without links. BuildError where no build could use it."""
    if any(sign in path for sign in "|\n\r"):
        raise BuildError(f"the cache {path!r:.200} has | or a line break in its path; {_HINT}")
    try:
        resolved = Path(os.path.realpath(path, strict=False))
    except (OSError, ValueError) as error:
        raise BuildError(f"the cache {path!r:.200} cannot be used ({error}); {_HINT}") from error
    if any(sign in str(resolved) for sign in "|\n\r"):
        raise BuildError(
            f"the cache {path!r:.200} leads to {str(resolved)!r:.200}, with | or a line break"
        )
    if (length := len(os.fsencode(resolved))) > PATH_BYTES:
        raise BuildError(
            f"the cache {path[:60]!r}... has a path of {length} bytes, "
            f"more than {PATH_BYTES}; {_HINT}"
        )
    return resolved


def open_folder(root: Path, *names: str, create: bool = False) -> int | None:
    """A descriptor of a folder of the cache, some levels below its root or the root itself. None
    where it is missing.

    create makes what is missing, private to this user. Raises BuildError for a folder that
    somebody else could have written, before anything is made in it.
    """
    handle, level = os.open("/", _FOLDER), Path("/")
    try:
        _check_folder(handle, level, root)
        for name in (*root.parts[1:], *names):
            level /= name
            found = _open_below(handle, name, level, root, create=create)
            if found is None:
                os.close(handle)
                return None
            os.close(handle)
            handle = found
            _check_folder(handle, level, root)
    except BaseException:
        os.close(handle)
        raise
    return handle


@dataclass(frozen=True)
class File:
    """An open regular file. path is only its name in messages."""

    path: Path
    handle: int

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        os.close(self.handle)

    def read(self, most: int) -> bytes:
        """The content. ValueError where it is longer than `most` bytes."""
        content = b""
        for chunk in self._chunks(most):
            content += chunk
        return content

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks(MOST_BYTES):
            digest.update(chunk)
        return digest.hexdigest()

    def _chunks(self, most: int) -> Iterator[bytes]:
        start = 0
        while chunk := os.pread(self.handle, 1 << 20, start):
            start += len(chunk)
            if start > most:
                raise ValueError(f"more than {most} bytes")
            yield chunk

    def load(self) -> None:
        """Loads it into the process, through the open descriptor. OSError where that fails.

        A copy of the descriptor stays open: debuggers read symbols through the same name. Without
        /proc the path is loaded; nobody else can change what lies there.
        """
        with _loading:
            status = os.fstat(self.handle)
            if (status.st_dev, status.st_ino) in _loaded:
                return
            handle = os.dup(self.handle)
            name = _name_for_loader(handle)
            if not _leads_to(name, handle):
                name = str(self.path)
            try:
                ctypes.CDLL(name)
            except OSError as error:
                os.close(handle)
                raise OSError(str(error).replace(name, str(self.path))) from error
            _loaded.add((status.st_dev, status.st_ino))


def open_file(path: Path, folder: int | None = None) -> File:
    """Opens a regular file. With the descriptor of its folder, only this user's or root's, to which
    nobody else can write. Raises OSError or BuildError."""
    handle = os.open(path if folder is None else path.name, _FILE, dir_fd=folder)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BuildError(f"{path} is not a regular file")
        if folder is not None:
            if status.st_uid not in (0, os.geteuid()):
                raise BuildError(f"{path} belongs to user {status.st_uid}")
            if others_can_write(handle):
                raise BuildError(f"others can write to {path}")
    except BaseException:
        os.close(handle)
        raise
    return File(path, handle)


def others_can_write(handle: int) -> bool:
    status = os.fstat(handle)
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    return _has_access_list(handle) or not _is_own_group(status.st_gid)


def _has_access_list(handle: int) -> bool:
    """Whether a POSIX access control list is there, or cannot be ruled out."""
    if not hasattr(os, "getxattr"):
        return False  # macOS: its lists leave the mode as it is
    try:
        os.getxattr(f"/proc/self/fd/{handle}", "system.posix_acl_access")  # also with O_PATH
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.ENOTSUP)
    return True


def _is_own_group(gid: int) -> bool:
    """Whether the group has this user's name and no other member, as useradd makes one."""
    try:
        import grp
        import pwd

        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except (ImportError, KeyError):
        return False
    return (
        user.pw_gid == gid
        and group.gr_name == user.pw_name
        and {*group.gr_mem} <= {user.pw_name}
        and not _is_group_of_others(gid)
    )


def _is_group_of_others(gid: int) -> bool:
    """Whether another account of this machine has the group as its first: the group does not list
    those. Accounts of a directory service are not asked for; to list them may take minutes."""
    try:
        accounts = [line.split(":") for line in ACCOUNTS.read_text(errors="replace").splitlines()]
    except OSError:
        return False
    own = str(os.geteuid())
    return any(len(a) > 3 and a[3] == str(gid) and a[2] != own for a in accounts)


def _open_below(folder: int, name: str, level: Path, root: Path, *, create: bool) -> int | None:
    """A descriptor of the folder `level`; None where it is none and none is to be made."""
    try:
        try:
            return os.open(name, _FOLDER, dir_fd=folder)
        except FileNotFoundError:
            if not create:
                return None
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(name, 0o700, dir_fd=folder)
        return os.open(name, _FOLDER, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            if level.is_symlink():
                raise BuildError(
                    f"the cache has a symbolic link at {level}, which is not followed"
                ) from error
            if not create:
                return None
        path = root if level in root.parents else level
        raise OSError(error.errno, error.strerror, str(path)) from error


def _check_folder(handle: int, level: Path, root: Path) -> None:
    """Raises BuildError where others could have changed what this folder holds."""
    status, above = os.fstat(handle), level in root.parents
    which = f"{level}, which holds the cache {root}" if above else f"the cache {level}"
    if status.st_uid not in (0, os.geteuid()):
        raise BuildError(
            f"{which}{',' if above else ''} belongs to user {status.st_uid}, "
            f"not to {os.geteuid()} who runs this; {_HINT}"
        )
    sticky = above and status.st_mode & stat.S_ISVTX
    if not sticky and others_can_write(handle):
        raise BuildError(f"others can write to {which}; chmod go-w {level}")


def _name_for_loader(handle: int) -> str:
    """A path of the open file that no load has had before: the dynamic loader opens no name twice,
    and the system gives the number of a closed descriptor to the next one. The bits of a counter
    become / and ./, which lead nowhere."""
    bits = f"{next(_loads):032b}".replace("0", "/").replace("1", "./")
    return f"/proc/{os.getpid()}/fd/{bits}{handle}"


def _leads_to(name: str, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(name), os.fstat(handle))
    except OSError:
        return False
