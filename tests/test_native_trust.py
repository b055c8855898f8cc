"""No code of another user runs: what the cache of native libraries trusts, and what it refuses."""

import ctypes
import grp
import json
import os
import pwd
import shutil
import stat
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import COMPILER, lines, needs_compiler

from gpt2.kernels import _private, native

pytestmark = needs_compiler

ROOT_USER = os.geteuid() == 0
STRANGER = os.geteuid() + 4242


def foreign_library(folder: Path, marker: Path) -> Path:
    """A library that leaves a file behind when it is loaded."""
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
    """The library of somebody else, and the file that it leaves when it runs."""
    marker = tmp_path / "it-ran"
    return foreign_library(tmp_path, marker), marker


@pytest.fixture
def loads(request):
    """How often a library is loaded while somebody swaps it."""
    return 50 if request.config.getoption("--full") else 8


def entry_like(entry: Path, library: Path, to: Path) -> None:
    """A copy of a cache's entry with another library, and with its checksum."""
    shutil.copytree(entry, to)
    shutil.copy(library, to / "libgpt2_kernels_cpu.so")
    record = json.loads((to / "libgpt2_kernels_cpu.json").read_text())
    with _private.open_file(library) as file:
        record["sha256"] = file.sha256()
    (to / "libgpt2_kernels_cpu.json").write_text(json.dumps(record))


def swap_for_ever(act) -> int:
    """A process that does nothing but act(); its id."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                act()
        finally:
            os._exit(1)
    return child


def reason_in_child(toy) -> str:
    """What load() returns in a process of its own, empty for None: the dynamic loader of this one
    would not open a path twice."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, (toy.start_again() or "").encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with open(read, "rb") as pipe:
        reason = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return reason


def racing(swap, load, loads: int) -> list[str | None]:
    """What load() returned, so many times, while another process swaps."""
    child = swap_for_ever(swap)
    try:
        return [load() for _ in range(loads)]
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_parent_that_others_can_write_is_refused(loads, toy, foreign, tmp_path, monkeypatch):
    """They swap the whole folder between check and use: their library ran in 5 of 20 loads."""
    library, marker = foreign
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(shared / "cache"))
    entry = native.build().parent
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

    reasons = set(racing(swap, lambda: reason_in_child(toy), loads))
    assert reasons == {
        f"others can write to {shared}, which holds the cache {shared}/cache; chmod go-w {shared}"
    }
    assert not marker.exists()
    for left in shared.iterdir():
        shutil.rmtree(left)
    shared.chmod(0o1777)  # as /tmp is: only an owner renames
    assert toy.start_again() is None


def test_what_was_checked_is_what_is_loaded(loads, toy, foreign, tmp_path, monkeypatch):
    """The file is replaced as fast as a process can do it, also at the worst moment."""
    library, marker = foreign
    ours = native.build()
    good = tmp_path / "good.so"
    shutil.copy(ours, good)
    toy.without_compiler()  # a library that is refused is not built again

    def put(source):
        new = ours.with_name("new")
        shutil.copy(source, new)
        os.replace(new, ours)

    def swap():
        put(library)
        put(good)

    loaded = racing(swap, lambda: reason_in_child(toy), loads)
    assert loaded.count("") > 5 and not marker.exists()
    put(good)
    sha256 = _private.File.sha256

    def then_swapped(file):
        found = sha256(file)
        put(library)
        return found

    monkeypatch.setattr(_private.File, "sha256", then_swapped)
    assert reason_in_child(toy) == ""
    assert not marker.exists()


