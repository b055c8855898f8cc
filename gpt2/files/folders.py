"""Finds the files below a folder, or those that match a pattern, without recursive calls.

The numbers of folders and entries are limited, because a pattern such as `/**` is valid, too.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, quoted

_MAX_FOLDERS = 2**16
_MAX_ENTRIES = 2**21  # enough for a folder of a million texts


def below(folder: str) -> Iterator[Path]:
    """Yields every file at any depth below folder, except hidden files and folders. Links to
    folders are not followed. Raises InputError if a folder cannot be listed."""
    listing, left = _Listing(folder), [folder]
    while left:
        try:
            entries = listing.of(left.pop())
        except OSError as e:
            raise InputError(f"data {quoted(e.filename)} cannot be read: {e.strerror}") from e
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if entry.is_dir(follow_symlinks=False):
                left.append(entry.path)
            elif _is_file(entry):
                yield Path(entry.path)


def matching(pattern: str) -> list[str]:
    """The files that match a pattern, sorted, as from glob.glob(recursive=True). Unlike there, `**`
    visits each folder only once, however many links lead to it."""
    listing, path = _Listing(pattern), Path(pattern)
    found = [path.anchor]
    for part in path.parts[1 if path.anchor else 0 :]:
        if part == "**":
            found = list(_with_all_below(found, listing))
        elif glob.has_magic(part):
            found = [p for folder in found for p in _matches(folder, part, listing)]
        else:
            found = [p for f in found if os.path.lexists(p := os.path.join(f, part))]
    ends_as_folder = pattern.endswith(os.sep)
    return [] if ends_as_folder else sorted(p for p in set(found) if os.path.isfile(p))


class _Listing:
    """Lists folders, and enforces the limits."""

    def __init__(self, source: str):
        self._source, self._folders, self._entries = source, 0, 0

    def of(self, folder: str) -> list[os.DirEntry]:
        self._folders += 1
        entries = []
        with os.scandir(folder or ".") as found:
            for entry in found:
                entries.append(entry)
                self._entries += 1
                if self._folders > _MAX_FOLDERS or self._entries > _MAX_ENTRIES:
                    raise InputError(
                        f"data {quoted(self._source)} must be in at most {_MAX_FOLDERS} "
                        f"folders with {_MAX_ENTRIES} files, got more: name a smaller folder"
                    )
        return entries


def _listed(folder: str, listing: _Listing) -> list[os.DirEntry]:
    try:
        return listing.of(folder)
    except OSError:
        return []  # not a folder, or not readable: nothing matches there


def _matches(folder: str, part: str, listing: _Listing) -> Iterator[str]:
    match = re.compile(fnmatch.translate(os.path.normcase(part))).match
    for entry in _listed(folder, listing):
        hidden = entry.name[0] == "." and part[0] != "."
        if not hidden and match(os.path.normcase(entry.name)):
            yield os.path.join(folder, entry.name)


def _with_all_below(folders: list[str], listing: _Listing) -> Iterator[str]:
    """Yields the folders and everything below them that is not hidden."""
    seen: set[tuple[int, int]] = set()
    left = list(folders)
    while left:
        folder = left.pop()
        try:
            found = os.stat(folder or ".")
        except OSError:
            continue
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        yield folder
        for entry in _listed(folder, listing):
            if entry.name[0] != ".":
                path = os.path.join(folder, entry.name)
                if _is_folder(entry):
                    left.append(path)
                else:
                    yield path


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
