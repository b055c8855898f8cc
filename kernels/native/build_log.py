"""Reads ninja's output after a failed build: its first error, and whether a retry would help."""

import re
from pathlib import Path

# Errors in the sources, and temporary failures of the machine.
_OWN = re.compile(r"\berror: |\bfatal\b|undefined reference|undefined symbol", re.IGNORECASE)
_PASSING = re.compile(
    r"No space left|quota exceeded|File too large|Input/output error|Stale file handle"
    r"|Read-only file system|Permission denied|out of memory|memory exhausted|allocate memory"
    r"|bad_alloc|unable to allocate|Too many open files|temporarily unavailable|Killed|Terminated"
    r"|Interrupted|timed? ?out|Text file busy|cannot create temporary|Bus error|truncated",
    re.IGNORECASE,
)
_PATH = re.compile(r"(?<!\w)/\S+")  # does not match "Input/output error"


def first_error(log: str) -> str:
    """The most informative line of ninja's output, at most 160 characters. Lines of ninja itself
    and the commands that it repeats are left out."""
    said = [line for line in _said(log) if not line.startswith("ninja:")]
    telling = re.compile(r"error: |fatal|undefined reference|not found|No space left")
    line = next(filter(telling.search, said), (said or ["it gave no message"])[-1])
    return line if len(line) <= 160 else line[:159] + "…"


def is_lasting(log: str, *folders: Path) -> bool:
    """Whether the log of a failed build shows an error in the sources, and no failure of the
    machine, such as a full disk, too little memory, a signal or a timeout.

    Words in commands and paths do not count. The paths of folders may contain spaces.
    """
    text = "\n".join(_said(log))
    for folder in folders:
        text = text.replace(str(folder), "")
    said = [_PATH.sub("", line) for line in text.splitlines()]
    own = any(_OWN.search(line) for line in said if not line.startswith("ninja:"))
    return own and not any(map(_PASSING.search, said))


def _said(log: str) -> list[str]:
    """The lines of ninja's output without repeated commands and progress."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    commands = [i + 1 for i, line in enumerate(lines) if line.startswith("FAILED:")]
    return [
        line
        for i, line in enumerate(lines)
        if i not in commands and not line.startswith(("FAILED:", "["))
    ]
