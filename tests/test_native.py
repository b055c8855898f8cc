"""How csrc becomes a loaded library: built once, cached, shared by processes, or shipped.

Each test has a small library of its own in place of csrc (toy.py); what is said of the real csrc
runs with --full. How this fails is in test_native_failures.py.
"""

import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from toy import (
    change_compiler,
    change_flags,
    change_header,
    change_source,
    change_torch,
    lines,
    needs_compiler,
    sanitize,
    wait_for,
)

from gpt2.kernels import __main__ as command_line
from gpt2.kernels import _build, _private, native

ROOT = Path(__file__).resolve().parents[1]

pytestmark = needs_compiler


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
    monkeypatch.setattr(_private.File, "load", lambda file: loads.append(file))
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


def test_a_link_that_leads_nowhere_is_no_failed_build(toy, monkeypatch):
    """The first build succeeded, but load() gave "No such file or directory"."""
    (toy.cache / "cpu").mkdir(parents=True, mode=0o700)
    link = toy.cache / "cpu" / "x-torchy"
    link.symlink_to(toy.cache / "nowhere")
    os.utime(link, ns=(1, 1), follow_symlinks=False)
    assert native.load() is None
    monkeypatch.setattr(native, "KEEP", 1)
    newest = native.build(force=True)
    assert toy.built() == [newest] and not link.is_symlink()


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


def test_a_child_forked_while_a_thread_builds(toy):
    """It had a copy of a lock that nobody in it would release, and waited for ever."""
    toy.hold.touch()
    builder = threading.Thread(target=native.load)
    builder.start()
    wait_for(lambda: toy.compiled() == 1)
    child = in_child(load_or_fail)
    toy.hold.unlink()
    builder.join()
    child.join(20)
    child.kill()
    assert child.exitcode == 0 and toy.compiled() == 1


def test_a_child_forked_while_a_thread_loads(toy, monkeypatch):
    """It waits until the library is there as a whole."""
    native.build()
    started, loads, cdll = threading.Event(), [], _private.ctypes.CDLL

    def slow(name):
        started.set()
        time.sleep(0.3)
        loads.append(name)
        return cdll(name)

    monkeypatch.setattr(_private.ctypes, "CDLL", slow)
    loader = threading.Thread(target=native.load)
    loader.start()
    started.wait(20)
    child = in_child(lambda: sys.exit(native.load() or len(loads) - 1))
    loader.join()
    child.join(20)
    child.kill()
    assert child.exitcode == 0


def test_a_child_outlives_the_builder_that_it_was_forked_from(toy, tmp_path):
    """It kept the killed builder's lock, and waited for itself."""
    forked, loaded = tmp_path / "forked", tmp_path / "loaded"

    def load():
        signal.alarm(30)  # one that hangs has no parent that would end it
        forked.touch()
        loaded.write_text(str(native.load()))

    def build_and_fork():
        threading.Thread(target=native.load, daemon=True).start()
        wait_for(lambda: toy.compiled() == 1)
        in_child(load).join()

    toy.hold.touch()
    builder = in_child(build_and_fork)
    wait_for(forked.exists)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    toy.hold.unlink()
    wait_for(lambda: loaded.exists() and loaded.read_text(), seconds=20)
    assert loaded.read_text() == "None"


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


# ---- libraries built ahead of time


def test_a_shipped_library_needs_neither_compiler_nor_cache(toy, monkeypatch):
    shipped = native.build(out=toy.shipped)
    assert sorted(p.name for p in toy.shipped.iterdir()) == [
        "libgpt2_kernels_cpu.json", "libgpt2_kernels_cpu.so",
    ]  # fmt: skip
    shutil.rmtree(toy.cache)
    toy.without_compiler()
    change_torch(toy)  # one binary serves every torch
    assert toy.start_again() is None and toy.loaded_last() == shipped
    assert not toy.cache.exists()


def test_a_shipped_library_of_other_sources_is_not_used(toy, capfd):
    """The trap of one who builds into kernels/lib and then works on csrc."""
    native.build(out=toy.shipped)
    change_header(toy)
    lines(capfd)
    assert toy.start_again() is None and toy.loaded_last().is_relative_to(toy.cache)
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
