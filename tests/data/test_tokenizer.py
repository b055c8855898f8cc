"""Tokenizers: exact round trips, tiktoken equal to the trainer, broken files refused."""

import inspect
import os
import time
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from util import why_no_vocabulary

from gpt2.data import tiktoken_file
from gpt2.data import tokenizers as tk
from gpt2.errors import InputError

SETTINGS = settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
LINES = "First, the naïve café: 1 234 日本語 don't  \n\n\tWE'LL see... ¡años! " * 40
ANY_TEXT = st.text(
    st.one_of(
        st.sampled_from(" \r\n\t'sStTa1!\u00a0\u200b\x1c\x00é日😀\u0301"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def published():
    if reason := why_no_vocabulary():
        pytest.skip(reason)
    return tk.gpt2()


@pytest.fixture(scope="module")
def trained():
    return tk.train_bpe([LINES, inspect.getsource(inspect)], 400)


@pytest.fixture(params=["byte", "bpe", "gpt2"])
def any_tokenizer(request, trained):
    if request.param == "gpt2":
        return request.getfixturevalue("published")
    return {"byte": tk.byte(), "bpe": trained}[request.param]


@given(text=ANY_TEXT)
@SETTINGS
def test_round_trip_of_any_text(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert not len(ids) or ids.max() < any_tokenizer.vocab_size


@given(text=ANY_TEXT)
@SETTINGS
def test_round_trip_of_characters(text):
    assert tk.char(text + "x").decode(tk.char(text + "x").encode(text)) == text


@given(text=ANY_TEXT, sizes=st.lists(st.integers(1, 7), min_size=1))
@SETTINGS
def test_blocks_give_the_ids_of_the_whole_text(any_tokenizer, text, sizes):
    blocks, start = [], 0
    while start < len(text):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(text[start : start + size])
        start += size
    cut = list(tk.cut(blocks))
    assert "".join(cut) == text
    ids = [i for block in cut for i in any_tokenizer.encode(block)]
    assert ids == any_tokenizer.encode(text).tolist()


def test_a_block_is_cut_before_its_last_space():
    assert list(tk.cut(["one two ", "x", "three\n\nfour"])) == ["one two", " xthree", "\n\nfour"]


def streamed(tokenizer, ids):
    """The pieces of a text, decoded while its ids arrive."""
    decode = tokenizer.decoder()
    return [piece for piece in [*map(decode, ids), decode()] if piece]


@given(text=ANY_TEXT)
@SETTINGS
def test_stream_is_the_text_in_whole_characters(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    parts = streamed(any_tokenizer, ids)
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text


@given(ids=st.lists(st.integers(0, 255), max_size=30))
@SETTINGS
def test_stream_of_broken_utf8_equals_decode(ids):
    assert "".join(streamed(tk.byte(), ids)) == tk.byte().decode(ids)


def test_stream_holds_a_character_back_until_it_is_whole():
    ids = tk.byte().encode("a😀b")
    assert streamed(tk.byte(), ids) == ["a", "😀", "b"]


def test_tiktoken_encodes_as_the_trainer_does(monkeypatch):
    """tiktoken gets no merges: ranks alone must give the same ids."""
    import tokenizers

    trainees = []
    original = tokenizers.Tokenizer

    def remember(*args):
        trainees.append(original(*args))
        return trainees[-1]

    monkeypatch.setattr(tokenizers, "Tokenizer", remember)
    text = LINES + "aaaaaaa aaaa aabaa abab\n" * 20
    ours = tk.train_bpe([text[:700], text[700:]], 500)
    theirs = trainees[0]
    rng = np.random.default_rng()
    for _ in range(300):
        start, letters = rng.integers(0, len(text)), rng.choice(list("aab '\né1"), 40)
        sample = text[start : start + 80] + "".join(letters)
        assert ours.encode(sample).tolist() == theirs.encode(sample).ids, sample
    assert max(len(t) for t in ours.tokens[:-1]) > 3


def test_trained_vocabulary_has_the_size_asked_and_a_frequent_word(trained):
    assert trained.vocab_size == 400
    assert trained.eot == 399
    assert len(trained.encode(" return")) == 1


def test_gpt2_ids_are_the_published_ones(published):
    assert published.vocab_size == 50257
    assert published.encode("Hello, world!\n").tolist() == [15496, 11, 995, 0, 198]


def test_gpt2_from_a_folder(published, tmp_path):
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    (tmp_path / "encoder.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    with pytest.raises(InputError, match=r"tokenizer-dir .* must be GPT-2's"):
        tk.gpt2(tmp_path)
    for cached in Path(os.environ["TIKTOKEN_CACHE_DIR"]).iterdir():
        content = cached.read_bytes()
        if content.startswith((b"#version: 0.2\n", b'{"!": 0')):
            (tmp_path / ("vocab.bpe" if content[:1] == b"#" else "encoder.json")).write_bytes(
                content
            )
    again = tk.gpt2(tmp_path)
    assert again.tokens == published.tokens
    assert again.encode("Hello, world!\n").tolist() == [15496, 11, 995, 0, 198]


def test_end_of_text_is_text_unless_asked_for(any_tokenizer):
    text = f"a{tk.EOT}{tk.EOT}b"
    assert any_tokenizer.eot is None or any_tokenizer.eot not in any_tokenizer.encode(text)
    asked = any_tokenizer.encode(text, special=True).tolist()
    if any_tokenizer.eot is None:
        assert asked == any_tokenizer.encode(text).tolist()
    else:
        eot = any_tokenizer.eot
        a, b = any_tokenizer.encode("a").tolist(), any_tokenizer.encode("b").tolist()
        assert asked == [*a, eot, eot, *b]
        assert any_tokenizer.decode(asked) == text


def test_half_a_surrogate_pair_is_refused(any_tokenizer):
    """tiktoken alone would encode U+FFFD instead, without an error."""
    with pytest.raises(InputError, match=r"half a surrogate pair \(U\+D83D\) at character 2"):
        any_tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("character", ["é", "\x00", "\U0010ffff"])
def test_unknown_character_is_named(character):
    with pytest.raises(InputError, match=rf"U\+{ord(character):04X}.* 3 characters"):
        tk.char("abc").encode("ab" + character)


@pytest.mark.parametrize("bad", [-1, 256, 2**40])
def test_unknown_id_is_named(bad):
    with pytest.raises(InputError, match=f"0 to 255, got {bad}"):
        tk.byte().decode([65, bad])


@pytest.mark.parametrize("name", ["char", "byte", "bpe", "gpt2"])
def test_json_round_trip(name, trained, request):
    made = {"char": lambda: tk.char("né\n日😀"), "byte": tk.byte, "bpe": lambda: trained}
    before = made[name]() if name in made else request.getfixturevalue("published")
    after = tk.from_json(before.to_json())
    assert (after.name, after.tokens, after.eot) == (before.name, before.tokens, before.eot)
    assert after.encode("né\n日").tolist() == before.encode("né\n日").tolist()


def test_an_alphabet_keeps_its_order_and_holds_nothing_twice():
    """It was sorted, so that the ids of nanoGPT's files could change."""
    made = tk.characters("zyx\na")
    assert made.encode("xyz").tolist() == [2, 1, 0]
    again = tk.from_json(made.to_json())
    assert again.tokens == made.tokens and again.encode("a\nz").tolist() == [4, 3, 0]
    with pytest.raises(InputError, match="no character twice"):
        tk.from_json('{"name": "char", "alphabet": "aba"}')


@pytest.mark.parametrize("name", ["bpe.json", "bpe.tiktoken", "bpe"])
def test_a_file_called_json_is_json(name, tmp_path, monkeypatch):
    """`gpt2 tokenizer --out bpe.json` wrote lines of base64 instead."""
    import json

    from gpt2.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(LINES)
    assert main(["tokenizer", "text.txt", "--vocab-size", "300", "--out", name]) == 0
    text = (tmp_path / name).read_text()
    assert text.startswith("{") == name.endswith(".json")
    if name.endswith(".json"):
        assert json.loads(text)["name"] == "bpe"
    expected = tk.train_bpe([LINES], 300)
    assert tk.load(name).tokens == tk.named(name).tokens == expected.tokens


@pytest.mark.parametrize("name", ["char", "byte", "bpe", "gpt2"])
def test_the_first_ids_of_a_tokenizer(name, trained, request):
    made = {"char": lambda: tk.char("né\n日😀"), "byte": tk.byte, "bpe": lambda: trained}
    whole = made[name]() if name in made else request.getfixturevalue("published")
    size = whole.vocab_size - 1
    part = tk.first(whole, size)
    assert part.vocab_size == size and tk.first(whole, size + 1) is whole
    for kept in (part, tk.from_json(part.to_json())):
        assert kept.tokens == whole.tokens[:-1]
        assert kept.eot is None
        assert kept.encode("n").tolist() == whole.encode("n").tolist()
    if name == "char":
        with pytest.raises(InputError, match="text must be made of the model's 4 ids, got id 4"):
            part.encode("😀")
    assert tk.first(part, 3).whole is whole


def test_tiktoken_format_round_trip(trained, tmp_path):
    path = tmp_path / "ranks.tiktoken"
    path.write_text(tiktoken_file.to_text(trained))
    after = tk.load(path)
    assert after.tokens == trained.tokens
    assert after.encode(LINES).tolist() == trained.encode(LINES).tolist()


def test_a_changed_file_is_read_anew(trained, tmp_path):
    """tiktoken's reader caches a file by name, and would keep returning the old ranks."""
    path = tmp_path / "ranks.tiktoken"
    path.write_text(tiktoken_file.to_text(trained))
    assert tk.load(path).vocab_size == 400
    path.write_text(tiktoken_file.to_text(tk.train_bpe([LINES], 260)))
    assert tk.load(path).vocab_size == 260


HOSTILE = {
    "empty": b"",
    "not-json": b"{",
    "not-utf8": b"\xff\xfe",
    "list": b"[1]",
    "no-name": b"{}",
    "other-name": b'{"name": "pickle"}',
    "no-alphabet": b'{"name": "char", "alphabet": ""}',
    "numbers": b'{"name": "char", "alphabet": [1, 2]}',
    "surrogate": b'{"name": "char", "alphabet": "\\ud800"}',
    "bytes-missing": b'{"name": "bpe", "ranks": ["YQ=="]}',
    "not-base64": b'{"name": "bpe", "ranks": ["!"]}',
    "wrong-rank": b"YQ== 0\nYg== 7\n",
    "token-twice": b"".join(b"%s %d\n" % (b64encode(bytes([b])), b) for b in range(256))
    + b"YQ== 256",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_by_name(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer '.*tokenizer\.json': "):
        tk.load(path)


def test_gpt2_neither_found_nor_downloaded(monkeypatch):
    import requests
    import tiktoken

    def no_network(name):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(InputError, match=r"neither found nor downloaded.*tokenizer-dir"):
        tk.gpt2()


def test_names():
    assert tk.named("byte").name == "byte"
    for spec in ("char", "gpt3", "/no/such/file"):
        with pytest.raises(InputError, match=f"tokenizer must be .* got '{spec}'"):
            tk.named(spec)


# ---- learning in time


def test_a_long_piece_is_learned_from_in_time():
    """The trainer is quadratic in the length of a piece: 400 KB of one letter took 240 s, 4 MB
    hours."""
    start = time.perf_counter()
    learned = tk.train_bpe(["a" * 2**18] * 4, 300)
    assert time.perf_counter() - start < 10.0
    assert learned.vocab_size == 256 + 8 + 1  # a b c: 2, 4, … 256 letters
    assert len(learned.encode("a" * 1000)) < 10


@pytest.mark.parametrize("vocab_size", [-1, 256, 2**20 + 1, 2**31, 2**64])
def test_a_vocabulary_of_any_size_is_not_learned(vocab_size):
    """2^31 ids allocated memory for all of them before reading a letter."""
    with pytest.raises(InputError, match=r"vocab_size must be at .* most 1048576, got"):
        tk.train_bpe(iter(()), vocab_size)
