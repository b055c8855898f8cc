"""Standard streams that are closed, on a full disk, or pipes without a reader.

stderr has progress and warnings, which are not worth a run: what it does not take is lost. stdout
has results: what it does not take is an error.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class _Lossy:
    """A stream that takes everything, and writes it until the one below, if any, fails."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self.is_broken = stream is None or getattr(stream, "closed", False)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self._stream.flush())

    def isatty(self) -> bool:
        return not self.is_broken and self._stream.isatty()

    def _try(self, act) -> None:
        if not self.is_broken:
            try:
                act()
            except (OSError, ValueError):  # ValueError: closed
                self.is_broken = True

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class _Closed:
    """In place of a stdout that is closed: Python's own None takes everything without a word."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def lossy_stderr() -> Iterator[_Lossy]:
    """Inside, writing to stderr never raises. Also a decorator."""
    before = sys.stderr
    lossy = before if isinstance(before, _Lossy) else _Lossy(before)
    sys.stderr = lossy
    try:
        yield lossy
    finally:
        if sys.stderr is lossy:
            sys.stderr = before


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """The same for a whole program, and a stdout that is closed raises OSError where it is written.
    What cannot be written is dropped in the end: Python would fail again when it exits."""
    for number in range(3):  # else the next file that is opened would be stdout or stderr
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    before = sys.stdout
    is_closed = before is None or getattr(before, "closed", False)
    if is_closed:
        sys.stdout = _Closed()
    try:
        with lossy_stderr() as lossy:
            yield
    finally:
        if lossy.is_broken:
            drop(sys.stderr)
        if is_closed:
            sys.stdout = before


def drop(stream: TextIO | None) -> None:
    """What is still to be written goes nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # where it is no open file
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
