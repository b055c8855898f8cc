"""Opens folders and files of the native cache that only this user or root can have written.

A path is resolved once. Every folder on it is then opened relative to the one before, by descriptor
and without following links, and is checked while it is open:

  - It belongs to this user or to root.
  - Nobody else can write to it. Above the root of the cache, a sticky folder such as /tmp may be
    writable by all, because only the owner of an entry can rename it there. A group that contains
    only this user may write, as with the umask 002 of many systems, unless there is an access
    control list: then the group's bits are a limit for all users in the list.

A file is checked, read and loaded through one descriptor, so the file that runs is the checked one.
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

from .compiler import BuildError

MOST_BYTES = 2**30  # of a library; a larger file is not used
PATH_BYTES = 3000  # of the cache's path; the limit is 4096, including the names of built files
ACCOUNTS = Path("/etc/passwd")

_HINT = "set GPT2_KERNELS_CACHE to a folder of your own"


def _flags(*names: str) -> int:
    return sum(getattr(os, name, 0) for name in names)  # Windows has none of these, and no cache


NO_LINK = _flags("O_NOFOLLOW")
_FOLDER = NO_LINK | _flags("O_DIRECTORY", "O_PATH")
_FILE = NO_LINK | _flags("O_NONBLOCK")  # otherwise opening a FIFO would wait for a writer

_loads = itertools.count()
# by (device, inode), which are unique, because the files stay open
_loaded: dict[tuple[int, int], ctypes.CDLL] = {}
_loading = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    # A fork waits some milliseconds for another thread's load, because a half-loaded library would
    # be unusable in the child.
    os.register_at_fork(
        before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
    )


def resolve(path: str) -> Path:
    """The absolute path of the cache without links. Raises BuildError if a build cannot use it."""
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
    """A descriptor of a folder in the cache, given by its names below the root. None if it is
    missing.

    create makes missing folders, private to this user. Raises BuildError if somebody else could
    have written a folder on the way, before anything is created in it.
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
    """An open regular file. path is used for messages, and by load without /proc."""

    path: Path
    handle: int

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        os.close(self.handle)

    def read(self, most: int) -> bytes:
        """The content. Raises ValueError if it is longer than `most` bytes."""
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

    def load(self) -> ctypes.CDLL:
        """Loads the file into the process through the open descriptor. Raises OSError if that
        fails.

        A copy of the descriptor stays open, because debuggers read symbols through the same name.
        Without /proc, the path is loaded instead; nobody else can change the file there.
        """
        with _loading:
            status = os.fstat(self.handle)
            key = status.st_dev, status.st_ino
            if key in _loaded:
                return _loaded[key]
            handle = os.dup(self.handle)
            name = _name_for_loader(handle)
            if not _leads_to(name, handle):
                name = str(self.path)
            try:
                _loaded[key] = ctypes.CDLL(name)
            except OSError as error:
                os.close(handle)
                raise OSError(str(error).replace(name, str(self.path))) from error
            return _loaded[key]


def open_file(path: Path, folder: int | None = None) -> File:
    """Opens a regular file. With folder, the descriptor of its folder, the file must also belong to
    this user or root, and nobody else may be able to write to it. Raises OSError or BuildError."""
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
    """Whether the file has a POSIX access control list, or that cannot be ruled out."""
    if not hasattr(os, "getxattr"):
        return False  # macOS: its access control lists do not change the mode
    try:
        os.getxattr(f"/proc/self/fd/{handle}", "system.posix_acl_access")  # also with O_PATH
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.ENOTSUP)
    return True


def _is_own_group(gid: int) -> bool:
    """Whether the group has this user's name and no other member, like those that useradd makes."""
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
    """Whether another account of this machine has the group as its primary group, since a group
    does not list these members. Accounts of a directory service are not checked, because listing
    them may take minutes."""
    try:
        accounts = [line.split(":") for line in ACCOUNTS.read_text(errors="replace").splitlines()]
    except OSError:
        return False
    own = str(os.geteuid())
    return any(len(a) > 3 and a[3] == str(gid) and a[2] != own for a in accounts)


def _open_below(folder: int, name: str, level: Path, root: Path, *, create: bool) -> int | None:
    """A descriptor of the folder `level`. None if it is missing or not a folder, unless create."""
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
    """Raises BuildError if others could have changed what this folder holds."""
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
    """A path of the open file that no earlier load has used. The dynamic loader opens each name
    only once, and the system reuses the numbers of closed descriptors. So the bits of a counter are
    written as / and ./ in the path, which do not change its target."""
    bits = f"{next(_loads):032b}".replace("0", "/").replace("1", "./")
    return f"/proc/{os.getpid()}/fd/{bits}{handle}"


def _leads_to(name: str, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(name), os.fstat(handle))
    except OSError:
        return False