@pytest.mark.parametrize("level", ["cpu", "entry", "file", "record"])
def test_no_link_is_followed_below_the_root(level, toy, foreign, tmp_path, capfd):
    library, marker = foreign
    ours = native.build()
    entry_like(ours.parent, library, tmp_path / "theirs" / ours.parent.name)
    theirs = tmp_path / "theirs" / ours.parent.name
    here, there = {
        "cpu": (toy.cache / "cpu", theirs.parent),
        "entry": (ours.parent, theirs),
        "file": (ours, theirs / ours.name),
        "record": (ours.with_suffix(".json"), theirs / ours.with_suffix(".json").name),
    }[level]
    if level == "file":  # with the checksum of what the link leads to
        shutil.copy(theirs / "libgpt2_kernels_cpu.json", ours.parent)
    os.rename(here, tmp_path / "away")
    here.symlink_to(there)
    lines(capfd)
    reason = toy.start_again()
    assert not marker.exists()
    if level == "cpu":
        assert reason == f"the cache has a symbolic link at {here}, which is not followed"
        return
    assert reason is None and toy.compiled() == 2, "built anew"
    assert not ours.is_symlink() and not ours.parent.is_symlink()
    assert lines(capfd)[0].endswith("; not used")
    assert there.exists(), "what the link led to is left alone"


def test_a_link_above_the_root_is_resolved_once(toy, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(tmp_path / "link" / "cache"))
    assert native.build().is_relative_to(tmp_path / "real" / "cache")


@pytest.mark.parametrize("level", ["cpu", "entry", "file", "record"])
def test_what_others_can_write_is_not_trusted(level, toy, capfd):
    ours = native.build()
    path, mode = {
        "cpu": (toy.cache / "cpu", 0o702),
        "entry": (ours.parent, 0o702),
        "file": (ours, 0o722),
        "record": (ours.with_suffix(".json"), 0o602),
    }[level]
    path.chmod(mode)
    lines(capfd)
    reason = toy.start_again()
    if level == "cpu":
        assert reason == f"others can write to the cache {path}; chmod go-w {path}"
    else:
        assert reason is None and toy.compiled() == 2, "built anew"
        assert "others can write to " in lines(capfd)[0]
        assert toy.start_again() is None and toy.compiled() == 2


@pytest.mark.parametrize(
    "group, members, trusted",
    [("ann", [], True), ("ann", ["ann"], True), ("ann", ["bob"], False), ("staff", [], False)],
)
def test_a_group_of_this_user_alone_is_nobody_else(group, members, trusted, toy, monkeypatch):
    """Many systems have a group for each user and a umask of 002: ~/.cache is writable by it."""
    native.build()
    gid = toy.cache.stat().st_gid
    monkeypatch.setattr(_private, "ACCOUNTS", toy.csrc / "none")  # not this machine's
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_gid=gid, pw_name="ann"))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_mem=members))
    toy.cache.chmod(0o770)
    reason = toy.start_again()
    assert reason is None if trusted else reason.startswith("others can write to the cache")


@pytest.fixture
def own_group(monkeypatch, toy, tmp_path):
    """The group of the cache seems to be this user's alone."""
    gid, accounts = toy.csrc.stat().st_gid, tmp_path / "passwd"
    accounts.write_text(f"ann:x:{os.geteuid()}:{gid}:Ann:/home/ann:/bin/sh\n\nodd\n")
    monkeypatch.setattr(_private, "ACCOUNTS", accounts)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_gid=gid, pw_name="ann"))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name="ann", gr_mem=[]))
    return accounts


