"""A pickle is validated by its opcodes, quickly, before any object is built."""

import io
import pickle
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch
from checkpoint_files import CONFIG, random_state, write

from gpt2.checkpoints import convert, weights
from gpt2.data import nanogpt_meta
from gpt2.errors import InputError

MARK, EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, NONE = b"(", b"}", b"]", b")", b"N"
TUPLE, TUPLE1, TUPLE2, SETITEM, SETITEMS, APPEND = b"t", b"\x85", b"\x86", b"s", b"u", b"a"
KEY = b"X\1\0\0\0k"  # a text of one character


def put(n):
    return b"r" + n.to_bytes(4, "little")


def get(n):
    return b"j" + n.to_bytes(4, "little")


def doubled(count):
    """A tuple of a tuple twice, which is of a tuple twice, …"""
    pairs = (get(n) + get(n) + TUPLE2 + put(n + 1) for n in range(count))
    return EMPTY_TUPLE + put(0) + b"".join(pairs)


def item(key, value=NONE):
    return EMPTY_DICT + key + value + SETITEM


SAME_HASH = b"".join(
    b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + NONE for n in range(1, 30_000)
)  # integers, which Python hashes modulo 2^61 - 1

BOMBS = {
    "key-of-200,000-tuples": (item(NONE + TUPLE1 * 200_000), "nests deeper than 100"),
    "value-of-200,000-tuples": (item(KEY, NONE + TUPLE1 * 200_000), "nests deeper than 100"),
    "60-doubled-tuples": (item(KEY, doubled(60)), "more than 1048576 parts"),
    "key-of-doubled-tuples": (item(doubled(60)), "more than 1048576 parts"),
    "key-of-a-tuple": (item(NONE + TUPLE1), "a text nor a small integer"),
    "key-of-None": (item(NONE), "a text nor a small integer"),
    "keys-of-one-hash": (EMPTY_DICT + MARK + SAME_HASH + SETITEMS, "values in no container"),
    "keys-of-one-hash-by-one": (
        EMPTY_DICT + SAME_HASH.replace(NONE + b"\x8a", NONE + SETITEM + b"\x8a") + SETITEM,
        "a text nor a small integer",
    ),
    "4-MB-of-dictionaries": (EMPTY_DICT * 4_000_000, "values in no container"),
    "4-MB-of-nothing": ((EMPTY_DICT + b"0") * 2_000_000 + NONE, "more than 1048576 opcodes"),
    "marks": (MARK * 1_000_000, "nests deeper than 100"),
    "list-of-itself": (EMPTY_LIST + put(0) + get(0) + APPEND, "after a second reference"),
    "dict-of-itself": (
        EMPTY_DICT + put(0) + KEY + get(0) + SETITEM,
        "after a second reference",
    ),
    "memo-far-away": (NONE + put(4_000_000), "place 4000000 of the memo"),
    "memo-that-is-empty": (get(7), "place 7 of the memo, which is empty"),
    "no-value": (SETITEM, "lacks a value"),
    "no-value-after-a-mark": (NONE + MARK + TUPLE1, "lacks a value"),
    "no-mark": (TUPLE, "lacks a value"),
    "half-a-pair": (EMPTY_DICT + MARK + KEY + SETITEMS, "a text nor a small integer"),
    "set": (b"\x8f", "EMPTY_SET"),
    "dup": (NONE + b"2", "DUP"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_is_built(name, tmp_path):
    """As a meta.pkl: a key of 200,000 tuples crashed, 60 doubled tuples hung."""
    content, message = BOMBS[name]
    (tmp_path / "meta.pkl").write_bytes(b"\x80\2" + content + b".")
    start = time.perf_counter()
    with pytest.raises(InputError, match=message):
        nanogpt_meta.load(tmp_path / "meta.pkl")
    assert time.perf_counter() - start < 2.0


def replaced(path, change):
    """Rewrites the torch.save archive with another pickle."""
    with zipfile.ZipFile(path) as archive:
        parts = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in parts:
            of_tensors = entry.filename.endswith("data.pkl")
            archive.writestr(entry, change(content) if of_tensors else content)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_a_ckpt_is_refused(name, tmp_path):
    content, message = BOMBS[name]
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    replaced(path, lambda _: b"\x80\2" + content + b".")
    start = time.perf_counter()
    with pytest.raises(InputError, match=message):
        convert.read(path)
    assert time.perf_counter() - start < 2.0


def test_a_storage_that_pytorch_does_not_know_is_refused(tmp_path):
    """PyTorch matches its own error message with a regular expression, which took seconds for a
    long name."""
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    name = b"ctorch\nFl" + b"2" * 20_000 + b"Storage\n"
    replaced(path, lambda _: b"\x80\2" + name + b".")
    start = time.perf_counter()
    with pytest.raises(InputError, match="its pickle asks for torch Fl22"):
        convert.read(path)
    assert time.perf_counter() - start < 2.0


def test_more_tensors_than_the_file_holds_are_not_made(tmp_path):
    """A hundred thousand tensors of one storage, in a few bytes each, took 60 MB of objects."""
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    one = torch.zeros(1)
    with io.BytesIO() as file:
        torch.save({"a": [one[:] for _ in range(9999)]}, file)
        (tmp_path / "many.pt").write_bytes(file.getvalue())
    with pytest.raises(InputError, match="more objects than the file holds"):
        convert.read(tmp_path / "many.pt")
    assert convert.read(path).config == CONFIG


def test_a_pickle_that_pytorch_alone_finds_is_not_read(tmp_path):
    """PyTorch reads DATA.PKL as data.pkl; the check did not find it."""
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    with zipfile.ZipFile(path) as archive:
        parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts:
            bomb = b"\x80\2" + BOMBS["60-doubled-tuples"][0] + b"."
            if name.endswith("data.pkl"):
                archive.writestr(name.replace("data.pkl", "DATA.PKL"), bomb)
            else:
                archive.writestr(name, content)
    with pytest.raises(InputError, match="1048576 parts"):
        convert.read(path)


@pytest.mark.parametrize("field", [20, 24], ids=["stored", "whole"])
def test_an_archive_whose_part_is_larger_than_the_file(field, tmp_path):
    """zipfile allocated the stored size of a part, whatever the file's size."""
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + field  # data.pkl's entry in the table of contents
    data[at : at + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match="parts are larger than the file"):
        convert.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_what_pytorch_saves_passes(tmp_path):
    """A state dict with metadata, an AdamW that has stepped, and shared tuples."""
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    held = torch.load(path, weights_only=True)
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(100)))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    model = OrderedDict(held["model"])
    model._metadata = module.state_dict()._metadata
    held |= {"model": model, "optimizer": optimizer.state_dict(), "more": module.state_dict()}
    torch.save(held, path)
    assert convert.read(path).config == CONFIG


