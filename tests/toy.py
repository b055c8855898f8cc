"""A small library in place of csrc, with a cache and a compiler of its own: what the tests of
building, caching and loading work on."""

import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.kernels import _build, _cache, native

COMPILER = next(filter(None, map(shutil.which, _build.COMPILERS)), None)

needs_compiler = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(_cache.fcntl is None, reason="needs Linux or macOS"),
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


# ---- what makes another library of it


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
