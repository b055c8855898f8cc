"""A hash of a run's tokens, to detect on resume that the data has changed.

All ids are hashed, unless memory-mapped shards exceed WHOLE bytes. Then the hash covers the
length of every shard and PAGES evenly spaced pages. Inserted or deleted tokens shift everything
after them, so they are detected. Tokens overwritten in place between the sampled pages are not.
"""

import hashlib

import numpy as np

from .batches import Split

WHOLE = 2**30  # bytes of shards: hashing them takes a second
PAGE, PAGES = 4096, 16384  # bytes, pages: 64 MiB


def digest(*splits: Split) -> str:
    """The hash of the ids of all splits, in order, and of their division into parts."""
    parts = [part for split in splits for part in split.parts]
    mapped = sum(part.nbytes for part in parts if _is_mapped(part))
    pages = PAGES / mapped if mapped > WHOLE else None  # per byte
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
    """Whether the array is a view of a memory-mapped file."""
    while isinstance(part, np.ndarray) and part.base is not None:
        part = part.base
    return not isinstance(part, np.ndarray)
