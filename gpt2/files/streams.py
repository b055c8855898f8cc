"""Handles standard streams that are closed, on a full disk, or pipes without a reader.

A failed write to stderr (progress, warnings) is ignored, so that it cannot end a run. A failed
write to stdout (results) is an error.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class _Lossy:
    """A stream that never fails: it stops writing once the underlying stream fails."""

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
    """Stands in for a closed stdout and raises OSError; Python's None would ignore all output."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def lossy_stderr() -> Iterator[_Lossy]:
    """A context, or a decorator, in which writing to stderr never raises."""
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
    """lossy_stderr for a whole program, in which writing to a closed stdout raises OSError. Output
    that cannot be written is dropped at the end, because Python would fail again at exit."""
    for number in range(3):  # otherwise the next opened file would become stdout or stderr
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
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
    """Drops output that is still buffered."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is not an open file
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
