"""Damaged records and libraries in the cache, and paths with which no build works."""

import os
import time

import pytest
from small_library import lines, needs_compiler

from gpt2.kernels.native import compiler, libraries

pytestmark = needs_compiler


def deep_record(path):
    path.write_text("[" * 4000)


def deep_in_an_object(path):
    path.write_text('{"recipe":' * 400 + "1" + "}" * 400)


def long_record(path):
    path.write_text(" " * 2**20)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


RECORDS = [deep_record, deep_in_an_object, long_record, fifo, folder]


@pytest.mark.parametrize("shipped", [False, True], ids=["cache", "shipped"])
@pytest.mark.parametrize("spoil", RECORDS, ids=lambda spoil: spoil.__name__)
def test_a_record_that_is_none(spoil, shipped, small, capfd):
    """A deeply nested record raised RecursionError; a FIFO made the process wait for ever."""
    library = libraries.build(out=small.shipped) if shipped else libraries.build()
    spoil(library.with_suffix(".json"))
    lines(capfd)
    start = time.monotonic()
    assert small.start_again() is None
    assert lines(capfd)[0].endswith("; not used") and time.monotonic() - start < 20
    assert small.compiled() == (1 if shipped else 2)


@pytest.mark.parametrize("name", ["libgpt2_kernels_cpu.so", "failed.log", "lock"])
def test_a_fifo_in_place_of_a_file(name, small):
    library = libraries.build()
    target = small.cache / "cpu" / "lock" if name == "lock" else library.parent / name
    if name != "lock":
        library.unlink()
    target.unlink(missing_ok=True)
    os.mkfifo(target)
    assert small.start_again() is None


@pytest.mark.parametrize("sign", ["|", "\n", "\r"], ids=["bar", "newline", "return"])
@pytest.mark.parametrize("variable", ["GPT2_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_path_that_ninja_cannot_name(sign, variable, small, monkeypatch, tmp_path):
    """Bars and line breaks end a name in ninja's files and cannot be escaped."""
    for name in ("GPT2_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / f"a{sign}b"))
    reason = libraries.load()
    assert reason.startswith("the cache '") and "has | or a line break in its path; " in reason
    assert "\n" not in reason and not list(tmp_path.glob("a*")) and not small.compiled()
    with pytest.raises(libraries.BuildError, match="line break in its path"):
        libraries.build()


def test_a_build_names_no_path_that_ninja_would_misread():
    for text in ("a|b", "a\nb"):
        with pytest.raises(compiler.BuildError, match="line break"):
            compiler._escape_path(text)
    with pytest.raises(compiler.BuildError, match="line break"):
        compiler._escape("a\nb")
