"""A damaged library is never loaded: it is built again, or the reason is reported."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT
from small_library import COMPILER, lines, needs_compiler, sanitize

from gpt2.kernels.native import libraries

pytestmark = needs_compiler


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
def test_a_damaged_cache_is_built_again(small, damage, capfd):
    library = libraries.build()
    damage(library)
    lines(capfd)
    assert small.start_again() is None and small.compiled() == 2
    said = lines(capfd)
    assert said[0].startswith(f"gpt2-kernels: {library} ") and said[0].endswith("; not used")
    assert small.start_again() is None and small.compiled() == 2


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_shipped_library_is_not_used(small, damage, capfd):
    damage(libraries.build(out=small.shipped))
    lines(capfd)
    assert small.start_again() is None
    assert small.loaded_last().is_relative_to(small.cache)
    assert lines(capfd)[0].startswith(f"gpt2-kernels: {small.shipped}/libgpt2_kernels_cpu.so ")


def write_library_that_does_not_load(library: Path) -> None:
    library.write_bytes(b"no library at all")
    record = json.loads(library.with_suffix(".json").read_text())
    record["sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
    library.with_suffix(".json").write_text(json.dumps(record))


def test_a_sound_library_that_does_not_load(small):
    library = libraries.build()
    write_library_that_does_not_load(library)
    reason = small.start_again()
    assert reason.startswith(f"{library} cannot be loaded: {library}: ") and "\n" not in reason


def test_a_shipped_library_that_does_not_load(small, capfd):
    write_library_that_does_not_load(libraries.build(out=small.shipped))
    lines(capfd)
    assert small.start_again() is None and small.loaded_last().is_relative_to(small.cache)
    assert "libgpt2_kernels_cpu.so cannot be loaded: " in lines(capfd)[0]


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
def test_sanitizers_stop_what_is_planted(small, call, stopped_by):
    """With the runtimes that make sanitize puts before Python's own libraries."""
    recipe = subprocess.run(
        ["make", "-n", "sanitize", f"CXX={COMPILER}"], capture_output=True, text=True, cwd=ROOT
    )
    runtimes = re.search('LD_PRELOAD="(.*?)"', recipe.stdout)[1]
    if not all(Path(runtime).is_absolute() for runtime in runtimes.split()):
        pytest.skip(f"the compiler has no sanitizers: {runtimes}")
    sanitize(small)
    small.source.write_text(PLANTED)
    code = f"import ctypes; ctypes.CDLL({str(libraries.build())!r}).{call}"
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
