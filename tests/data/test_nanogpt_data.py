"""nanoGPT's folders of characters: meta.pkl is the tokenizer, and may hold only plain data."""

import pickle
import struct

import numpy as np
import pytest
from checkpoint_files import published
from huggingface_models import random_model

from gpt2 import Config
from gpt2.checkpoints import nanogpt
from gpt2.cli import main
from gpt2.data import batches, nanogpt_meta, shards
from gpt2.data import tokenizers as tk
from gpt2.errors import InputError

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

ALPHABET = "zyxwvutsrqponmlkjihgfedcba \n"  # nanoGPT sorts; the file's order is kept
TEXT = "the quick brown fox jumps over the lazy dog\n" * 12


def meta(alphabet=ALPHABET, **changes):
    itos = dict(enumerate(alphabet))
    made = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    return {**made, **changes}


def folder_of(path, found=None, alphabet=ALPHABET, protocol=None):
    """Writes a folder as data/shakespeare_char/prepare.py does."""
    path.mkdir(exist_ok=True)
    ids = np.array([alphabet.index(c) for c in TEXT], dtype=np.uint16)
    cut = len(ids) * 9 // 10
    ids[:cut].tofile(path / "train.bin")
    ids[cut:].tofile(path / "val.bin")
    found = meta(alphabet) if found is None else found
    content = found if isinstance(found, bytes) else pickle.dumps(found, protocol)
    (path / "meta.pkl").write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_the_alphabet_of_meta_pkl_reads_the_shards(protocol, tmp_path):
    """They were read with GPT-2's BPE: every number that training printed was for other text."""
    folder = folder_of(tmp_path / "data", protocol=protocol)
    corpus = batches.load(str(folder), 8)
    assert corpus.tokenizer.name == "char"
    text = corpus.tokenizer.decode(np.concatenate([*corpus.train.parts, *corpus.val.parts]))
    assert text == TEXT
    assert corpus.tokenizer.encode("zyx").tolist() == [0, 1, 2]
    again = tk.from_json(corpus.tokenizer.to_json())
    assert again.tokens == corpus.tokenizer.tokens and again.encode("zyx").tolist() == [0, 1, 2]
    assert batches.load(str(folder / "train.bin"), 8).tokenizer.tokens == again.tokens


def test_a_named_tokenizer_and_our_own_file_come_first(tmp_path):
    folder = folder_of(tmp_path / "data", b"broken")
    assert batches.load(str(folder), 8, tokenizer="byte").tokenizer.name == "byte"
    (folder / tk.FILE).write_text(tk.byte().to_json())
    assert batches.load(str(folder), 8).tokenizer.name == "byte"


BROKEN = {
    "empty": b"",
    "text": b"hello",
    "cut short": pickle.dumps(meta())[:-40],
    "list": [1],
    "no itos": {"vocab_size": 65},
    "size": meta(vocab_size=65),
    "hole": meta(itos={0: "a", 2: "b"}),
    "bool": meta(itos={False: "a", True: "b"}),
    "text id": meta(itos={"0": "a"}),
    "words": meta(itos={0: "a", 1: "bc"}),
    "bytes": meta(itos={0: b"a"}),
    "twice": meta(itos={0: "a", 1: "a"}),
    "other stoi": meta(stoi={"a": 7}),
    "nothing": meta(""),
    "surrogate": meta(itos={0: "\ud800"}, stoi={"\ud800": 0}, vocab_size=1),
    "too large": pickle.dumps("x" * 2**22),
}


class Evil:
    def __reduce__(self):
        return print, ("pwned",)


HOSTILE = {
    "reduce": pickle.dumps({**meta(), "x": Evil()}),
    "reduce-0": pickle.dumps({**meta(), "x": Evil()}, 0),
    "instance": b"(ios\nsystem\n.",
    "global": b"cos\nsystem\n.",
    "stack-global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"Pid\n.",
    "memo": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
    "memo-0": b"}p%d\n." % 2**31,
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
    "build": b"\x80\x02}}b.",
    "many": b"\x80\x02]" + b"(2" * 1000 + b".",
    "loop": b"\x80\x02}q\x00X\x04\x00\x00\x00itosh\x00s.",
    "number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("found", [*BROKEN.values(), *HOSTILE.values()], ids=[*BROKEN, *HOSTILE])
def test_a_meta_pkl_that_cannot_be_read_is_refused(found, tmp_path, monkeypatch, capsys):
    folder_of(tmp_path / "data", found)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "data", "--out", "new"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not (tmp_path / "new").exists()
    (line,) = printed.err.splitlines()
    assert line.startswith("gpt2: error: tokenizer 'data/meta.pkl' must hold an alphabet")
    assert "--tokenizer names the one that made 'train.bin'" in line and len(line) < 450
    with pytest.raises(InputError, match=r"meta.pkl' must hold an alphabet"):
        nanogpt_meta.load(tmp_path / "data" / "meta.pkl")


def test_a_hundred_thousand_characters_are_read(tmp_path):
    """Characters of every plane: the size of the file is limited, not the alphabet."""
    alphabet = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000][::9]
    path = folder_of(tmp_path / "data", meta(alphabet)) / "meta.pkl"
    assert tk.load(path).vocab_size == len(alphabet)


