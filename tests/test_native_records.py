"""What lies in the cache in place of a record or a library, and paths that no build could use."""

import os
import time

import pytest
from toy import lines, needs_compiler

from gpt2.kernels import _build, native

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
def test_a_record_that_is_none(spoil, shipped, toy, capfd):
    """A deep one ended in RecursionError, a FIFO in waiting for ever."""
    library = native.build(out=toy.shipped) if shipped else native.build()
    spoil(library.with_suffix(".json"))
    lines(capfd)
    start = time.monotonic()
    assert toy.start_again() is None
    assert lines(capfd)[0].endswith("; not used") and time.monotonic() - start < 20
    assert toy.compiled() == (1 if shipped else 2)


@pytest.mark.parametrize("name", ["libgpt2_kernels_cpu.so", "failed.log", "lock"])
def test_a_fifo_in_place_of_a_file(name, toy):
    library = native.build()
    target = toy.cache / "cpu" / "lock" if name == "lock" else library.parent / name
    if name != "lock":
        library.unlink()
    target.unlink(missing_ok=True)
    os.mkfifo(target)
    assert toy.start_again() is None


@pytest.mark.parametrize("sign", ["|", "\n", "\r"], ids=["bar", "newline", "return"])
@pytest.mark.parametrize("variable", ["GPT2_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_path_that_ninja_cannot_name(sign, variable, toy, monkeypatch, tmp_path):
    """Bars and line breaks end a name in ninja's files, and no escape is left for them."""
    for name in ("GPT2_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / f"a{sign}b"))
    reason = native.load()
    assert reason.startswith("the cache '") and "has | or a line break in its path; " in reason
    assert "\n" not in reason and not list(tmp_path.glob("a*")) and not toy.compiled()
    with pytest.raises(native.BuildError, match="line break in its path"):
        native.build()


def test_a_build_names_no_path_that_ninja_would_misread():
    for text in ("a|b", "a\nb"):
        with pytest.raises(_build.BuildError, match="line break"):
            _build._escape_path(text)
    with pytest.raises(_build.BuildError, match="line break"):
        _build._escape("a\nb")
