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
        temporary.touch()
        mode = temporary.stat().st_mode
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(temporary)
        temporary.chmod(mode)  # what any new file here gets; safetensors' are private
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
    """Raises InputError unless folder is new or empty, and can be made as far as one can see."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{name} must be a new or empty folder, got {str(folder)!r}")
    _check_writable(name, folder)


def check_new_file(name: str, path: str | Path) -> None:
    """Raises InputError unless path is new, in a folder that is there and can be written."""
    path = Path(path)
    if os.path.lexists(path) or not path.absolute().parent.is_dir():
        raise InputError(f"{name} must be a new file in an existing folder, got {str(path)!r}")
    _check_writable(name, path.absolute().parent)


def make_folder(name: str, folder: str | Path) -> None:
    """Makes folder and its parents. Raises InputError where that is not possible."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"{name} must be a folder that can be written, got {str(folder)!r} ({e.strerror})"
        ) from e


def _check_writable(name: str, folder: Path) -> None:
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{name} must be a folder that can be written, got {str(folder)!r}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
