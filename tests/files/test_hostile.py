"""Hostile files: every reader reads them correctly or refuses them in one line, quickly, and
without allocating memory for missing data.

    pytest tests/files/test_hostile.py --full    32,000 files; tools/fuzz_files.py: a million

A file is a function of its target and its number: `spoilt(target, n)` makes the file of a failure
again.
"""

import gc
import resource
import time
import tracemalloc
from pathlib import Path

import pytest
import tiktoken
from targets import TARGETS, make_good, no_encoding, spoilt

from gpt2.checkpoints import huggingface
from gpt2.errors import InputError

SLACK = 2**20  # bytes allowed for the smallest file; in addition, twice the file size
ROOM = 2**28  # address space for one test: no number in a file gets memory


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a good file of every kind."""
    gc.collect()
    gc.freeze()  # garbage collection skips earlier tests' objects while a file is timed
    folder = tmp_path_factory.mktemp("good")
    make_good(folder)
    yield folder
    gc.unfreeze()


@pytest.fixture
def little_room():
    """Limits the address space, so that allocations sized by a number in a file fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("size", ["some", pytest.param("all", marks=pytest.mark.full)])
@pytest.mark.parametrize("target", TARGETS)
def test_hostile_files(target, size, good, little_room, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", no_encoding)
    file, _, read, files, is_read, least = TARGETS[target]
    path = good / file
    data = path.read_bytes()
    if is_read:
        read(good)
    refused = 0
    try:
        for n in range(files // (4 if size == "all" else 50)):
            path.write_bytes(spoilt(target, n, good))
            refused += is_refused(f"spoilt({target!r}, {n})", read, good, path, measure=n % 8 == 0)
    finally:
        path.write_bytes(data)
    assert refused >= least * (n + 1), "most mutations change nothing that matters"


def test_a_number_is_no_truth_value(good):
    """`1 == True`: a value of another type is not the supported value."""
    path = good / "hf" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": 1'))
    with pytest.raises(InputError, match="tie_word_embeddings must be True, got 1"):
        huggingface.read_config(good / "hf")
    path.write_text(text)


def is_refused(name, read, folder, path, measure):
    """Whether the file is refused. Fails if the refusal is longer than a line, late, or no
    InputError, or if memory is allocated for missing data."""
    message = None
    if measure:
        tracemalloc.start()
    start = time.process_time()
    try:
        read(folder)
    except InputError as e:
        message = str(e)
    except BaseException as e:
        pytest.fail(f"{name}: {type(e).__name__}: {e}"[:2000])
    took = time.process_time() - start
    if measure:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 2 * path.stat().st_size + SLACK, f"{name}: {peak} bytes"
    assert took < 1.0, f"{name}: {took:.1f} s"
    if message is not None:
        assert "\n" not in message and len(message) < 1000, f"{name}: {message}"
    return message is not None
