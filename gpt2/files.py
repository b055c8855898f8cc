"""Files that are either whole or absent, whatever stops the program that writes them.

A file is written in a temporary folder beside its place, flushed to the disk, and renamed; a rename
replaces the old file in one step, and flushing its folder makes that last. What is left of a killed
writer lies in the temporary folder, also what a library writes there under names of its own.

What is read is a regular file, and no more of it than a limit: a pipe without a writer, a device
without an end or a folder is refused before a byte is read.
"""

import codecs
import errno
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from . import lock
from .errors import InputError, WriteError, brief, quoted
from .writing import writing

_MARK = ".tmp-"
MAX_TEXT_BYTES = 2**26  # of a text that describes something: GPT-2's tokenizer.json has 3.6 MB
MAX_LINES_BYTES = 2**28  # of a file of prompts or questions: HellaSwag's largest has 47 MB
_MAX_STREAM_BYTES = 2**32  # of standard input, where memory has room for it twice
_MAX_VALUES = 2**22  # of JSON: a tokenizer.json of 128,000 tokens has a million
_MAX_LINES = 2**20  # of a file of prompts or questions
_MAX_HEADER_BYTES = 2**23  # of safetensors: gpt2-xl's with optimizer state has 230,000
_MAX_DEPTH = 100  # of what JSON nests: tokenizer.json and config.json stay below 10
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


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


def identity(folder: str | Path) -> tuple[int, int] | None:
    """What tells a folder from another one under its name; None where there is no folder."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


def sweep(folder: str | Path) -> None:
    """Removes what killed writers left behind in folder."""
    for stray in Path(folder).glob(f".*{_MARK}*"):
        if stray.is_dir() and not stray.is_symlink():  # no writer leaves anything else
            _remove_folder(stray)


def _remove_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except RecursionError:  # Python 3.12 and older remove a folder by recursion
        raise InputError(f"folder {quoted(folder)} nests too deeply to be removed") from None


def check_new_folder(name: str, folder: str | Path) -> None:
    """Raises InputError unless folder is new or empty, and can be made as far as one can see."""
    check_name(name, folder)
    folder = Path(folder)
    if folder.is_dir() and any(path.name != lock.FILE for path in folder.iterdir()):
        raise InputError(f"{name} must be a new or empty folder, got {quoted(folder)}")
    _check_writable(name, folder)


def check_new(name: str, path: str | Path) -> None:
    """Raises InputError unless path is new, and its folder can be written or made as far as one can
    see."""
    check_name(name, path)
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise InputError(f"{name} must be new, got {quoted(path)}, which exists")
    _check_writable(name, path.parent)


def check_name(name: str, path: str | Path) -> None:
    """Raises InputError, naming the argument, for a path that no file system has: with a character
    NUL, with half a surrogate pair, or longer than the system takes."""
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
    """Makes folder and its parents. Raises InputError where that is not possible."""
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


def read_lines(name: str, path: str | Path) -> list[str]:
    """The lines of a text in UTF-8; - is standard input. They end in \\n or \\r\\n alone: in JSON
    others are characters. A byte order mark is dropped. Raises InputError, beginning with name, for
    what cannot be read, with the number of the line."""
    lines = lines_of(name, path)
    return [decode_line(name, path, number, line) for number, line in enumerate(lines, 1)]


def lines_of(name: str, path: str | Path) -> list[bytes]:
    """The same lines, not yet decoded."""
    try:
        if str(path) == "-":
            text = read_stdin(name, MAX_LINES_BYTES)
        else:
            text = read_bytes(path, MAX_LINES_BYTES)
    except OSError as e:
        raise InputError(f"{name} {quoted(path)} cannot be read: {e.strerror}{hint(e)}") from e
    except ValueError as e:  # InputError is one
        raise InputError(f"{name} {quoted(path)}: {e}") from e
    if (count := text.count(b"\n")) > _MAX_LINES:
        raise InputError(f"{name} {quoted(path)}: at most {_MAX_LINES} lines are read, got {count}")
    lines = text.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1])]


def decode_line(name: str, path: str | Path, number: int, line: bytes) -> str:
    """The text of a line. Raises InputError, naming file and line, where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as e:
        got = f"{line[e.start]:#04x} at byte {e.start} of the line"
        raise InputError(f"{name} {quoted(path)}, line {number} must be UTF-8, got {got}") from None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, open to be read in binary.

    Raises OSError for anything else: a folder, a pipe, a socket, a device, a name that no file can
    have. None of them is opened, so that nothing waits.
    """
    try:
        _check_kind(path, os.stat(path).st_mode)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except ValueError:  # NUL, or half a surrogate pair
        raise OSError(errno.EINVAL, "no file can have such a name", str(path)) from None
    try:
        _check_kind(path, os.fstat(file.fileno()).st_mode)  # of what is open, whoever swapped it
    except OSError:
        file.close()
        raise
    return file


def check_regular(path: str | Path) -> None:
    """Raises OSError, as open_regular does; for files that a library opens by their names."""
    open_regular(path).close()


def check_safetensors(path: str | Path) -> None:
    """Raises OSError, as open_regular does, and where the header is too long for the tensors of a
    model: the library takes 20 times its size in memory."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        most = max(_MAX_HEADER_BYTES, size_of(file) // 16)
    if length > most:
        raise OSError(errno.EFBIG, f"a header of at most {most} bytes is read, got {length}")


