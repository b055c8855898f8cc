"""Sources, shards and batches: the right windows, the right offsets past 2 GiB, and errors for
broken files."""

import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import files
from gpt2.data import batches, shards
from gpt2.data import tokenizers as tk
from gpt2.data.batches import Split
from gpt2.data.prepare import prepare
from gpt2.errors import InputError


def llmc(*tokens, magic=20240520, version=1, count=None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


# Batches and windows


def test_y_is_x_one_later():
    x, y = Split([np.arange(1000, dtype=np.uint16)]).batch(seed=1, k=0, B=50, T=16)
    assert x.shape == y.shape == (50, 16)
    assert x.dtype == y.dtype == np.int64
    assert np.array_equal(y, x + 1)
    assert np.array_equal(x, x[:, :1] + np.arange(16))


def test_batch_is_a_function_of_seed_and_k():
    split = Split([np.arange(5000, dtype=np.uint16)])
    first = [split.batch(7, k, 8, 32)[0] for k in range(20)]
    again = [split.batch(7, k, 8, 32)[0] for k in reversed(range(20))][::-1]
    assert all(map(np.array_equal, first, again))
    starts = {tuple(x[:, 0]) for x in first} | {tuple(split.batch(8, 0, 8, 32)[0][:, 0])}
    assert len(starts) == 21


def test_batches_are_the_same_for_good():
    """Fixed numbers: neither numpy nor this package may change the batches of a seed."""
    x, _ = Split([np.arange(10000, dtype=np.uint16)]).batch(seed=1337, k=5, B=4, T=1)
    assert x[:, 0].tolist() == [6215, 2189, 1537, 579]


def test_every_window_is_drawn_equally_often_across_parts():
    parts = [np.arange(0, 7), np.arange(100, 103), np.arange(200, 220)]  # 3, 0 and 16 windows fit
    split = Split([part.astype(np.uint16) for part in parts])
    x, y = split.batch(seed=3, k=0, B=19000, T=4)
    assert np.array_equal(x + 1, y)
    places, counts = np.unique(x[:, 0], return_counts=True)
    assert places.tolist() == [0, 1, 2, *range(200, 216)]
    assert (abs(counts - 1000) < 5 * np.sqrt(1000)).all()


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda n: max(n) > 1),
    B=st.integers(1, 5),
    T=st.integers(1, 12),
)
def test_windows_hold_every_target_once(lengths, B, T):
    parts = [1000 * i + np.arange(n) for i, n in enumerate(lengths)]
    seen = []
    for x, y in Split([p.astype(np.uint16) for p in parts]).windows(B, T):
        assert x.shape == y.shape and 1 <= len(x) <= B and x.shape[1] == T
        assert (y[y >= 0] == x[y >= 0] + 1).all()
        assert (np.diff((y >= 0).astype(int), axis=1) <= 0).all()  # padding only at the end
        seen += y[y >= 0].tolist()
    assert seen == [t for part in parts for t in part[1:]]


def test_limited_windows_are_spread_and_the_same():
    split = Split([np.arange(6401, dtype=np.uint16)])
    for _ in range(2):
        windows = list(split.windows(4, 16, limit=5))
        assert [x[0, 0] for x, _ in windows] == [0, 1280, 2560, 3840, 5120]
        assert {x.shape for x, _ in windows} == {(4, 16)}


# Shards


def test_shard_formats_hold_the_same_ids(tmp_path):
    ids = np.array([5, 0, 65535, 7], dtype=np.uint16)
    (tmp_path / "raw.bin").write_bytes(ids.astype("<u2").tobytes())
    shards.write(tmp_path / "llmc.bin", ids)
    assert (tmp_path / "llmc.bin").read_bytes() == llmc(5, 0, 65535, 7)
    for name in ("raw.bin", "llmc.bin"):
        tokens = shards.read(tmp_path / name, 65536)
        assert tokens.tolist() == ids.tolist()
        assert not tokens.flags.owndata and not tokens.flags.writeable


BROKEN = {
    "empty": (b"", "is empty"),
    "odd": (b"\0\0\0", "odd size, 3 bytes"),
    "magic": (llmc(1, 2, magic=20240801), "magic 20240520, got 20240801"),
    "version": (llmc(1, 2, version=2), "version 1, got 2"),
    "truncated-header": (llmc()[:600], "header of 1024 bytes, got 600"),
    "truncated": (llmc(1, 2, 3)[:-2], "its header says, 3, got 2"),
    "too-long": (llmc(1, 2, 3) + b"\0\0", "its header says, 3, got 4"),
    "no-ids": (llmc(), "its header says, 0, got 0"),
    "absurd-count": (llmc(1, count=2**31 - 1), "its header says, 2147483647, got 1"),
    "negative-count": (llmc(1, count=-5), "its header says, -5, got 1"),
    "id-beyond-vocabulary": (llmc(1, 2, 300, 301), "below vocab_size 256, got 300 at position 2"),
    "raw-id-beyond": (b"\1\0\0\1", "below vocab_size 256, got 256 at position 1"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_shard_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.bin.*{message}"):
        shards.read(path, 256)


def test_shard_past_4_gib(tmp_path):
    """Byte offsets past 2³² and token offsets past 2³¹; all but the last 16 MiB is a sparse
    hole."""
    path = tmp_path / "big.bin"
    tail = (np.arange(2**23) % 65000 + 1).astype("<u2")
    count = 2**31 + len(tail)
    with path.open("wb") as file:
        file.seek(2 * (count - len(tail)))
        tail.tofile(file)
    if path.stat().st_blocks * 512 > 2**26:
        pytest.skip("this file system keeps no sparse files")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = shards.read(path, 65536)  # every uint16 is an id, so nothing is read
    assert len(tokens) == count
    x, y = Split([tokens]).batch(seed=0, k=0, B=3000, T=2)
    past = x[:, 0] > 0  # only the ids past 2³¹ differ from 0, except one in 256
    assert 1 <= past.sum() <= 40
    assert np.array_equal(y[past], x[past] % 65000 + 1)
    (x, y), *_ = Split([tokens[2**31 - 5 : 2**31 + 20]]).windows(1, 10)
    assert x.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3, 4, 5]]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**18, f"{grown} KiB of memory for a file that is mapped"


