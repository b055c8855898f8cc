"""A small library that replaces csrc, with its own cache and compiler, for tests of building,
caching and loading."""

import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.kernels.native import build_cache, compiler, libraries, recipes

COMPILER = next(filter(None, map(shutil.which, compiler.COMPILERS)), None)

needs_compiler = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(build_cache.fcntl is None, reason="needs Linux or macOS"),
]


class SmallLibrary:
    """A library of one file, which compiles in a tenth of a second, and its build folder."""

    def __init__(self, folder: Path, monkeypatch):
        self.csrc, self.cache, self.shipped = (folder / x for x in ("csrc", "cache", "lib"))
        self.csrc.mkdir()
        self.source, self.header = self.csrc / "small.cpp", self.csrc / "small.h"
        self.header.write_text("inline int answer() { return 42; }\n")
        self.source.write_text('#include "small.h"\nextern "C" int small() { return answer(); }\n')
        self.calls, self.hold, self.fail = (folder / x for x in ("calls", "hold", "fail"))
        self.compiler = folder / "noting-c++"
        self.write_compiler(self.compiler)
        self.library = recipes.Library("the sample", {"small.cpp": ()}, ("*.h",))
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(compiler, "CSRC", self.csrc)
        monkeypatch.setattr(recipes, "LIBRARIES", {"cpu": self.library})
        monkeypatch.setattr(libraries, "SHIPPED", self.shipped)
        monkeypatch.setattr(libraries, "_reasons", {})
        monkeypatch.setenv("GPT2_KERNELS_CACHE", str(self.cache))
        monkeypatch.setenv("CXX", shlex.quote(str(self.compiler)))
        monkeypatch.delenv("GPT2_KERNELS_SANITIZE", raising=False)

    def write_compiler(self, path: Path) -> None:
        """Writes a compiler that logs each call, waits while the file `hold` exists, and fails if
        `fail` exists."""
        calls, hold, fail = (shlex.quote(str(x)) for x in (self.calls, self.hold, self.fail))
        path.write_text(
            f'#!/bin/sh\necho "$@" >> {calls}\n'
            f"for i in $(seq 1200); do [ -e {hold} ] || break; sleep 0.05; done\n"
            f'[ -e {fail} ] && exit 1\nexec {COMPILER} "$@"\n'
        )
        path.chmod(0o755)

    def compiled(self) -> int:
        """The number of compilations so far."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return sum(" -c " in line for line in lines)

    def start_again(self) -> str | None:
        """Calls load() as a new process would."""
        libraries._reasons.clear()
        return libraries.load()

    def built(self) -> list[Path]:
        return sorted(self.cache.glob("cpu/*/*.so"))

    def without_compiler(self) -> None:
        self.monkeypatch.setenv("CXX", "/nonexistent/c++")

    def loaded_last(self) -> Path:
        ours = [p for p in torch.ops.loaded_libraries if p.startswith(str(self.csrc.parent))]
        assert len(ours) == 1
        return Path(ours[0])


def lines(captured) -> list[str]:
    return captured.readouterr().err.splitlines()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---- changes that make it another library


def change_source(small):
    small.source.write_text(small.source.read_text() + "// more\n")


def change_header(small):
    small.header.write_text("inline int answer() { return 43; }\n")


def change_flags(small):
    changed = {"cpu": replace(small.library, sources={"small.cpp": ("-DMORE",)})}
    small.monkeypatch.setattr(recipes, "LIBRARIES", changed)


def change_torch(small):
    small.monkeypatch.setattr(torch, "__version__", "2.99.0")


def change_compiler(small):
    other = small.compiler.with_name("other-c++")
    small.write_compiler(other)
    small.monkeypatch.setenv("CXX", shlex.quote(str(other)))


def sanitize(small):
    small.monkeypatch.setenv("GPT2_KERNELS_SANITIZE", "1")
