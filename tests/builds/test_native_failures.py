"""Every way in which building, caching or loading csrc can fail: there is one reason, nothing is
lost, and the next start works. With a small library in place of csrc (small_library.py)."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_library import change_compiler, lines, needs_compiler

from gpt2.kernels import __main__ as command_line
from gpt2.kernels.native import build_cache, compiler, libraries, trust

pytestmark = needs_compiler


# ---- missing parts of a machine


def test_no_compiler(small, monkeypatch):
    small.without_compiler()
    assert small.start_again() == (
        "no C++ compiler: CXX is '/nonexistent/c++', which cannot be run"
    )
    monkeypatch.setenv("CXX", "'c++")
    assert small.start_again() == 'no C++ compiler: CXX is "\'c++", which cannot be run'
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    reason = "no C++ compiler: none of c++, g++, clang++ is on PATH; set CXX"
    assert small.start_again() == reason
    with pytest.raises(libraries.BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ is on PATH"):
        libraries.build()


def test_a_compiler_may_come_with_arguments(small, monkeypatch):
    monkeypatch.setenv("CXX", f"{small.compiler} -DMINE='a b'")
    assert libraries.load() is None
    assert small.calls.read_text().startswith("-DMINE=a b -std=c++20 ")


def test_no_ninja(small, monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None if name == "ninja" else name)
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert libraries.load() == "ninja is missing: pip install ninja"
    assert small.start_again() == "ninja is missing: pip install ninja"
    monkeypatch.undo()


def test_a_compiler_that_fails(small, capfd):
    small.source.write_text("int fine;\nint x = nonsense;\n")
    reason = libraries.load()
    told = re.fullmatch(
        r"the C\+\+ compiler failed: (?P<error>.*) "
        r"\(log: (?P<log>.*); to try again: python -m gpt2\.kernels build\)",
        reason,
    )
    assert told["error"].startswith("small.cpp:2:9: error: ") and "nonsense" in told["error"]
    log = Path(told["log"]).read_text()
    assert log.startswith(reason) and "-c small.cpp" in log and "small.cpp:2:9: error: " in log
    # The next process does not retry the same build; the command does, and so does a changed one.
    lines(capfd)
    assert small.start_again() == reason and small.compiled() == 1
    assert lines(capfd) == []
    with pytest.raises(libraries.BuildError, match=r"small\.cpp:2:9: error"):
        libraries.build()
    assert small.compiled() == 2
    change_compiler(small)
    assert small.start_again() != reason and small.compiled() == 3
    small.source.write_text("int x;\n")
    assert small.start_again() is None


@pytest.mark.parametrize(
    "script, shown",
    [
        ("exit 1", "it gave no message"),
        ("echo Segmentation fault; exit 139", "Segmentation fault"),
        ("echo odd; echo 'x: error: '$(printf '%0300d' 1); echo no; exit 1", "x: error: 000"),
        ("exit 0", "it gave no message"),
    ],
    ids=["silent", "crash", "long", "writes nothing"],
)
def test_whatever_a_compiler_says_becomes_one_line(small, script, shown):
    small.compiler.write_text(f"#!/bin/sh\n{script}\n")
    reason = libraries.load()
    error = reason.removeprefix("the C++ compiler failed: ").partition(" (log: ")[0]
    assert error.startswith(shown) and len(error) <= 160 and "\n" not in reason


def test_what_is_undefined_is_found_when_it_is_linked(small):
    small.source.write_text('int elsewhere();\nextern "C" int small() { return elsewhere(); }\n')
    assert "undefined reference to `elsewhere()'" in libraries.load()


def test_a_failed_force_keeps_what_works(small):
    library = libraries.build()
    small.fail.touch()
    with pytest.raises(libraries.BuildError, match="it gave no message"):
        libraries.build(force=True)
    assert libraries.build() == library and small.start_again() is None


@pytest.mark.parametrize("place", ["/proc/gpt2-kernels", "file/cache"])
def test_a_cache_that_cannot_be_written(small, place, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(tmp_path / place))
    reason = libraries.load()
    assert reason.startswith("the cache cannot be written (") and str(tmp_path / place) in reason
    assert reason.endswith("; set GPT2_KERNELS_CACHE to a folder that can") and not small.compiled()
    with pytest.raises(libraries.BuildError, match="the cache cannot be written"):
        libraries.build()


def test_a_read_only_cache_still_serves(small, monkeypatch):
    libraries.build()

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    def read_only_open(path, flags, *args, **kwargs):
        return (read_only if flags & (os.O_WRONLY | os.O_RDWR) else opened)(
            path, flags, *args, **kwargs
        )

    opened = os.open
    for name in ("mkdir", "replace", "rename"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(os, "open", read_only_open)
    assert small.start_again() is None
    monkeypatch.setattr(compiler, "identity", lambda tools: "another one")
    assert "the cache cannot be written ([Errno 30] Read-only file system)" in small.start_again()


def test_a_full_disk(small, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(build_cache, "flush", full)
    assert "No space left on device" in libraries.load()
    monkeypatch.undo()


class Broken(io.StringIO):
    """A terminal that was closed."""

    def isatty(self):
        return True

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


STDERRS = {"no space": Full, "closed": closed, "broken": Broken, "none": lambda: None}


@pytest.mark.parametrize("stderr", STDERRS.values(), ids=STDERRS)
def test_a_stderr_that_takes_nothing(small, stderr, monkeypatch):
    """The kernels were refused, because of "No space left on device"."""
    monkeypatch.setattr(sys, "stderr", stderr())
    assert libraries.load() is None and small.compiled() == 1
    libraries.build().with_suffix(".json").unlink()
    assert small.start_again() is None and small.compiled() == 2, "no word of the damage"


def test_the_cache_is_private(small, monkeypatch):
    old = os.umask(0)
    try:
        libraries.build()
    finally:
        os.umask(old)
    for folder in (small.cache, small.cache / "cpu"):
        assert folder.stat().st_mode & 0o777 == 0o700
    small.cache.chmod(0o757)
    assert (
        small.start_again()
        == f"others can write to the cache {small.cache}; chmod go-w {small.cache}"
    )
    small.cache.chmod(0o755)
    assert small.start_again() is None


def test_where_the_cache_is(small, monkeypatch, tmp_path):
    monkeypatch.delenv("GPT2_KERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build_cache.find_root() == tmp_path / "xdg/gpt2-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # its specification says to ignore this
    assert build_cache.find_root() == tmp_path / "home/.cache/gpt2-kernels"
    assert libraries.build().is_relative_to(tmp_path / "home/.cache/gpt2-kernels")


def test_a_user_without_a_home(small, monkeypatch, tmp_path):
    """As in a container that runs under a numeric user: no folder named ~ may be created."""
    for name in ("GPT2_KERNELS_CACHE", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert libraries.load() == "there is no home folder for a cache; set GPT2_KERNELS_CACHE"
    assert not (tmp_path / "~").exists()


def test_a_cache_below_the_home_folder(small, monkeypatch, tmp_path):
    """Docker and .env files do not expand ~: a folder of that name was created."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GPT2_KERNELS_CACHE", "~/x")
    assert libraries.build().is_relative_to(tmp_path / "home/x")
    monkeypatch.setenv("GPT2_KERNELS_CACHE", "~nobody-of-this-name/x")
    reason = "the cache '~nobody-of-this-name/x' is in no known home; set GPT2_KERNELS_CACHE"
    assert small.start_again() == reason
    assert not list(tmp_path.glob("~*"))


