"""Training text: files, folders, patterns, standard input, and the default text."""

import io
import os
import re
import sys
import types

import numpy as np
import pytest

from gpt2.data import batches, documents, reference_text
from gpt2.data import tokenizers as tk
from gpt2.errors import InputError


def default_text():
    corpus = batches.load(None, block_size=64)
    return "".join(map(corpus.tokenizer.decode, [*corpus.train.parts, *corpus.val.parts]))


def test_default_text_reads_as_sentences():
    """Half of the default text was rules, tables, grammar and code, and so were its samples."""
    text = default_text()
    assert 100_000 < len(text) < 500_000 and text.isascii()
    for paragraph in filter(None, text.split("\n")):
        assert paragraph[0].isupper() or paragraph[0] in "\"'(", paragraph
        assert paragraph.rstrip("\"')")[-1] in ".!?", paragraph
        assert not re.search(r"::=|>>>|---|===|\*\*\*|\+-|[|<>=\\]|  ", paragraph), paragraph
    words = text.split()
    plain = [word for word in words if re.fullmatch(r"[A-Za-z][a-z'-]*[,.;:]?", word)]
    assert len(plain) > 0.85 * len(words)
    assert "the" in words and "Assert statements are a convenient way" not in text  # before code


TOPIC = """
The "assert" statement
**********************

Assert statements are a convenient way to insert
assertions into a *program*. [1]  They are **not** code.

   assert_stmt ::= "assert" expression ["," expression]

is equivalent to

   if __debug__:
       if not expression: raise AssertionError

+------------+-----------------------------------------------------+
| Operation  | The sum of the two numbers that are given to it.    |
+------------+-----------------------------------------------------+

* The value of the variable is determined when “it” starts.

[1] This note is long enough to be a sentence of English.

>>> Print the sum of all the numbers that are here.
"""


def test_what_is_kept_of_a_topic():
    kept = [
        "Assert statements are a convenient way to insert assertions into a program. "
        "They are not code.",
        'The value of the variable is determined when "it" starts.',
        "This note is long enough to be a sentence of English.",
    ]
    assert reference_text.prose(TOPIC).split("\n\n") == kept
    assert reference_text.prose("") == reference_text.prose("if x:\n    Y.") == ""


def test_folder_joins_its_documents_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "b.txt").write_text("bbb")
    (tmp_path / "sub" / "c.txt").write_text("ccc")
    (tmp_path / "a.txt").write_text("aaa")
    texts = documents.documents(str(tmp_path))
    joined = np.concatenate(list(documents.encode(texts, tk.byte())))
    assert tk.byte().decode(joined) == "aaa\nbbb\nccc"
    chars = documents.tokenizer_for(texts, None, None)  # with the newline, which no file has
    assert chars.decode(np.concatenate(list(documents.encode(texts, chars)))) == "aaa\nbbb\nccc"
    ranks = [bytes([b]) for b in range(256)]
    joined = np.concatenate(list(documents.encode(texts, tk.bpe(ranks))))
    assert tk.bpe(ranks).decode(joined) == "aaa<|endoftext|>bbb<|endoftext|>ccc"
    assert (joined == 256).sum() == 2


def test_pattern_takes_what_matches(tmp_path):
    for name in ("a.md", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    texts = documents.documents(str(tmp_path / "*.md"))
    assert [os.path.basename(text.name) for text in texts] == ["a.md", "c.md"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "a[1].txt").write_text("hello")
    assert len(documents.documents(str(tmp_path / "a[1].txt"))) == 1


def test_standard_input(monkeypatch):
    text = "über alles " * 100
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
    corpus = batches.load("-", block_size=8, val_fraction=0.5)
    assert corpus.tokenizer.decode(corpus.train.parts[0]) == text[:550]


def test_text_is_the_same_in_any_blocks(monkeypatch, tmp_path):
    """A character or a BPE piece may span the blocks in which a file is read."""
    text = "日本語 😀 naïve don't  \r\n\r\n " * 20
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    bpe = tk.train_bpe([text], 300)
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(documents, "BLOCK_BYTES", size)
        for tokenizer in (bpe, tk.byte(), tk.char(text)):
            ids = np.concatenate(list(documents.encode(documents.documents(str(path)), tokenizer)))
            assert ids.tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("block", [1, 4, 2**18])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xffdef", "got 0xff at byte 3"),
        ("abc日".encode()[:-1], "got 0xe6 at byte 3"),
        ("日".encode() + b"ab\xc3(", "got 0xc3 at byte 5"),
    ],
    ids=["alone", "cut-short", "in-the-middle"],
)
def test_not_utf8_is_refused_at_its_byte(block, content, message, monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "BLOCK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.txt.* must be UTF-8, {message}"):
        batches.load(str(path), block_size=2)
