"""Files that are either whole or absent, whatever stops the program that writes them.

A file is written in a temporary folder beside its place, flushed to the disk, and renamed; a rename
replaces the old file in one step, and flushing its folder makes that last. What is left of a killed
writer lies in the temporary folder, also what a library writes there under names of its own.
"""

import codecs
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import lock
from .errors import InputError, WriteError, brief
from .writing import writing

_MARK = ".tmp-"


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside path, for what is to become path by a rename; path's folder is made
    where there is none."""
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
    """Writes path whole: content is its text, or a function that writes the file it is given."""
    path = Path(path)
    with writing(path), work_folder(path) as work:
        temporary = work / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(temporary)
        temporary.chmod(mode)  # what any new file here gets; safetensors' are private
        _flush(temporary)
        os.replace(temporary, path)
    _flush(path.parent)


def sweep(folder: str | Path) -> None:
    """Removes what killed writers left behind in folder."""
    for stray in Path(folder).glob(f".*{_MARK}*"):
        shutil.rmtree(stray)


def check_new_folder(name: str, folder: str | Path) -> None:
    """Raises InputError unless folder is new or empty, and can be made as far as one can see."""
    folder = Path(folder)
    if folder.is_dir() and any(path.name != lock.FILE for path in folder.iterdir()):
        raise InputError(f"{name} must be a new or empty folder, got {str(folder)!r}")
    _check_writable(name, folder)


def check_new(name: str, path: str | Path) -> None:
    """Raises InputError unless path is new, and its folder can be written or made as far as one can
    see."""
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise InputError(f"{name} must be new, got {str(path)!r}, which exists")
    _check_writable(name, path.parent)


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


def read_lines(name: str, path: str | Path) -> list[str]:
    """The lines of a text in UTF-8; - is standard input. They end in \\n or \\r\\n alone: in JSON
    others are characters. A byte order mark is dropped. Raises InputError, beginning with name, for
    what cannot be read, with the number of the line."""
    lines = lines_of(name, path)
    return [decode_line(name, path, number, line) for number, line in enumerate(lines, 1)]


def lines_of(name: str, path: str | Path) -> list[bytes]:
    """The same lines, not yet decoded."""
    try:
        text = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{name} {str(path)!r} cannot be read: {e.strerror}") from e
    lines = text.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1])]


def decode_line(name: str, path: str | Path, number: int, line: bytes) -> str:
    """The text of a line. Raises InputError, naming file and line, where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as e:
        got = f"{line[e.start]:#04x} at byte {e.start} of the line"
        raise InputError(f"{name} {str(path)!r}, line {number} must be UTF-8, got {got}") from None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_json(text: str) -> Any:
    """What text says in JSON. Raises ValueError for anything else: NaN, a key twice in an object,
    and what is nested too deeply to be read, too."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(what: str, path: Path, most: int) -> dict[str, Any]:
    """The object in JSON that a file of at most `most` bytes holds. Raises InputError, beginning
    with what, for anything else."""
    try:
        size = path.stat().st_size
        if size > most:
            raise ValueError(f"at most {most} bytes are read, got {size}")
        found = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"an object is expected, got {type(found).__name__}")
        return found
    except OSError as e:
        raise InputError(f"{what} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"{what} must be JSON: {brief(e)}") from e


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} twice")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
