"""Which failures of a build are remembered: the compiler's own errors, and none of the
machine's."""

import os

import pytest
from small_library import needs_compiler

from gpt2.kernels.native import compiler, libraries

pytestmark = needs_compiler


def fail(small, said):
    """Makes the compiler print this and fail."""
    small.compiler.write_text(f'#!/bin/sh\ncat <<"END"\n{said}\nEND\nexit 1\n')


PASSING = {
    "disk": "small.cpp:1:1: fatal error: error writing to /tmp/x.s: No space left on device",
    "quota": "ld: final link failed: Disk quota exceeded",
    "killed": "c++: fatal error: Killed signal terminated program cc1plus",
    "memory": "cc1plus: out of memory allocating 65536 bytes after a total of 9 bytes",
    "virtual": "virtual memory exhausted: Cannot allocate memory",
    "fork": "c++: fatal error: cannot execute cc1plus: vfork: Resource temporarily unavailable",
    "silent": "",
    "timeout": "timeout: the compiler took too long: fatal error: timed out",
    "ninja": "ninja: fatal: posix_spawn: Cannot allocate memory",
}


@pytest.mark.parametrize("said", PASSING.values(), ids=PASSING)
def test_a_failure_that_passes_is_tried_again(said, small):
    """A full disk was remembered for good, as if the compiler had refused the sources."""
    good = small.compiler.read_text()
    fail(small, said)
    reason = libraries.load()
    assert reason.startswith("the C++ compiler failed: ")
    assert reason.endswith(" (the next start tries again)")
    assert not list(small.cache.rglob("failed.log"))
    small.compiler.write_text(good)
    os.utime(small.compiler, ns=(1, 1))
    assert small.start_again() is None


def test_a_compiler_killed_by_a_signal_is_tried_again(small):
    small.compiler.write_text("#!/bin/sh\nkill -9 $$\n")
    assert libraries.load().endswith(" (the next start tries again)")


OWN = {
    "gcc": "small.cpp:2:9: error: 'nonsense' was not declared in this scope",
    "nvcc": "small.cu(12): error: identifier x is undefined",
    "flags": "c++: error: unrecognized command-line option '-std=c++99'",
    "nvcc-flags": "nvcc fatal   : Unsupported gpu architecture compute_1",
    "linker": "small.cpp:(.text+0x5): undefined reference to elsewhere()",
    "header": "small.cpp:1:10: fatal error: nowhere.h: No such file or directory",
}


@pytest.mark.parametrize("said", OWN.values(), ids=OWN)
def test_a_compilers_own_error_is_kept(said, small):
    fail(small, said)
    reason = libraries.load()
    assert "to try again: python -m gpt2.kernels build" in reason
    (log,) = small.cache.rglob("failed.log")
    assert log.read_text().startswith("the C++ compiler failed: ")
    assert small.start_again() == reason


@pytest.mark.parametrize("folder", ["timeout", "a killed disk"])
def test_a_path_is_no_sign_of_a_failure_that_passes(folder, small, tmp_path, monkeypatch):
    """The compiler's own error was not remembered, and every start compiled again."""
    cache = tmp_path / folder
    monkeypatch.setenv("GPT2_KERNELS_CACHE", str(cache))
    said = f"{cache}/cpu/small.o: in x.cpp: (/opt/truncated/x.h): undefined reference to x"
    fail(small, said)
    reason = libraries.load()
    assert "to try again: python -m gpt2.kernels build" in reason
    calls = []
    monkeypatch.setattr(compiler, "run", lambda *args: calls.append(args))
    assert small.start_again() == reason and not calls


def test_a_failure_that_an_older_version_kept_is_tried_again(small):
    small.source.write_text("int x = nonsense;\n")
    libraries.load()
    (log,) = small.cache.rglob("failed.log")
    log.write_text(f"the compiler failed: no space\n\n{PASSING['disk']}\n")
    libraries._reasons.clear()
    assert "nonsense" in libraries.load() and small.compiled() == 2