@pytest.mark.parametrize("protocol", range(5))
def test_every_protocol_of_plain_values_passes(protocol, tmp_path):
    alphabet = [*map(chr, range(32, 127)), "é", "\U0001f600"]
    meta = {
        "vocab_size": len(alphabet),
        "itos": dict(enumerate(alphabet)),
        "stoi": {c: i for i, c in enumerate(alphabet)},
        "more": [None, True, 1.5, (1, (2,)), [], {}, -(2**40), "a" * 300],
    }
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta, protocol))
    assert nanogpt_meta.load(path).vocab_size == len(alphabet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_tensor_that_is_not_its_numbers_is_refused(dtype, tmp_path):
    """With a negative bit the stored values must be negated; a view as bytes raised
    RuntimeError."""
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    held = torch.load(path, weights_only=True)
    wte = held["model"][weights.WTE]
    negative, conjugate = torch._neg_view(wte), torch.complex(wte, wte).conj()
    odd = negative if dtype == torch.float32 else conjugate
    for name in (weights.WTE, "lm_head.weight"):
        held["model"][name] = odd
    torch.save(held, path)
    with pytest.raises(InputError, match=r"negative or conjugate|torch ComplexFloat"):
        convert.read(path).state()


def test_weights_that_share_memory_are_refused(tmp_path):
    """With an optimizer's state the file was large enough for both, and one weight replaced
    another."""
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    held = torch.load(path, weights_only=True)
    model = held["model"]
    model["transformer.h.0.ln_2.weight"] = model["transformer.h.0.ln_1.weight"]
    held["more"] = torch.zeros(9999)
    torch.save(held, path)
    with pytest.raises(InputError, match="store every weight separately"):
        convert.read(path)
