"""No code of another user runs: what the cache of native libraries trusts and refuses."""

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from small_library import COMPILER, lines, needs_compiler

from gpt2.kernels.native import libraries, trust

pytestmark = needs_compiler


def foreign_library(folder: Path, marker: Path) -> Path:
    """A library that creates a file when it is loaded."""
    source, library = folder / "foreign.c", folder / "foreign.so"
    source.write_text(
        "#include <fcntl.h>\n#include <unistd.h>\n"
        "__attribute__((constructor)) static void run(void) {\n"
        f'    close(open("{marker}", O_CREAT | O_WRONLY, 0600));\n}}\n'
    )
    subprocess.run([COMPILER, "-x", "c++", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.fixture
def foreign(tmp_path):
    """Another user's library, and the file that it creates when it runs."""
    marker = tmp_path / "it-ran"
    return foreign_library(tmp_path, marker), marker


@pytest.fixture
def loads(request):
    """The number of loads during a swap."""
    return 50 if request.config.getoption("--full") else 8


def entry_like(entry: Path, library: Path, to: Path) -> None:
    """Copies a cache entry, with another library and its checksum."""
    shutil.copytree(entry, to)
    shutil.copy(library, to / "libgpt2_kernels_cpu.so")
    record = json.loads((to / "libgpt2_kernels_cpu.json").read_text())
    with trust.open_file(library) as file:
        record["sha256"] = file.sha256()
    (to / "libgpt2_kernels_cpu.json").write_text(json.dumps(record))


def swap_for_ever(act) -> int:
    """Starts a process that calls act() in a loop; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                act()
        finally:
            os._exit(1)
    return child


def reason_in_child(small) -> str:
    """The result of load() in another process ("" for None), because the dynamic loader of this one
    would not open a path twice."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, (small.start_again() or "").encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with open(read, "rb") as pipe:
        reason = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return reason


def racing(swap, load, loads: int) -> list[str | None]:
    """The results of this many calls of load() while another process swaps the library."""
    child = swap_for_ever(swap)
    try:
        return [load() for _ in range(loads)]
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_parent_that_others_can_write_is_refused(loads, small, foreign, tmp_path, monkeypatch):
    """Others swap the whole folder between check and use: their library ran in 5 of 20 loads."""
    library, marker = foreign
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(shared / "cache"))
    entry = libraries.build().parent
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    (theirs / "cpu").mkdir(mode=0o700)
    entry_like(entry, library, theirs / "cpu" / entry.name)
    shared.chmod(0o777)

    def swap():
        os.rename(shared / "cache", shared / "ours")
        os.rename(theirs, shared / "cache")
        os.rename(shared / "cache", theirs)
        os.rename(shared / "ours", shared / "cache")

    reasons = set(racing(swap, lambda: reason_in_child(small), loads))
    assert reasons == {
        f"others can write to {shared}, which holds the cache {shared}/cache; chmod go-w {shared}"
    }
    assert not marker.exists()
    for left in shared.iterdir():
        shutil.rmtree(left)
    shared.chmod(0o1777)  # like /tmp: only the owner may rename
    assert small.start_again() is None


def test_what_was_checked_is_what_is_loaded(loads, small, foreign, tmp_path, monkeypatch):
    """Another process replaces the file as fast as possible, also at the worst moment."""
    library, marker = foreign
    ours = libraries.build()
    good = tmp_path / "good.so"
    shutil.copy(ours, good)
    small.without_compiler()  # a refused library is not built again

    def put(source):
        new = ours.with_name("new")
        shutil.copy(source, new)
        os.replace(new, ours)

    def swap():
        put(library)
        put(good)

    racing(swap, lambda: reason_in_child(small), loads)
    assert not marker.exists()
    put(good)
    sha256 = trust.File.sha256

    def then_swapped(file):
        found = sha256(file)
        put(library)
        return found

    monkeypatch.setattr(trust.File, "sha256", then_swapped)
    assert reason_in_child(small) == ""
    assert not marker.exists()


@pytest.mark.parametrize("level", ["cpu", "entry", "file", "record"])
def test_no_link_is_followed_below_the_root(level, small, foreign, tmp_path, capfd):
    library, marker = foreign
    ours = libraries.build()
    entry_like(ours.parent, library, tmp_path / "theirs" / ours.parent.name)
    theirs = tmp_path / "theirs" / ours.parent.name
    here, there = {
        "cpu": (small.cache / "cpu", theirs.parent),
        "entry": (ours.parent, theirs),
        "file": (ours, theirs / ours.name),
        "record": (ours.with_suffix(".json"), theirs / ours.with_suffix(".json").name),
    }[level]
    if level == "file":  # with the checksum of the target of the link
        shutil.copy(theirs / "libgpt2_kernels_cpu.json", ours.parent)
    os.rename(here, tmp_path / "away")
    here.symlink_to(there)
    lines(capfd)
    reason = small.start_again()
    assert not marker.exists()
    if level == "cpu":
        assert reason == f"the cache has a symbolic link at {here}, which is not followed"
        return
    assert reason is None and small.compiled() == 2, "built anew"
    assert not ours.is_symlink() and not ours.parent.is_symlink()
    assert lines(capfd)[0].endswith("; not used")
    assert there.exists(), "what the link led to is left alone"


def test_a_link_above_the_root_is_resolved_once(small, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(tmp_path / "link" / "cache"))
    assert libraries.build().is_relative_to(tmp_path / "real" / "cache")


@pytest.mark.parametrize("level", ["cpu", "entry", "file", "record"])
def test_what_others_can_write_is_not_trusted(level, small, capfd):
    ours = libraries.build()
    path, mode = {
        "cpu": (small.cache / "cpu", 0o702),
        "entry": (ours.parent, 0o702),
        "file": (ours, 0o722),
        "record": (ours.with_suffix(".json"), 0o602),
    }[level]
    path.chmod(mode)
    lines(capfd)
    reason = small.start_again()
    if level == "cpu":
        assert reason == f"others can write to the cache {path}; chmod go-w {path}"
    else:
        assert reason is None and small.compiled() == 2, "built anew"
        assert "others can write to " in lines(capfd)[0]
        assert small.start_again() is None and small.compiled() == 2


def test_the_caches_layout_is_private_whatever_the_umask(small):
    old = os.umask(0)
    try:
        library = libraries.build()
    finally:
        os.umask(old)
    for path in (small.cache, *small.cache.rglob("*")):
        assert not path.stat().st_mode & 0o022, path
    assert small.start_again() is None and small.compiled() == 1
    assert library.parent.stat().st_mode & 0o777 == 0o700


def test_without_proc_the_path_is_loaded(small, monkeypatch):
    monkeypatch.setattr(trust, "_leads_to", lambda *args: False)
    assert libraries.load() is None


def test_two_libraries_are_two(small):
    """The dynamic loader opens a name only once, and descriptors are reused."""
    source = '__attribute__((visibility("default"))) int {}() {{ return {}; }}'
    built, handles, cdll = [], [], ctypes.CDLL
    for name, answer in (("first", 42), ("other", 43)):
        small.source.write_text(f'extern "C" {source.format(name, answer)}\n')
        built.append(libraries.build())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust.ctypes, "CDLL", lambda name: handles.append(cdll(name)))
        patch.setattr(os, "dup", lambda handle: handle)
        for library in built:
            with trust.open_file(library) as file:
                file.load()
    assert handles[0].first() == 42 and handles[1].other() == 43
