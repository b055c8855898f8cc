"""Large inputs with little content: memory and time must be proportional to their size."""

import json
import time
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
from checkpoint_files import CONFIG, header_of, random_state, write

from gpt2 import files
from gpt2.checkpoints import checkpoint, convert
from gpt2.data import documents
from gpt2.data.tokenizer import byte
from gpt2.errors import InputError
from gpt2.evaluate import multiple_choice


@contextmanager
def taking(most: int):
    """A context in which Python may use at most this many bytes of memory, and two seconds."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= most, f"{peak} bytes"
    assert took < 2.0, f"{took:.1f} s"


def test_brackets_beside_a_long_text():
    """The search for brackets outside of strings took 100 bytes per character of a string."""
    text = json.dumps({"a": "a" * 2**20, "b": "[" * 200})
    with taking(3 * len(text)):
        files.parse_json(text)
    with taking(3 * len(text)), pytest.raises(ValueError, match="nested too deeply"):
        files.parse_json(text.replace('"b": "' + "[" * 200 + '"', '"b": ' + "[" * 101 + "]" * 101))


def long_metadata(header):
    described = json.loads(header["__metadata__"]["gpt2"])
    described["note"] = "a" * 2**20
    return {**header, "__metadata__": {"gpt2": json.dumps(described)}}


def empty_tensors(header):
    at = max(part["data_offsets"][1] for part in header.values() if "data_offsets" in part)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [at, at]}
    return {**header, **{f"x{i}": empty for i in range(140_000)}}


def test_metadata_of_a_megabyte(tmp_path):
    path = write(CONFIG, random_state(), tmp_path, "run") / checkpoint.FILE
    header_of(path, long_metadata)
    with taking(2**22), pytest.raises(InputError, match=r"at most 1048576 characters, got 10\d+"):
        checkpoint.read(path)


@pytest.mark.parametrize("format", ["run", "hf"])
def test_a_header_longer_than_any_model_s(format, tmp_path):
    """Refusing a million empty tensors took ten seconds and 1.2 GB."""
    folder = write(CONFIG, random_state(), tmp_path, format)
    header_of(next(folder.glob("*.safetensors")), empty_tensors)
    told = "cannot be read: a header of at most 8388608 bytes is read, got "
    with taking(2**20), pytest.raises(InputError, match=told):
        convert.read(folder).state()


@pytest.mark.parametrize("name", ["byte", "char"])
def test_a_text_without_spaces_is_encoded_block_by_block(name, tmp_path):
    """300 MB of ACGT were held in memory as a whole, several times."""
    path = tmp_path / "dna.txt"
    path.write_bytes(b"ACG\xc3\xa9" * (2**20 // 5))  # blocks end inside characters
    texts = documents.documents(str(path))
    tokenizer = documents.tokenizer_for(texts, name, None)
    parts = list(documents.encode(texts, tokenizer))
    assert len(parts) > 2 and max(map(len, parts)) <= documents.BLOCK_BYTES + 3
    assert np.array_equal(np.concatenate(parts), tokenizer.encode(path.read_text()))


def test_an_archive_of_many_entries(tmp_path):
    """Refusing a million empty entries took seven seconds."""
    write(CONFIG, random_state(), tmp_path, "nanogpt")
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "a") as archive:
        for i in range(2000):
            entry = zipfile.ZipInfo(f"archive/{i}")
            entry.comment = bytes(2**12)
            archive.writestr(entry, b"")
    with (
        taking(2**21),
        pytest.raises(InputError, match="at most 4194304 bytes of a table are read"),
    ):
        convert.read(tmp_path / "ckpt.pt")


def test_a_question_of_many_endings(tmp_path):
    """100,000 endings took 20 seconds."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"ctx": "a" * 100, "endings": ["b"] * 20_000, "label": 0}))
    with taking(2**24), pytest.raises(InputError, match=r"endings must be .* at most 1000"):
        multiple_choice.read(path, byte(), 200)
