"""Regular files and standard input, read up to a limit.

Pipes, devices and folders are refused before a byte is read, because reading them may never end.
"""

import codecs
import errno
import os
import stat
import sys
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError, quoted

MAX_TEXT_BYTES = 2**26  # for descriptions: GPT-2's tokenizer.json has 3.6 MB
MAX_LINES_BYTES = 2**28  # for prompts or questions: HellaSwag's largest file has 47 MB
_MAX_STREAM_BYTES = 2**32  # for standard input, if twice as much memory is free
_MAX_LINES = 2**20  # for prompts or questions
_MAX_HEADER_BYTES = 2**23  # for safetensors: gpt2-xl's with optimizer state has 230,000
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, opened for reading in binary.

    Raises OSError for anything else: a folder, a pipe, a socket, a device, an impossible name. None
    of these is opened, because opening a pipe can block.
    """
    try:
        _check_kind(path, os.stat(path).st_mode)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except ValueError:  # NUL, or half a surrogate pair
        raise OSError(errno.EINVAL, "no file can have such a name", str(path)) from None
    try:
        _check_kind(path, os.fstat(file.fileno()).st_mode)  # the name may point elsewhere now
    except OSError:
        file.close()
        raise
    return file


def check_regular(path: str | Path) -> None:
    """Raises OSError for the same reasons as open_regular. For files that a library opens by
    name."""
    open_regular(path).close()


def check_safetensors(path: str | Path) -> None:
    """Raises OSError for the same reasons as open_regular, or if the header is too long for a
    model. The library needs 20 times the header's size in memory."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        most = max(_MAX_HEADER_BYTES, size_of(file) // 16)
    if length > most:
        raise OSError(errno.EFBIG, f"a header of at most {most} bytes is read, got {length}")


def size_of(file: BinaryIO) -> int:
    """The size of an open file, in bytes."""
    return os.fstat(file.fileno()).st_size


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file. Raises OSError for the same reasons as open_regular, and
    ValueError if the file has more than `most` bytes."""
    with open_regular(path) as file:
        if (size := size_of(file)) > most:
            raise ValueError(f"at most {most} bytes are read, got {size}")
        content = file.read(size + 1) or b""
    if len(content) > size:  # also the files of /proc, which have no size
        raise ValueError("it grows while it is read")
    return content


def read_text(path: str | Path, most: int = MAX_TEXT_BYTES) -> str:
    """The content decoded as UTF-8, with \\n as line ends. Raises UnicodeDecodeError, a ValueError,
    if it is not UTF-8."""
    text = read_bytes(path, most).decode()
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_lines(name: str, path: str | Path) -> list[str]:
    """The lines of a UTF-8 text; "-" is standard input. Only \\n and \\r\\n end a line, because
    other line separators are ordinary characters in JSON. A byte order mark is dropped. Raises
    InputError, naming the file and the line, if a line is not UTF-8 or the file cannot be read."""
    lines = lines_of(name, path)
    return [decode_line(name, path, number, line) for number, line in enumerate(lines, 1)]


def lines_of(name: str, path: str | Path) -> list[bytes]:
    """The lines of a file as bytes, split like those of read_lines. Raises InputError if the file
    cannot be read or has too many lines."""
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
    """The text of a line. Raises InputError, naming file and line, if it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as e:
        got = f"{line[e.start]:#04x} at byte {e.start} of the line"
        raise InputError(f"{name} {quoted(path)}, line {number} must be UTF-8, got {got}") from None


def read_stdin(name: str, most: int = _MAX_STREAM_BYTES) -> bytes:
    """All of standard input. Raises InputError, beginning with name, if it is longer than `most`
    bytes or half of the memory."""
    held, block = BytesIO(), 2**20
    while chunk := _of_stdin(name, block):
        held.write(chunk)
        if held.tell() > 2**28 and block < 2**24:  # only now, because importing PyTorch is slow
            from .. import memory

            block, there = 2**24, memory.free()
            most = most if there is None else min(most, there // 2)
        if held.tell() > most:
            raise InputError(f"{name}: at most {most} bytes of standard input are read, got more")
    return held.getvalue()


def _of_stdin(name: str, most: int) -> bytes:
    try:
        return sys.stdin.buffer.read(most)
    except (OSError, ValueError, AttributeError) as e:  # a folder, or closed; it may be None
        reason = getattr(e, "strerror", None) or "it is closed"
        raise InputError(f"{name}: standard input cannot be read: {reason}") from e


def _check_kind(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"a regular file is expected, got {kind}", str(path))


def hint(error: OSError) -> str:
    """Advice for the error message if a named pipe was given: read it as standard input."""
    return "; read it as standard input: - < PIPE" if "a named pipe" in str(error) else ""
