"""Every way in which building, caching or loading csrc can fail: one reason, nothing lost, and the
next start works. On a small library in place of csrc (toy.py)."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import COMPILER, change_compiler, lines, needs_compiler, sanitize

from gpt2.kernels import __main__ as command_line
from gpt2.kernels import _build, _cache, _private, native

ROOT = Path(__file__).resolve().parents[1]

pytestmark = needs_compiler


# ---- what a machine can lack


def test_no_compiler(toy, monkeypatch):
    toy.without_compiler()
    assert toy.start_again() == ("no C++ compiler: CXX is '/nonexistent/c++', which cannot be run")
    monkeypatch.setenv("CXX", "'c++")
    assert toy.start_again() == 'no C++ compiler: CXX is "\'c++", which cannot be run'
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    reason = "no C++ compiler: none of c++, g++, clang++ is on PATH; set CXX"
    assert toy.start_again() == reason
    with pytest.raises(native.BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ is on PATH"):
        native.build()


def test_a_compiler_may_come_with_arguments(toy, monkeypatch):
    monkeypatch.setenv("CXX", f"{toy.compiler} -DMINE='a b'")
    assert native.load() is None
    assert toy.calls.read_text().startswith("-DMINE=a b -std=c++20 ")


def test_no_ninja(toy, monkeypatch):
    monkeypatch.setattr(_build.shutil, "which", lambda name: None if name == "ninja" else name)
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert native.load() == "ninja is missing: pip install ninja"
    assert toy.start_again() == "ninja is missing: pip install ninja"
    monkeypatch.undo()


def test_a_compiler_that_fails(toy, capfd):
    toy.source.write_text("int fine;\nint x = nonsense;\n")
    reason = native.load()
    told = re.fullmatch(
        r"the C\+\+ compiler failed: (?P<error>.*) "
        r"\(log: (?P<log>.*); to try again: python -m gpt2\.kernels build\)",
        reason,
    )
    assert told["error"].startswith("toy.cpp:2:9: error: ") and "nonsense" in told["error"]
    log = Path(told["log"]).read_text()
    assert log.startswith(reason) and "-c toy.cpp" in log and "toy.cpp:2:9: error: " in log
    # The next process doesn't try the same again; the command does; a change is a new chance.
    lines(capfd)
    assert toy.start_again() == reason and toy.compiled() == 1
    assert lines(capfd) == []
    with pytest.raises(native.BuildError, match=r"toy\.cpp:2:9: error"):
        native.build()
    assert toy.compiled() == 2
    change_compiler(toy)
    assert toy.start_again() != reason and toy.compiled() == 3
    toy.source.write_text("int x;\n")
    assert toy.start_again() is None


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
def test_whatever_a_compiler_says_becomes_one_line(toy, script, shown):
    toy.compiler.write_text(f"#!/bin/sh\n{script}\n")
    reason = native.load()
    error = reason.removeprefix("the C++ compiler failed: ").partition(" (log: ")[0]
    assert error.startswith(shown) and len(error) <= 160 and "\n" not in reason


def test_what_is_undefined_is_found_when_it_is_linked(toy):
    toy.source.write_text('int elsewhere();\nextern "C" int toy() { return elsewhere(); }\n')
    assert "undefined reference to `elsewhere()'" in native.load()


def test_a_failed_force_keeps_what_works(toy):
    library = native.build()
    toy.fail.touch()
    with pytest.raises(native.BuildError, match="it gave no message"):
        native.build(force=True)
    assert native.build() == library and toy.start_again() is None


@pytest.mark.parametrize("place", ["/proc/gpt2-kernels", "file/cache"])
def test_a_cache_that_cannot_be_written(toy, place, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(tmp_path / place))
    reason = native.load()
    assert reason.startswith("the cache cannot be written (") and str(tmp_path / place) in reason
    assert reason.endswith("; set GPT2_KERNELS_CACHE to a folder that can") and not toy.compiled()
    with pytest.raises(native.BuildError, match="the cache cannot be written"):
        native.build()


def test_a_read_only_cache_still_serves(toy, monkeypatch):
    native.build()

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
    assert toy.start_again() is None
    monkeypatch.setattr(_build, "identity", lambda compiler: "another one")
    assert "the cache cannot be written ([Errno 30] Read-only file system)" in toy.start_again()


def test_a_full_disk(toy, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(_cache, "flush", full)
    assert "No space left on device" in native.load()
    monkeypatch.undo()


class Broken(io.StringIO):
    """A terminal that has gone."""

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
def test_a_stderr_that_takes_nothing(toy, stderr, monkeypatch):
    """The kernels were refused, because of "No space left on device"."""
    monkeypatch.setattr(sys, "stderr", stderr())
    assert native.load() is None and toy.compiled() == 1
    lose_the_checksum(native.build())
    assert toy.start_again() is None and toy.compiled() == 2, "no word of the damage"


def test_the_cache_is_private(toy, monkeypatch):
    old = os.umask(0)
    try:
        native.build()
    finally:
        os.umask(old)
    for folder in (toy.cache, toy.cache / "cpu"):
        assert folder.stat().st_mode & 0o777 == 0o700
    toy.cache.chmod(0o757)
    assert toy.start_again() == f"others can write to the cache {toy.cache}; chmod go-w {toy.cache}"
    toy.cache.chmod(0o755)
    assert toy.start_again() is None


def test_where_the_cache_is(toy, monkeypatch, tmp_path):
    monkeypatch.delenv("GPT2_KERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _cache.find_root() == tmp_path / "xdg/gpt2-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert _cache.find_root() == tmp_path / "home/.cache/gpt2-kernels"
    assert native.build().is_relative_to(tmp_path / "home/.cache/gpt2-kernels")


def test_a_user_without_a_home(toy, monkeypatch, tmp_path):
    """As in a container that runs under a number: nothing may land in a folder named ~."""
    for name in ("GPT2_KERNELS_CACHE", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert native.load() == "there is no home folder for a cache; set GPT2_KERNELS_CACHE"
    assert not (tmp_path / "~").exists()


def test_a_cache_below_the_home_folder(toy, monkeypatch, tmp_path):
    """Docker and .env files expand no ~: a folder of that name was made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GPT2_KERNELS_CACHE", "~/x")
    assert native.build().is_relative_to(tmp_path / "home/x")
    monkeypatch.setenv("GPT2_KERNELS_CACHE", "~nobody-of-this-name/x")
    reason = "the cache '~nobody-of-this-name/x' is in no known home; set GPT2_KERNELS_CACHE"
    assert toy.start_again() == reason
    assert not list(tmp_path.glob("~*"))


