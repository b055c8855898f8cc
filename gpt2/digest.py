"""What tells whether the tokens of a run are still those that it began with.

Everything is hashed, but of shards beyond WHOLE bytes, which may be larger than memory: of these
the length of each and PAGES pages, spread evenly over all. What is put in or left out moves all
that follows, and so is seen; some tokens in place of others are missed where they lie between the
pages.
"""

import hashlib

import numpy as np

from .data import Split

WHOLE = 2**30  # bytes of shards: a second
PAGE, PAGES = 4096, 16384  # bytes, pages: 64 MiB


def digest(*splits: Split) -> str:
    """The hash of the ids of all splits, in order, and of how they are cut into parts."""
    parts = [part for split in splits for part in split.parts]
    mapped = sum(part.nbytes for part in parts if _is_mapped(part))
    pages = PAGES / mapped if mapped > WHOLE else None  # for each byte
    found = hashlib.blake2b(digest_size=16)
    for split in splits:
        found.update(f"{len(split.parts)} parts;".encode())
        for part in split.parts:
            found.update(f"{len(part)} ids of {part.itemsize} bytes;".encode())
            if pages is not None and _is_mapped(part):
                _update_by_pages(found, part, max(2, round(pages * part.nbytes)))
            else:
                found.update(part)
    return f"{'whole' if pages is None else 'pages'} {found.hexdigest()}"


def _update_by_pages(found, part: np.ndarray, pages: int) -> None:
    size = PAGE // part.itemsize
    for start in np.linspace(0, max(len(part) - size, 0), pages, dtype=np.int64):
        found.update(part[start : start + size])


def _is_mapped(part: np.ndarray) -> bool:
    """Whether the array looks into a file, not into memory of its own."""
    while isinstance(part, np.ndarray) and part.base is not None:
        part = part.base
    return not isinstance(part, np.ndarray)
