"""How csrc becomes a loaded library: built once, cached, verified, and every way this can fail.

Each test has a small library of its own in place of csrc, a cache of its own, and a compiler that
notes what it is asked; what is said of the real csrc runs with --full.
"""

import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.kernels import __main__ as command_line
from gpt2.kernels import _build, native

ROOT = Path(__file__).resolve().parents[1]
COMPILER = next(filter(None, map(shutil.which, _build.COMPILERS)), None)

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(native.fcntl is None, reason="needs Linux or macOS"),
]


class Toy:
    """A library of one file that takes a tenth of a second, and where it is built."""

    def __init__(self, folder: Path, monkeypatch):
        self.csrc, self.cache, self.shipped = (folder / x for x in ("csrc", "cache", "lib"))
        self.csrc.mkdir()
        self.source, self.header = self.csrc / "toy.cpp", self.csrc / "toy.h"
        self.header.write_text("inline int answer() { return 42; }\n")
        self.source.write_text('#include "toy.h"\nextern "C" int toy() { return answer(); }\n')
        self.calls, self.hold, self.fail = (folder / x for x in ("calls", "hold", "fail"))
        self.compiler = folder / "noting-c++"
        self.write_compiler(self.compiler)
        self.library = _build.Library("the toy", {"toy.cpp": ()}, ("*.h",))
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(_build, "CSRC", self.csrc)
        monkeypatch.setattr(_build, "LIBRARIES", {"cpu": self.library})
        monkeypatch.setattr(native, "SHIPPED", self.shipped)
        monkeypatch.setattr(native, "_reasons", {})
        monkeypatch.setenv("GPT2_KERNELS_CACHE", str(self.cache))
        monkeypatch.setenv("CXX", shlex.quote(str(self.compiler)))
        monkeypatch.delenv("GPT2_KERNELS_SANITIZE", raising=False)

    def write_compiler(self, path: Path) -> None:
        """Notes each call, lasts for as long as the file `hold` is there, fails if `fail` is."""
        calls, hold, fail = (shlex.quote(str(x)) for x in (self.calls, self.hold, self.fail))
        path.write_text(
            f'#!/bin/sh\necho "$@" >> {calls}\n'
            f"for i in $(seq 1200); do [ -e {hold} ] || break; sleep 0.05; done\n"
            f'[ -e {fail} ] && exit 1\nexec {COMPILER} "$@"\n'
        )
        path.chmod(0o755)

    def compiled(self) -> int:
        """How often a source was compiled."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return sum(" -c " in line for line in lines)

    def start_again(self) -> str | None:
        """load(), as a new process calls it."""
        native._reasons.clear()
        return native.load()

    def built(self) -> list[Path]:
        return sorted(self.cache.glob("cpu/*/*.so"))

    def without_compiler(self) -> None:
        self.monkeypatch.setenv("CXX", "/nonexistent/c++")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    toy = Toy(tmp_path, monkeypatch)
    yield toy
    toy.hold.unlink(missing_ok=True)  # a test that failed leaves nobody waiting


def lines(captured) -> list[str]:
    return captured.readouterr().err.splitlines()


# ---- the first use, and those after it


def test_first_use_builds_and_says_so(toy, capfd):
    assert native.load() is None
    said = lines(capfd)
    assert said[0] == "gpt2-kernels: building the toy, once (1 files)…"
    assert re.fullmatch(r"gpt2-kernels: built the toy in \d+ s", said[1]) and len(said) == 2
    assert [str(toy.built()[0])] == [p for p in torch.ops.loaded_libraries if str(toy.cache) in p]
    assert toy.start_again() is None
    assert lines(capfd) == [] and toy.compiled() == 1, "the second start found it in the cache"


def test_a_terminal_sees_how_far_it_is(toy, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    toy.hold.touch()
    threading.Timer(1.5, toy.hold.unlink).start()
    assert native.load() is None
    shown = sys.stderr.getvalue().split("\r")
    assert shown[0] == "gpt2-kernels: building the toy, once (0/1 files, 0 s)…"
    assert any("(0/1 files, 1 s)" in line for line in shown)
    assert any("(1/1 files, " in line for line in shown)


def test_a_process_loads_a_library_once(toy, monkeypatch):
    """Eight threads that ask at once, and later callers."""
    loads, start = [], threading.Barrier(8)
    monkeypatch.setattr(torch.ops, "load_library", loads.append)
    threads = [threading.Thread(target=lambda: (start.wait(), native.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert native.load() is None
    assert len(loads) == 1 and toy.compiled() == 1


def test_a_library_of_the_stable_abi_finds_torch(toy):
    """It names no path of torch: the process has loaded that already."""
    toy.source.write_text("""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
