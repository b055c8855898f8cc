"""What ninja's output says of a build that failed: its first error, and whether it is for good."""

import re
from pathlib import Path

# What a compiler reports of its own input, and what it reports of the machine at that moment.
_OWN = re.compile(r"\berror: |\bfatal\b|undefined reference|undefined symbol", re.IGNORECASE)
_PASSING = re.compile(
    r"No space left|quota exceeded|File too large|Input/output error|Stale file handle"
    r"|Read-only file system|Permission denied|out of memory|memory exhausted|allocate memory"
    r"|bad_alloc|unable to allocate|Too many open files|temporarily unavailable|Killed|Terminated"
    r"|Interrupted|timed? ?out|Text file busy|cannot create temporary|Bus error|truncated",
    re.IGNORECASE,
)
_PATH = re.compile(r"(?<!\w)/\S+")  # "Input/output error" has none


def first_error(log: str) -> str:
    """The line of ninja's output that says most; ninja's own and the commands it repeats do not."""
    said = [line for line in _said(log) if not line.startswith("ninja:")]
    telling = re.compile(r"error: |fatal|undefined reference|not found|No space left")
    line = next(filter(telling.search, said), (said or ["it gave no message"])[-1])
    return line if len(line) <= 160 else line[:159] + "…"


def is_lasting(log: str, *folders: Path) -> bool:
    """Whether the log of a failed build has an error of the compiler's own, and no sign that the
    machine failed it: a full disk, too little memory, a signal, a timeout. Commands and paths are
    no such sign; the folders' own may have spaces."""
    text = "\n".join(_said(log))
    for folder in folders:
        text = text.replace(str(folder), "")
    said = [_PATH.sub("", line) for line in text.splitlines()]
    own = any(_OWN.search(line) for line in said if not line.startswith("ninja:"))
    return own and not any(map(_PASSING.search, said))


def _said(log: str) -> list[str]:
    """The lines of ninja's output that are no command which it repeats, and no progress."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    commands = [i + 1 for i, line in enumerate(lines) if line.startswith("FAILED:")]
    return [
        line
        for i, line in enumerate(lines)
        if i not in commands and not line.startswith(("FAILED:", "["))
    ]