def size_of(file: BinaryIO) -> int:
    """Bytes in an open file."""
    return os.fstat(file.fileno()).st_size


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file. Raises OSError, as open_regular does, and ValueError where it
    has more than `most` bytes."""
    with open_regular(path) as file:
        if (size := size_of(file)) > most:
            raise ValueError(f"at most {most} bytes are read, got {size}")
        content = file.read(size + 1) or b""
    if len(content) > size:  # also the files of /proc, which have no size
        raise ValueError("it grows while it is read")
    return content


def read_text(path: str | Path, most: int = MAX_TEXT_BYTES) -> str:
    """The same as a text in UTF-8, with \\n at the ends of lines. Raises UnicodeDecodeError, a
    ValueError, for other bytes."""
    text = read_bytes(path, most).decode()
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_stdin(name: str, most: int = _MAX_STREAM_BYTES) -> bytes:
    """Standard input to its end. Raises InputError, beginning with name, where that is longer than
    `most` bytes, or half of the memory."""
    held, block = BytesIO(), 2**20
    while chunk := _of_stdin(name, block):
        held.write(chunk)
        if held.tell() > 2**28 and block < 2**24:  # importing PyTorch for a short text is slow
            from . import memory

            block, there = 2**24, memory.free()
            most = most if there is None else min(most, there // 2)
        if held.tell() > most:
            raise InputError(f"{name}: at most {most} bytes of standard input are read, got more")
    return held.getvalue()


def _of_stdin(name: str, most: int) -> bytes:
    try:
        return sys.stdin.buffer.read(most)
    except (OSError, ValueError, AttributeError) as e:  # a folder, or closed: then it is None
        reason = getattr(e, "strerror", None) or "it is closed"
        raise InputError(f"{name}: standard input cannot be read: {reason}") from e


def _check_kind(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"a regular file is expected, got {kind}", str(path))


def hint(error: OSError) -> str:
    """What to do with a pipe where standard input is read, too."""
    return "; read it as standard input: - < PIPE" if "a named pipe" in str(error) else ""


def parse_json(text: str) -> Any:
    """What text says in JSON. Raises ValueError for anything else: NaN, a key twice in an object,
    and what nests deeper than 100, too; and for more than 2^22 values, which take 60 bytes each."""
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES} values")
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if opened > _MAX_DEPTH and not _is_flat(found):
        raise ValueError("nested too deeply")
    return found


def read_object(what: str, path: Path, most: int) -> dict[str, Any]:
    """The object in JSON that a file of at most `most` bytes holds. Raises InputError, beginning
    with what, for anything else."""
    try:
        found = parse_json(read_text(path, most))
        if not isinstance(found, dict):
            raise ValueError(f"an object is expected, got {type(found).__name__}")
        return found
    except OSError as e:
        raise InputError(f"{what} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"{what} must be JSON: {brief(e)}") from e


def _is_flat(found: Any) -> bool:
    """Whether a value of JSON nests at most 100 deep: each round goes one level deeper."""
    level = [found]
    for _ in range(_MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    return not level


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {brief(repr(key))} twice")
            seen.add(key)
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
