"""The files of a folder or pattern: the same as with glob, from a limited number of folders."""

import glob
import os
import time
from pathlib import Path

import pytest

from gpt2.data import documents
from gpt2.errors import InputError
from gpt2.files import folders

PATTERNS = (
    *("*.txt", "a/*.txt", "./a/*", "*/*.txt", "**/*.txt", "**", "a/**", "**/b/**/*.txt", "[ab]/?"),
    *("**/.h*", ".hidden/*", "a/../a/*.txt", "none/*.txt", "[*]", "**/**/x.txt", "a**/*", "*/"),
    *("x.txt/*", "**/sub*/x.txt", "**/[!b]/*"),
)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.txt", "a/x.txt", "a/b/y.txt", "a/b/c/z", "b/x", ".hidden/x.txt", "a/.h.txt",
                 "b/sub1/x.txt"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_finds_what_glob_finds(pattern, tree):
    for start in ("", f"{tree}/"):
        found = glob.glob(start + pattern, recursive=True)
        expected = sorted({os.path.normpath(p) for p in found if os.path.isfile(p)})
        assert sorted(map(os.path.normpath, folders.matching(start + pattern))) == expected


def test_a_folder_that_links_lead_to_is_taken_once(tree):
    """glob follows a ring of links forty times."""
    os.symlink("..", "a/up")
    found = [os.path.realpath(p) for p in folders.matching("**/*.txt")]
    assert len(found) == len(set(found)) == 4


@pytest.mark.parametrize("source", ["/**", "/proc/**/*", "/**/*.nothing", "/**/**/**/x", "/"])
def test_a_search_of_the_whole_machine_ends(source, monkeypatch):
    """A config.json with such data made --resume search for more than a minute."""
    monkeypatch.setattr(folders, "_MAX_FOLDERS", 100)
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"must be in at most 100 folders|cannot be read"):
        documents.documents(source)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("source", ["", "*"])
def test_a_folder_of_many_files_ends(source, tree, monkeypatch):
    monkeypatch.setattr(folders, "_MAX_ENTRIES", 3)
    with pytest.raises(InputError, match=r"with 3 files, got more"):
        documents.documents(f"{tree}/{source}")


def test_a_link_to_itself_is_no_file(tree):
    """It ended the search for texts in the whole folder. Dangling links are skipped too."""
    os.symlink("loop.txt", "loop.txt")
    os.symlink("none", "dangling.txt")
    for source in (str(tree), "**/*.txt", "*.txt"):
        assert all(document.size for document in documents.documents(source))