@pytest.mark.parametrize("levels", [20, 30])
def test_a_cache_whose_path_is_too_long(toy, levels, monkeypatch, tmp_path):
    """The compiler failed on 4,000 bytes, without a message."""
    cache = str(tmp_path) + ("/" + "a" * 150) * levels
    monkeypatch.setenv("GPT2_KERNELS_CACHE", cache)
    reason = native.load()
    assert reason == (
        f"the cache {cache[:60]!r}... has a path of {len(cache)} bytes, more than 3000; "
        f"set GPT2_KERNELS_CACHE to a folder of your own"
    )
    assert not list(tmp_path.glob("a*")) and not toy.compiled()


def test_a_cache_of_a_long_path(toy, monkeypatch, tmp_path):
    cache = str(tmp_path)
    while len(cache) + 200 <= _private.PATH_BYTES:
        cache += "/" + "a" * 199
    monkeypatch.setenv("GPT2_KERNELS_CACHE", cache)
    assert native.load() is None


def test_windows(toy, monkeypatch):
    monkeypatch.setattr(_cache, "fcntl", None)
    assert native.load() == "needs Linux or macOS"
    with pytest.raises(native.BuildError, match="needs Linux or macOS"):
        native.build()


def test_a_source_is_missing(toy):
    toy.source.unlink()
    assert native.load() == f"the source file {toy.source} is missing"


def test_a_path_that_is_not_utf_8(toy, monkeypatch, tmp_path, capfd):
    """Linux takes any bytes: it was a UnicodeEncodeError."""
    cache = os.fsdecode(os.fsencode(tmp_path) + b"/not-\xff-utf-8")
    monkeypatch.setenv("GPT2_KERNELS_CACHE", cache)
    try:
        os.makedirs(cache, mode=0o700)
    except OSError as error:
        pytest.skip(f"not on this file system: {error}")
    assert native.load() is None and str(native.build()).startswith(cache)
    monkeypatch.setattr(sys, "argv", ["kernels", "build"])
    lines(capfd)
    assert command_line.main() == 0
    assert "/not-\\udcff-utf-8/cpu/" in capfd.readouterr().out
    toy.source.write_text("int x = nonsense;\n")
    reason = toy.start_again()
    assert reason.isprintable() and "nonsense" in reason and "/not-\\udcff-utf-8/" in reason


@pytest.mark.parametrize("out", ["/a\0", "a\ud800"], ids=["NUL", "surrogate"])
def test_an_out_that_is_no_path(toy, out):
    with pytest.raises(native.BuildError, match="out must be the path of a folder, got '") as told:
        native.build(out=Path(out))
    assert str(told.value).isprintable() and not toy.compiled()