@pytest.mark.parametrize("levels", [20, 30])
def test_a_cache_whose_path_is_too_long(small, levels, monkeypatch, tmp_path):
    """The compiler failed on paths of 4,000 bytes, without a message."""
    cache = str(tmp_path) + ("/" + "a" * 150) * levels
    monkeypatch.setenv("GPT2_KERNELS_CACHE", cache)
    reason = libraries.load()
    assert reason == (
        f"the cache {cache[:60]!r}... has a path of {len(cache)} bytes, more than 3000; "
        f"set GPT2_KERNELS_CACHE to a folder of your own"
    )
    assert not list(tmp_path.glob("a*")) and not small.compiled()


def test_a_cache_of_a_long_path(small, monkeypatch, tmp_path):
    cache = str(tmp_path)
    while len(cache) + 200 <= trust.PATH_BYTES:
        cache += "/" + "a" * 199
    monkeypatch.setenv("GPT2_KERNELS_CACHE", cache)
    assert libraries.load() is None


def test_windows(small, monkeypatch):
    monkeypatch.setattr(build_cache, "fcntl", None)
    assert libraries.load() == "needs Linux or macOS"
    with pytest.raises(libraries.BuildError, match="needs Linux or macOS"):
        libraries.build()


def test_a_source_is_missing(small):
    small.source.unlink()
    assert libraries.load() == f"the source file {small.source} is missing"


def test_a_path_that_is_not_utf_8(small, monkeypatch, tmp_path, capfd):
    """Linux allows any bytes in a path; this raised a UnicodeEncodeError."""
    cache = os.fsdecode(os.fsencode(tmp_path) + b"/not-\xff-utf-8")
    monkeypatch.setenv("GPT2_KERNELS_CACHE", cache)
    try:
        os.makedirs(cache, mode=0o700)
    except OSError as error:
        pytest.skip(f"not on this file system: {error}")
    assert libraries.load() is None and str(libraries.build()).startswith(cache)
    monkeypatch.setattr(sys, "argv", ["kernels", "build"])
    lines(capfd)
    assert command_line.main() == 0
    assert "/not-\\udcff-utf-8/cpu/" in capfd.readouterr().out
    small.source.write_text("int x = nonsense;\n")
    reason = small.start_again()
    assert reason.isprintable() and "nonsense" in reason and "/not-\\udcff-utf-8/" in reason


@pytest.mark.parametrize("out", ["/a\0", "a\ud800"], ids=["NUL", "surrogate"])
def test_an_out_that_is_no_path(small, out):
    with pytest.raises(
        libraries.BuildError, match="out must be the path of a folder, got '"
    ) as told:
        libraries.build(out=Path(out))
    assert str(told.value).isprintable() and not small.compiled()


@pytest.mark.parametrize("place", ["stray", "entry"])
def test_a_folder_that_nests_too_deeply_to_be_removed(small, place, request):
    """load() raised a RecursionError."""
    entry = libraries.build().parent
    libraries._reasons.clear()
    deep = entry if place == "entry" else entry.with_name("tmp-x")
    if place == "entry":
        shutil.rmtree(entry)
    deep.mkdir(mode=0o700)
    # Python, and therefore pytest, could not remove it either.
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", small.cache], check=True))
    (deep / "file").touch()
    (deep / "link").symlink_to(small.csrc)
    handle = os.open(deep, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=handle)
        below = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = below
    os.close(handle)
    if place == "stray":
        shutil.rmtree(entry)
    assert libraries.load() is None and small.source.exists()
    assert sorted(path.name for path in entry.parent.iterdir()) == sorted([entry.name, "lock"])


def test_an_unknown_library():
    for function in (libraries.load, libraries.build):
        with pytest.raises(ValueError, match=r"name must be one of cpu.*, got 'gpu'"):
            function("gpu")


# ---- damaged files


# ---- sanitizers