@pytest.mark.full
def test_ids_are_checked_past_4_gib(tmp_path):
    path = tmp_path / "big.bin"
    with path.open("wb") as file:
        file.seek(2 * (2**31 + 5))
        file.write(b"\xff\xff")
    with pytest.raises(InputError, match=rf"got 65535 at position {2**31 + 5}"):
        shards.read(path, 50257)


# Sources


def test_text_file_is_cut_into_train_and_validation(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 10)
    corpus = batches.load(str(path), block_size=8)
    assert corpus.tokenizer.name == "char"
    assert corpus.tokenizer.decode(corpus.train.parts[0]) == "abcdefghij" * 9
    assert corpus.tokenizer.decode(corpus.val.parts[0]) == "abcdefghij"
    assert corpus.train.parts[0].dtype == np.uint16


def test_shard_folder_uses_the_tokenizer_beside_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tk.char("abc").to_json())
    (tmp_path / "input.txt").write_bytes(b"\xff not read")
    shards.write(tmp_path / "x_train_1.bin", np.array([0, 1, 2] * 10))
    shards.write(tmp_path / "x_train_0.bin", np.array([2] * 30))
    shards.write(tmp_path / "x_val_0.bin", np.array([1] * 20))
    corpus = batches.load(str(tmp_path), block_size=8)
    assert corpus.tokenizer.decode([0, 1, 2]) == "abc"
    assert [len(p) for p in corpus.train.parts] == [30, 30]
    assert corpus.train.parts[0][0] == 2
    assert len(corpus.val) == 20


def test_loading_is_refused(tmp_path):
    text, shard, lone = tmp_path / "a.txt", tmp_path / "b_train.bin", tmp_path / "s"
    text.write_text("hello world " * 20)
    shards.write(shard, np.arange(100))
    lone.mkdir()
    shards.write(lone / "train_0.bin", np.arange(100))
    shards.write(lone / "train_1.bin", np.arange(100))
    cases = [
        (str(tmp_path / "none"), {}, "must be a file, a folder"),
        (str(text), {"block_size": 216}, "more than block_size 216 training tokens"),
        (str(text), {"val_fraction": 0.001}, "at least 2 validation tokens, got 239 and 1"),
        (str(text), {"tokenizer": tk.char("helo wr")}, "'d'"),
        (str(shard), {"tokenizer": "char"}, "tokenizer must be"),
        (str(shard), {"tokenizer": tk.char("abc")}, "below vocab_size 3, got 3 at position 3"),
        (str(lone), {"tokenizer": "byte"}, "a shard with 'val' in its name"),
        (str(tmp_path / "[ab]*"), {"tokenizer": "byte"}, "must not mix shards"),
    ]
    for source, arguments, message in cases:
        with pytest.raises(InputError, match=message):
            batches.load(source, **{"block_size": 8, **arguments})


def test_the_longest_block_that_fits_is_accepted(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 20)
    corpus = batches.load(str(tmp_path / "a.txt"), block_size=215)
    assert corpus.train.batch(0, 0, 2, 215)[0].shape == (2, 215)


# Prepare


def test_prepared_shards_train_as_their_text_does(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("the quick brown fox, naïve. " * 100)
    counts = prepare(str(text), tmp_path / "out", tokenizer="char", shard_tokens=1000)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["tokenizer.json", *[f"train_{n:06d}.bin" for n in range(3)], "val_000000.bin"]
    assert counts == {"train": 2520, "val": 280}
    ours, theirs = batches.load(str(tmp_path / "out"), 8), batches.load(str(text), 8)
    for part in ("train", "val"):
        a, b = (np.concatenate(getattr(c, part).parts) for c in (ours, theirs))
        assert np.array_equal(a, b)
    assert ours.tokenizer.tokens == theirs.tokenizer.tokens


def test_prepare_leaves_nothing_where_it_fails(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"a" * 2**19 + b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        prepare(str(bad), tmp_path / "out", tokenizer="byte")
    good = tmp_path / "good.txt"
    good.write_text("abc" * 100)
    big = tmp_path / "big.json"
    big.write_text(tk.char(map(chr, range(0x10000, 0x10000 + 65537))).to_json())
    for arguments, message in [
        ({"tokenizer": str(big)}, "at most 65536 ids.* got 65537"),
        ({"tokenizer": "what"}, "tokenizer must be"),
        ({"tokenizer": "byte", "shard_tokens": 2**31}, "shard_tokens"),
        ({"tokenizer": "byte", "val_fraction": 1.0}, "val_fraction"),
        ({"tokenizer": "byte", "val_fraction": 1e-17}, "one train and one val token"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare(str(good), tmp_path / "out", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "big.json", "good.txt"]


def test_prepare_does_not_overwrite(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(InputError, match="out must be new"):
        prepare(str(tmp_path / "a.txt"), tmp_path / "out", tokenizer="byte")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


# Files


def test_write_atomic_keeps_the_old_file_where_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
    (tmp_path / ".a.json.tmp-1").mkdir()
    (tmp_path / ".a.json.tmp-1" / "stray").touch()
    files.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