@pytest.mark.parametrize("place", ["stray", "entry"])
def test_a_folder_that_nests_too_deeply_to_be_removed(toy, place, request):
    """It was a RecursionError out of load()."""
    entry = native.build().parent
    native._reasons.clear()
    deep = entry if place == "entry" else entry.with_name("tmp-x")
    if place == "entry":
        shutil.rmtree(entry)
    deep.mkdir(mode=0o700)
    # Python, and so pytest, could not remove it either.
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", toy.cache], check=True))
    (deep / "file").touch()
    (deep / "link").symlink_to(toy.csrc)
    handle = os.open(deep, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=handle)
        below = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = below
    os.close(handle)
    if place == "stray":
        shutil.rmtree(entry)
    assert native.load() is None and toy.source.exists()
    assert sorted(path.name for path in entry.parent.iterdir()) == sorted([entry.name, "lock"])


def test_an_unknown_library():
    for function in (native.load, native.build):
        with pytest.raises(ValueError, match=r"name must be one of cpu.*, got 'gpu'"):
            function("gpu")


# ---- damaged files


def truncate(library):
    os.truncate(library, library.stat().st_size // 2)


def flip_a_bit(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def lose_the_checksum(library):
    library.with_suffix(".json").unlink()


def write_nonsense_as_checksum(library):
    library.with_suffix(".json").write_text("[1, 2")


def write_a_list_as_checksum(library):
    library.with_suffix(".json").write_text("[1, 2]")


DAMAGES = [truncate, flip_a_bit, lose_the_checksum, write_nonsense_as_checksum,
           write_a_list_as_checksum]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_cache_is_built_again(toy, damage, capfd):
    library = native.build()
    damage(library)
    lines(capfd)
    assert toy.start_again() is None and toy.compiled() == 2
    said = lines(capfd)
    assert said[0].startswith(f"gpt2-kernels: {library} ") and said[0].endswith("; not used")
    assert toy.start_again() is None and toy.compiled() == 2


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_shipped_library_is_not_used(toy, damage, capfd):
    damage(native.build(out=toy.shipped))
    lines(capfd)
    assert toy.start_again() is None
    assert toy.loaded_last().is_relative_to(toy.cache)
    assert lines(capfd)[0].startswith(f"gpt2-kernels: {toy.shipped}/libgpt2_kernels_cpu.so ")


def write_library_that_does_not_load(library: Path) -> None:
    library.write_bytes(b"no library at all")
    record = json.loads(library.with_suffix(".json").read_text())
    record["sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
    library.with_suffix(".json").write_text(json.dumps(record))


def test_a_sound_library_that_does_not_load(toy):
    library = native.build()
    write_library_that_does_not_load(library)
    reason = toy.start_again()
    assert reason.startswith(f"{library} cannot be loaded: {library}: ") and "\n" not in reason


def test_a_shipped_library_that_does_not_load(toy, capfd):
    write_library_that_does_not_load(native.build(out=toy.shipped))
    lines(capfd)
    assert toy.start_again() is None and toy.loaded_last().is_relative_to(toy.cache)
    assert "libgpt2_kernels_cpu.so cannot be loaded: " in lines(capfd)[0]


# ---- sanitizers


PLANTED = """
#pragma GCC visibility push(default)
extern "C" int item(int i) { int row[4] = {1, 2, 3, 4}; int* volatile p = row; return p[i]; }
extern "C" int after_last(int i) { return 2147483647 + i; }
"""


@pytest.mark.parametrize(
    "call, stopped_by",
    [
        ("item(3)", None),
        ("after_last(0)", None),
        ("item(4)", "AddressSanitizer: stack-buffer-overflow"),
        ("after_last(1)", "runtime error: signed integer overflow"),
    ],
)
def test_sanitizers_stop_what_is_planted(toy, call, stopped_by):
    """With the runtimes that make sanitize puts before Python's own libraries."""
    recipe = subprocess.run(
        ["make", "-n", "sanitize", f"CXX={COMPILER}"], capture_output=True, text=True, cwd=ROOT
    )
    runtimes = re.search('LD_PRELOAD="(.*?)"', recipe.stdout)[1]
    if not all(Path(runtime).is_absolute() for runtime in runtimes.split()):
        pytest.skip(f"the compiler has no sanitizers: {runtimes}")
    sanitize(toy)
    toy.source.write_text(PLANTED)
    code = f"import ctypes; ctypes.CDLL({str(native.build())!r}).{call}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {
            "LD_PRELOAD": runtimes, "ASAN_OPTIONS": "detect_leaks=0",
            "LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib"),
        },
    )  # fmt: skip
    if stopped_by is None:
        assert done.returncode == 0 and done.stderr == ""
    else:
        assert done.returncode != 0 and stopped_by in done.stderr
