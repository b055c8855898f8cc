"""Which owners, groups and access lists the cache of native libraries trusts."""

import grp
import os
import pwd
import stat
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_library import lines, needs_compiler

from gpt2.kernels.native import libraries, trust

pytestmark = needs_compiler
ROOT_USER = os.geteuid() == 0
STRANGER = os.geteuid() + 4242


@pytest.mark.parametrize(
    "group, members, trusted",
    [("ann", [], True), ("ann", ["ann"], True), ("ann", ["bob"], False), ("staff", [], False)],
)
def test_a_group_of_this_user_alone_is_nobody_else(group, members, trusted, small, monkeypatch):
    """Many systems have a group for each user and a umask of 002: ~/.cache is writable by it."""
    libraries.build()
    gid = small.cache.stat().st_gid
    monkeypatch.setattr(trust, "ACCOUNTS", small.csrc / "none")  # not this machine's
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_gid=gid, pw_name="ann"))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_mem=members))
    small.cache.chmod(0o770)
    reason = small.start_again()
    assert reason is None if trusted else reason.startswith("others can write to the cache")


@pytest.fixture
def own_group(monkeypatch, small, tmp_path):
    """The group of the cache seems to be this user's alone."""
    gid, accounts = small.csrc.stat().st_gid, tmp_path / "passwd"
    accounts.write_text(f"ann:x:{os.geteuid()}:{gid}:Ann:/home/ann:/bin/sh\n\nodd\n")
    monkeypatch.setattr(trust, "ACCOUNTS", accounts)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_gid=gid, pw_name="ann"))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name="ann", gr_mem=[]))
    return accounts


@pytest.mark.parametrize("level", ["folder", "file"])
def test_an_access_list_lets_others_write(level, small, own_group, capfd):
    """It shows as the write bit of the group, which was this user's own."""
    library = libraries.build()
    path = small.cache if level == "folder" else library
    path.chmod(0o770)
    assert small.start_again() is None, "the group alone is trusted"
    none = 2**32 - 1
    entries = [(1, 7, none), (2, 7, STRANGER), (4, 7, none), (16, 7, none), (32, 0, none)]
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)
    except (AttributeError, OSError) as error:
        pytest.skip(f"no access lists here: {error}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o770
    lines(capfd)
    reason = small.start_again()
    if level == "folder":
        assert reason == f"others can write to the cache {path}; chmod go-w {path}"
    else:
        assert reason is None and lines(capfd)[0].endswith(f"others can write to {path}; not used")
    path.chmod(0o700)  # what the message says to do takes the right from the whole list
    assert small.start_again() is None


def test_a_group_that_is_another_accounts_first(small, own_group):
    """Its own list of members does not name those."""
    libraries.build()
    small.cache.chmod(0o770)
    assert small.start_again() is None
    gid = small.cache.stat().st_gid
    with own_group.open("a") as file:
        file.write(f"bob:x:{STRANGER}:{gid}:Bob:/home/bob:/bin/sh\n")
    assert small.start_again().startswith("others can write to the cache")


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


def test_roots_files_are_trusted_and_other_users_are_not(small, monkeypatch, tmp_path):
    ours = libraries.build()
    with monkeypatch.context() as patch:
        owned_by(patch, small.cache, 0)
        assert small.start_again() is None
    for path, which in (
        (small.cache, f"the cache {small.cache} belongs"),
        (small.cache / "cpu", f"the cache {small.cache / 'cpu'} belongs"),
        (tmp_path, f"{tmp_path}, which holds the cache {small.cache}, belongs"),
    ):
        with monkeypatch.context() as patch:
            owned_by(patch, path, STRANGER)
            assert small.start_again() == (
                f"{which} to user {STRANGER}, not to {os.geteuid()} who runs this; "
                f"set GPT2_KERNELS_CACHE to a folder of your own"
            )
    with monkeypatch.context() as patch:
        owned_by(patch, ours, STRANGER)
        assert small.start_again() is None and small.compiled() == 2


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.skipif(
    not ROOT_USER, reason="only root can give a folder away"))])  # fmt: skip
def test_root_with_another_users_home(real, small, monkeypatch, tmp_path):
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
    reason = libraries.load()
    cache = home / ".cache/gpt2-kernels"
    assert reason == (
        f"{home}, which holds the cache {cache}, belongs to user {STRANGER}, not to "
        f"{os.geteuid()} who runs this; set GPT2_KERNELS_CACHE to a folder of your own"
    )
    with pytest.raises(libraries.BuildError, match=f"belongs to user {STRANGER}"):
        libraries.build()
    assert not list(home.iterdir()) and not small.compiled()
