"""Files that are either whole or absent, whatever stops the program that writes them.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed; a
rename replaces the old file in one step, and flushing the folder makes that last.
"""

import os
from collections.abc import Callable
from pathlib import Path

from .errors import InputError

_MARK = ".tmp-"


def write_atomic(path: str | Path, content: str | Callable[[Path], None]) -> None:
    """Writes path whole: content is its text, or a function that writes the file it is given."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}{_MARK}{os.getpid()}")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def sweep(folder: str | Path) -> None:
    """Removes what killed writers left behind in folder."""
    for stray in Path(folder).glob(f".*{_MARK}*"):
        stray.unlink(missing_ok=True)


def check_new_folder(name: str, folder: str | Path) -> None:
    """Raises InputError unless folder can be made: it is new or empty, its parent is writable."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{name} must be a new or empty folder, got {str(folder)!r}")
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if _exists(p))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{name} must be a folder that can be written, got {str(folder)!r}")


def make_folder(name: str, folder: str | Path) -> None:
    """Makes folder and its parents. Raises InputError where that is not possible."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"{name} must be a folder that can be written, got {str(folder)!r} ({e.strerror})"
        ) from e


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # a name with a zero byte, or too long
        return False


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
