"""What a full disk becomes: one line that names the file, not a traceback."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import WriteError, brief

# Of the disk, not of what the user asked for; None: NumPy's tofile gives no number.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, None}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, a full or broken disk raises WriteError for path. Other errors stay as they are."""
    try:
        yield
    except OSError as e:
        if isinstance(e, WriteError) or e.errno not in FULL:
            raise
        raise WriteError(path, e.strerror or brief(e)) from e
    except SafetensorError as e:
        if "os error" not in str(e):
            raise
        raise WriteError(path, re.sub(r".*error: | \(os error \d+\)", "", brief(e))) from e