@pytest.mark.parametrize("level", ["folder", "file"])
def test_an_access_list_lets_others_write(level, toy, own_group, capfd):
    """It shows as the write bit of the group, which was this user's own."""
    library = native.build()
    path = toy.cache if level == "folder" else library
    path.chmod(0o770)
    assert toy.start_again() is None, "the group alone is trusted"
    none = 2**32 - 1
    entries = [(1, 7, none), (2, 7, STRANGER), (4, 7, none), (16, 7, none), (32, 0, none)]
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)
    except (AttributeError, OSError) as error:
        pytest.skip(f"no access lists here: {error}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o770
    lines(capfd)
    reason = toy.start_again()
    if level == "folder":
        assert reason == f"others can write to the cache {path}; chmod go-w {path}"
    else:
        assert reason is None and lines(capfd)[0].endswith(f"others can write to {path}; not used")
    path.chmod(0o700)  # what the message says to do takes the right from the whole list
    assert toy.start_again() is None


def test_a_group_that_is_another_accounts_first(toy, own_group):
    """Its own list of members does not name those."""
    native.build()
    toy.cache.chmod(0o770)
    assert toy.start_again() is None
    gid = toy.cache.stat().st_gid
    with own_group.open("a") as file:
        file.write(f"bob:x:{STRANGER}:{gid}:Bob:/home/bob:/bin/sh\n")
    assert toy.start_again().startswith("others can write to the cache")


def owned_by(monkeypatch, path: Path, user: int) -> None:
    """Lets path seem to be of another user: only root can give a file away."""
    fstat, target = os.fstat, path.stat()

    def pretended(handle):
        found = fstat(handle)
        if not os.path.samestat(found, target):
            return found
        values = list(found)
        values[stat.ST_UID] = user
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", pretended)


def test_roots_files_are_trusted_and_other_users_are_not(toy, monkeypatch, tmp_path):
    ours = native.build()
    with monkeypatch.context() as patch:
        owned_by(patch, toy.cache, 0)
        assert toy.start_again() is None
    for path, which in (
        (toy.cache, f"the cache {toy.cache} belongs"),
        (toy.cache / "cpu", f"the cache {toy.cache / 'cpu'} belongs"),
        (tmp_path, f"{tmp_path}, which holds the cache {toy.cache}, belongs"),
    ):
        with monkeypatch.context() as patch:
            owned_by(patch, path, STRANGER)
            assert toy.start_again() == (
                f"{which} to user {STRANGER}, not to {os.geteuid()} who runs this; "
                f"set GPT2_KERNELS_CACHE to a folder of your own"
            )
    with monkeypatch.context() as patch:
        owned_by(patch, ours, STRANGER)
        assert toy.start_again() is None and toy.compiled() == 2


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.skipif(
    not ROOT_USER, reason="only root can give a folder away"))])  # fmt: skip
def test_root_with_another_users_home(real, toy, monkeypatch, tmp_path):
    """As after sudo, which keeps HOME: root's files in that home would lock its owner out."""
    home = tmp_path / "alice"
    home.mkdir()
    if real:
        os.chown(home, STRANGER, STRANGER)
    else:
        owned_by(monkeypatch, home, STRANGER)
    monkeypatch.delenv("GPT2_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    reason = native.load()
    cache = home / ".cache/gpt2-kernels"
    assert reason == (
        f"{home}, which holds the cache {cache}, belongs to user {STRANGER}, not to "
        f"{os.geteuid()} who runs this; set GPT2_KERNELS_CACHE to a folder of your own"
    )
    with pytest.raises(native.BuildError, match=f"belongs to user {STRANGER}"):
        native.build()
    assert not list(home.iterdir()) and not toy.compiled()


def test_the_caches_layout_is_private_whatever_the_umask(toy):
    old = os.umask(0)
    try:
        library = native.build()
    finally:
        os.umask(old)
    for path in (toy.cache, *toy.cache.rglob("*")):
        assert not path.stat().st_mode & 0o022, path
    assert toy.start_again() is None and toy.compiled() == 1
    assert library.parent.stat().st_mode & 0o777 == 0o700


def test_without_proc_the_path_is_loaded(toy, monkeypatch):
    monkeypatch.setattr(_private, "_leads_to", lambda *args: False)
    assert native.load() is None


def test_two_libraries_are_two(toy):
    """Under one name the dynamic loader opens one: descriptors are numbered anew."""
    source = '__attribute__((visibility("default"))) int {}() {{ return {}; }}'
    libraries, handles, cdll = [], [], ctypes.CDLL
    for name, answer in (("first", 42), ("other", 43)):
        toy.source.write_text(f'extern "C" {source.format(name, answer)}\n')
        libraries.append(native.build())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_private.ctypes, "CDLL", lambda name: handles.append(cdll(name)))
        patch.setattr(os, "dup", lambda handle: handle)
        for library in libraries:
            with _private.open_file(library) as file:
                file.load()
    assert handles[0].first() == 42 and handles[1].other() == 43