int64_t rank_of(torch::stable::Tensor x) { return x.dim(); }
STABLE_TORCH_LIBRARY(gpt2_kernels_toy, m) { m.def("rank_of(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(gpt2_kernels_toy, CPU, m) { m.impl("rank_of", TORCH_BOX(&rank_of)); }
""")
    assert native.load() is None
    assert torch.ops.gpt2_kernels_toy.rank_of(torch.ones(1, 2, 3)) == 3
    content = toy.built()[0].read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(toy.csrc).encode() not in content


@pytest.mark.parametrize("folder", ["with space", "$HOME", "a:b", "quo'te", "äß"])
def test_any_path_will_do(toy, folder, monkeypatch):
    cache, csrc = toy.cache / folder, toy.csrc.parent / folder
    toy.csrc.rename(csrc)
    monkeypatch.setattr(_build, "CSRC", csrc)
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(cache))
    assert native.load() is None
    assert native.build().is_relative_to(cache)


def test_nothing_is_written_but_the_cache(toy):
    before = sorted(toy.csrc.iterdir())
    native.build()
    assert sorted(toy.csrc.iterdir()) == before
    entry = toy.built()[0].parent
    assert sorted(p.name for p in toy.cache.rglob("*") if p.parent != entry) == sorted(
        ["cpu", "lock", entry.name]
    )
    assert sorted(p.name for p in entry.iterdir()) == [
        "build.log", "libgpt2_kernels_cpu.json", "libgpt2_kernels_cpu.so",
    ]  # fmt: skip


# ---- what a cached library stands for


def change_source(toy):
    toy.source.write_text(toy.source.read_text() + "// more\n")


def change_header(toy):
    toy.header.write_text("inline int answer() { return 43; }\n")


def change_flags(toy):
    changed = {"cpu": replace(toy.library, sources={"toy.cpp": ("-DMORE",)})}
    toy.monkeypatch.setattr(_build, "LIBRARIES", changed)


def change_torch(toy):
    toy.monkeypatch.setattr(torch, "__version__", "2.99.0")


def change_compiler(toy):
    other = toy.compiler.with_name("other-c++")
    toy.write_compiler(other)
    toy.monkeypatch.setenv("CXX", shlex.quote(str(other)))


def sanitize(toy):
    toy.monkeypatch.setenv("GPT2_KERNELS_SANITIZE", "1")


CHANGES = [change_source, change_header, change_flags, change_torch, change_compiler, sanitize]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_a_new_build(toy, change):
    native.build()
    change(toy)
    native.build()
    native.build()
    assert toy.compiled() == 2 and len(toy.built()) == 2, "the old one is kept"


def test_force_compiles_again(toy):
    first = native.build()
    assert native.build(force=True) == first and toy.compiled() == 2


def test_without_a_compiler_the_cache_still_serves(toy):
    """Built on one machine, or by a compiler that is gone."""
    native.build()
    toy.without_compiler()
    assert toy.start_again() is None


def test_the_cache_keeps_so_many(toy, monkeypatch):
    monkeypatch.setattr(native, "KEEP", 2)
    for i in range(4):
        toy.header.write_text(f"inline int answer() {{ return {i}; }}\n")
        newest = native.build()
    assert len(toy.built()) == 2 and newest in toy.built()


def test_sources_that_change_meanwhile_are_not_cached(toy):
    toy.hold.touch()
    builder = threading.Thread(target=lambda: reasons.append(native.load()))
    reasons = []
    builder.start()
    wait_for(lambda: toy.compiled() == 1)
    change_header(toy)
    toy.hold.unlink()
    builder.join()
    assert reasons == ["the sources changed while they were compiled; start again"]
    assert not toy.built() and toy.start_again() is None


# ---- several processes, and dead ones


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def in_child(function) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    return child


def load_or_fail():
    sys.exit(native.load())


def test_processes_that_start_together_build_once(toy, capfd):
    toy.hold.touch()
    children = [in_child(load_or_fail) for _ in range(3)]
    said = []
    wait_for(lambda: said.extend(lines(capfd)) or sum("waiting" in line for line in said) == 2)
    toy.hold.unlink()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    said += lines(capfd)
    assert toy.compiled() == 1
    waiting = "gpt2-kernels: another process is building the toy; waiting for it"
    assert said.count(waiting) == 2


def test_processes_that_fail_together_compile_once(toy, capfd):
    toy.source.write_text("int x = nonsense;\n")
    toy.hold.touch()
    children = [in_child(load_or_fail) for _ in range(2)]
    wait_for(lambda: any("waiting" in line for line in lines(capfd)))
    toy.hold.unlink()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [1, 1] and toy.compiled() == 1


def test_a_builder_killed_leaves_the_next_one_working(toy):
    """SIGKILL while the compiler runs, which outlives it, and does no harm."""
    toy.hold.touch()
    builder = in_child(load_or_fail)
    wait_for(lambda: toy.compiled() == 1)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert len(list(toy.cache.glob("cpu/tmp-*"))) == 1
    next_one = in_child(load_or_fail)
    wait_for(lambda: toy.compiled() == 2)
    toy.hold.unlink()
    next_one.join(60)
    assert next_one.exitcode == 0
    assert not list(toy.cache.glob("cpu/tmp-*")), "the dead builder's files are swept"
    assert toy.start_again() is None and toy.compiled() == 2


def test_ninja_ends_with_its_builder(toy):
    """With the first line that nobody reads: it starts no other compiler."""
    toy.hold.touch()
    builder = in_child(load_or_fail)
    wait_for(lambda: toy.compiled() == 1)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    toy.hold.unlink()
    wait_for(lambda: list(toy.cache.glob("cpu/tmp-*/*.o")))
    time.sleep(0.5)
    assert " -shared " not in toy.calls.read_text(), "it went on, and linked"
    assert native.load() is None


def test_an_interrupted_build_is_not_a_failed_one(toy, monkeypatch):
    """Ctrl-C ends the compiler, leaves no file, and the next start builds."""
    toy.hold.touch()
    follow, processes = _build._follow, []

    def interrupted(process, *rest):
        processes.append(process)
        wait_for(lambda: toy.compiled() == 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(_build, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        native.load()
    assert processes[0].poll() is not None
    assert [p.name for p in (toy.cache / "cpu").iterdir()] == ["lock"]
    monkeypatch.setattr(_build, "_follow", follow)
    toy.hold.unlink()
    assert native.load() is None


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

    for name in ("mkdir", "replace", "rename", "open"):
        monkeypatch.setattr(os, name, read_only)
    assert toy.start_again() is None
    monkeypatch.setattr(_build, "identity", lambda compiler: "another one")
    assert "the cache cannot be written ([Errno 30] Read-only file system)" in toy.start_again()


def test_a_full_disk(toy, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(native, "_flush", full)
    assert "No space left on device" in native.load()
    monkeypatch.undo()


def test_the_cache_is_private(toy, monkeypatch):
    old = os.umask(0)
    try:
        native.build()
    finally:
        os.umask(old)
    for folder in (toy.cache, toy.cache / "cpu"):
        assert folder.stat().st_mode & 0o777 == 0o700
    toy.cache.chmod(0o770)
    assert toy.start_again() == f"others can write to the cache {toy.cache}; chmod go-w {toy.cache}"
    toy.cache.chmod(0o755)
    assert toy.start_again() is None
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    reason = toy.start_again()
    assert reason.startswith(f"the cache {toy.cache} belongs to user ") and "12345" in reason


def test_where_the_cache_is(toy, monkeypatch, tmp_path):
    monkeypatch.delenv("GPT2_KERNELS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native._cache_folder() == tmp_path / "xdg/gpt2-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert native._cache_folder() == tmp_path / "home/.cache/gpt2-kernels"
    assert native.build().is_relative_to(tmp_path / "home/.cache/gpt2-kernels")


def test_a_user_without_a_home(toy, monkeypatch, tmp_path):
    """As in a container that runs under a number: nothing may land in a folder named ~."""
    for name in ("GPT2_KERNELS_CACHE", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert native.load() == "there is no home folder for a cache; set GPT2_KERNELS_CACHE"
    assert not (tmp_path / "~").exists()


def test_windows(toy, monkeypatch):
    monkeypatch.setattr(native, "fcntl", None)
    assert native.load() == "needs Linux or macOS"
    with pytest.raises(native.BuildError, match="needs Linux or macOS"):
        native.build()


def test_a_source_is_missing(toy):
    toy.source.unlink()
    assert native.load() == f"the source file {toy.source} is missing"


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
    assert loaded_last(toy).is_relative_to(toy.cache)
    assert lines(capfd)[0].startswith(f"gpt2-kernels: {toy.shipped}/libgpt2_kernels_cpu.so ")


def loaded_last(toy) -> Path:
    ours = [p for p in torch.ops.loaded_libraries if p.startswith(str(toy.csrc.parent))]
    assert len(ours) == 1
    return Path(ours[0])


def write_library_that_does_not_load(library: Path) -> None:
    library.write_bytes(b"no library at all")
    record = json.loads(library.with_suffix(".json").read_text())
    record["sha256"] = native._sha256(library)
    library.with_suffix(".json").write_text(json.dumps(record))


def test_a_sound_library_that_does_not_load(toy):
    library = native.build()
    write_library_that_does_not_load(library)
    reason = toy.start_again()
    assert reason.startswith(f"{library} cannot be loaded: {library}: ") and "\n" not in reason


def test_a_shipped_library_that_does_not_load(toy, capfd):
    write_library_that_does_not_load(native.build(out=toy.shipped))
    lines(capfd)
    assert toy.start_again() is None and loaded_last(toy).is_relative_to(toy.cache)
    assert "libgpt2_kernels_cpu.so cannot be loaded: " in lines(capfd)[0]


# ---- libraries built ahead of time


def test_a_shipped_library_needs_neither_compiler_nor_cache(toy, monkeypatch):
    shipped = native.build(out=toy.shipped)
    assert sorted(p.name for p in toy.shipped.iterdir()) == [
        "libgpt2_kernels_cpu.json", "libgpt2_kernels_cpu.so",
    ]  # fmt: skip
    shutil.rmtree(toy.cache)
    toy.without_compiler()
    change_torch(toy)  # one binary serves every torch
    assert toy.start_again() is None and loaded_last(toy) == shipped
    assert not toy.cache.exists()


def test_a_shipped_library_of_other_sources_is_not_used(toy, capfd):
    """The trap of one who builds into kernels/lib and then works on csrc."""
    native.build(out=toy.shipped)
    change_header(toy)
    lines(capfd)
    assert toy.start_again() is None and loaded_last(toy).is_relative_to(toy.cache)
    assert lines(capfd)[0].endswith("was built from other sources or flags; not used")


def run_command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["kernels", *map(str, arguments)])
    try:
        return command_line.main()
    except SystemExit as stopped:
        return stopped.code


def test_the_command_builds(toy, capfd, monkeypatch, tmp_path):
    assert run_command(monkeypatch, "build") == 0
    path = re.escape(str(toy.built()[0]))
    assert re.fullmatch(rf"{path} \(\d+\.\d s\)\n", capfd.readouterr().out)
    assert run_command(monkeypatch, "build", "--force", "--out", tmp_path / "a/b") == 0
    assert capfd.readouterr().out.startswith(f"{tmp_path}/a/b/libgpt2_kernels_cpu.so (")
    assert toy.compiled() == 2 and (tmp_path / "a/b/libgpt2_kernels_cpu.json").exists()


def test_the_commands_errors_are_one_line(toy, capfd, monkeypatch, tmp_path):
    assert run_command(monkeypatch, "biuld") == 2
    assert "invalid choice: 'biuld'" in capfd.readouterr().err
    toy.source.write_text("int x = nonsense;\n")
    assert run_command(monkeypatch, "build") == 1
    progress, error = lines(capfd)
    assert progress.endswith("…") and error.startswith("error: the C++ compiler failed: toy.cpp:1")
    toy.source.write_text("int x;\n")
    (tmp_path / "file").touch()
    assert run_command(monkeypatch, "build", "--out", tmp_path / "file") == 1
    assert "error: [Errno 17] File exists" in capfd.readouterr().err


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


# ---- the real csrc


CACHED_START = """
import time, torch
start = time.perf_counter()
from gpt2.kernels import native
imported = time.perf_counter()
reason = native.load()
assert reason is None, reason
print(imported - start, time.perf_counter() - imported)
assert "scalar" in torch.ops.gpt2_kernels_cpu.isas().split()
assert float.fromhex("0x0.0000000000001p-1022") * 1 != 0 and (torch.tensor(1e-45) * 1).item() != 0
"""


@pytest.mark.full
def test_csrc_is_built_within_a_minute_and_starts_within_50_ms(tmp_path):
    """A minute of two cores: counted in processor time, as other tests run beside this one."""

    def processor_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def run(*arguments):
        environment = os.environ | {"GPT2_KERNELS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done

    start = processor_seconds()
    done = run("-m", "gpt2.kernels", "build")
    assert "building the CPU kernels, once" in done.stderr
    assert processor_seconds() - start < 2 * 60
    starts = [run("-c", CACHED_START) for _ in range(3)]
    assert all(done.stderr == "" for done in starts)
    assert min(float(done.stdout.split()[1]) for done in starts) < 0.05