# ---- with a model


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of data, and nanoGPT's out folder with a model of it."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "chars")
    model = random_model(Config(16, len(ALPHABET), 1, 2, 8))
    (tmp_path / "out-chars").mkdir()
    nanogpt.write(model.config, model.to_state(), tmp_path / "out-chars" / "ckpt.pt")
    monkeypatch.setattr(nanogpt, "_said", True)
    return tmp_path


def test_a_model_of_characters_says_which_tokenizer_it_needs(place, capsys, monkeypatch):
    monkeypatch.setattr(tk, "gpt2", lambda folder=None: tk.char(map(chr, range(1, 1000))))
    assert main(["sample", "out-chars"]) == 2
    line = capsys.readouterr().err
    assert "vocab_size 28" in line and "--tokenizer data/DATASET/meta.pkl" in line
    for spec in ("chars/meta.pkl", "chars"):
        flags = ["--tokenizer", spec, "--prompt", "zyx", "--max-new-tokens", "4"]
        assert main(["sample", "out-chars", *flags]) == 0
    assert capsys.readouterr().out.startswith("zyx")


def test_meta_pkl_is_a_tokenizer_everywhere(place, capsys):
    named = ["--tokenizer", "chars/meta.pkl"]
    assert main(["eval", "out-chars", *named, "--data", "chars", "--json"]) == 0
    assert main(["convert", "out-chars", "run", "--to", "run", *named]) == 0
    assert main(["eval", "run", "--data", "chars/val.bin"]) == 0
    few = ["--steps", "1", "--sample-tokens", "0", "--batch-size", "2", "--out"]
    assert main(["train", "--init", "out-chars", *named, "--data", "chars", *few, "a"]) == 0
    sizes = ["--block-size", "8", "--n-layer", "1", "--n-embd", "8", "--n-head", "1"]
    assert main(["train", "--data", "chars", *sizes, *few, "b"]) == 0
    for run in ("a", "b", "run"):
        assert tk.load(place / run / tk.FILE).encode("zyx").tolist() == [0, 1, 2]


def test_a_model_of_another_alphabet_is_refused(place, capsys):
    """Ids of one alphabet are other characters in another alphabet of the same size."""
    assert main(["convert", "out-chars", "run", "--to", "run", "--tokenizer", "chars"]) == 0
    folder_of(place / "sorted", alphabet="".join(sorted(ALPHABET)))
    assert main(["eval", "run", "--data", "sorted"]) == 2
    assert "must be made with the model's tokenizer" in capsys.readouterr().err


# ---- shards with ids far below the vocabulary size


@pytest.fixture
def gpt2_like(monkeypatch):
    """Replaces GPT-2's tokenizer by a BPE of 4,096 ids."""
    pairs = [bytes([a, b]) for a in range(60) for b in range(64)][: 4095 - 256]
    found = tk.bpe([*[bytes([b]) for b in range(256)], *pairs])
    monkeypatch.setattr(tk, "gpt2", lambda folder=None: found)
    return found


@pytest.mark.parametrize(
    ("count", "highest", "refused"),
    [
        *[(255, 64, False), (300, 64, True), (300, 511, True), (300, 512, False)],
        *[(70000, 2000, True), (60000, 2000, False), (70000, 2048, False)],
    ],
)
def test_ids_far_below_a_vocabulary_that_nobody_named(count, highest, refused, tmp_path, gpt2_like):
    ids = np.arange(count) % 60
    ids[count // 2] = highest
    shards.write(tmp_path / "x.bin", ids)
    source = str(tmp_path / "x.bin")
    assert len(batches.load(source, 8, tokenizer="gpt2").train) == int(count * 0.9)
    assert len(batches.whole(source, gpt2_like, named=True)) == count
    loads = (lambda: batches.load(source, 8), lambda: batches.whole(source, gpt2_like))
    for load in loads:
        if not refused:
            load()
            continue
        with pytest.raises(InputError, match=r"default tokenizer, .* all .* below .*--tokenizer"):
            load()
    (tmp_path / tk.FILE).write_text(gpt2_like.to_json())
    for load in loads:
        load()


def test_text_of_gpt2_s_own_tokens_is_never_refused(tmp_path):
    """A few hundred tokens of ordinary English."""
    tokenizer = published()
    text = "All human beings are born free and equal in dignity and rights. They are endowed with "
    text += "reason and conscience and should act towards one another in a spirit of brotherhood. "
    shards.write(tmp_path / "x.bin", np.resize(tokenizer.encode(text), 300))
    assert batches.load(str(tmp_path / "x.bin"), 8).tokenizer.vocab_size == 50257
