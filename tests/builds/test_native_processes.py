"""Processes that build the same library at once, fork, or are killed."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
from small_library import (
    lines,
    needs_compiler,
    wait_for,
)

from gpt2.kernels.native import compiler, libraries, trust

pytestmark = needs_compiler


def in_child(function) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    return child


def load_or_fail():
    sys.exit(libraries.load())


def test_processes_that_start_together_build_once(small, capfd):
    small.hold.touch()
    children = [in_child(load_or_fail) for _ in range(3)]
    said = []
    wait_for(lambda: said.extend(lines(capfd)) or sum("waiting" in line for line in said) == 2)
    small.hold.unlink()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    said += lines(capfd)
    assert small.compiled() == 1
    waiting = "gpt2-kernels: another process is building the sample; waiting for it"
    assert said.count(waiting) == 2


def test_processes_that_fail_together_compile_once(small, capfd):
    small.source.write_text("int x = nonsense;\n")
    small.hold.touch()
    children = [in_child(load_or_fail) for _ in range(2)]
    wait_for(lambda: any("waiting" in line for line in lines(capfd)))
    small.hold.unlink()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [1, 1] and small.compiled() == 1


def test_a_builder_killed_leaves_the_next_one_working(small):
    """SIGKILL while the compiler runs, which outlives it, and does no harm."""
    small.hold.touch()
    builder = in_child(load_or_fail)
    wait_for(lambda: small.compiled() == 1)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert len(list(small.cache.glob("cpu/tmp-*"))) == 1
    next_one = in_child(load_or_fail)
    wait_for(lambda: small.compiled() == 2)
    small.hold.unlink()
    next_one.join(60)
    assert next_one.exitcode == 0
    assert not list(small.cache.glob("cpu/tmp-*")), "the dead builder's files are swept"
    assert small.start_again() is None and small.compiled() == 2


def test_ninja_ends_with_its_builder(small):
    """With the first line that nobody reads: it starts no other compiler."""
    small.hold.touch()
    builder = in_child(load_or_fail)
    wait_for(lambda: small.compiled() == 1)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    small.hold.unlink()
    wait_for(lambda: list(small.cache.glob("cpu/tmp-*/*.o")))
    time.sleep(0.5)
    assert " -shared " not in small.calls.read_text(), "it went on, and linked"
    assert libraries.load() is None


def test_a_child_forked_while_a_thread_builds(small):
    """It had a copy of a lock that nobody in it would release, and waited for ever."""
    small.hold.touch()
    builder = threading.Thread(target=libraries.load)
    builder.start()
    wait_for(lambda: small.compiled() == 1)
    child = in_child(load_or_fail)
    small.hold.unlink()
    builder.join()
    child.join(20)
    child.kill()
    assert child.exitcode == 0 and small.compiled() == 1


def test_a_child_forked_while_a_thread_loads(small, monkeypatch):
    """It waits until the library is there as a whole."""
    libraries.build()
    started, loads, cdll = threading.Event(), [], trust.ctypes.CDLL

    def slow(name):
        started.set()
        time.sleep(0.3)
        loads.append(name)
        return cdll(name)

    monkeypatch.setattr(trust.ctypes, "CDLL", slow)
    loader = threading.Thread(target=libraries.load)
    loader.start()
    started.wait(20)
    child = in_child(lambda: sys.exit(libraries.load() or len(loads) - 1))
    loader.join()
    child.join(20)
    child.kill()
    assert child.exitcode == 0


def test_a_child_outlives_the_builder_that_it_was_forked_from(small, tmp_path):
    """It kept the killed builder's lock, and waited for itself."""
    forked, loaded = tmp_path / "forked", tmp_path / "loaded"

    def load():
        signal.alarm(30)  # one that hangs has no parent that would end it
        forked.touch()
        loaded.write_text(str(libraries.load()))

    def build_and_fork():
        threading.Thread(target=libraries.load, daemon=True).start()
        wait_for(lambda: small.compiled() == 1)
        in_child(load).join()

    small.hold.touch()
    builder = in_child(build_and_fork)
    wait_for(forked.exists)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    small.hold.unlink()
    wait_for(lambda: loaded.exists() and loaded.read_text(), seconds=20)
    assert loaded.read_text() == "None"


def test_an_interrupted_build_is_not_a_failed_one(small, monkeypatch):
    """Ctrl-C ends the compiler, leaves no file, and the next start builds."""
    small.hold.touch()
    follow, processes = compiler._follow, []

    def interrupted(process, *rest):
        processes.append(process)
        wait_for(lambda: small.compiled() == 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        libraries.load()
    assert processes[0].poll() is not None
    assert [p.name for p in (small.cache / "cpu").iterdir()] == ["lock"]
    monkeypatch.setattr(compiler, "_follow", follow)
    small.hold.unlink()
    assert libraries.load() is None
