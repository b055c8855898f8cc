"""Only regular files of bounded size are read; other things with such a name are refused."""

import json
import os
import socket
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import CONFIG, header_of, random_state, write

import gpt2
from gpt2 import files
from gpt2.checkpoints import checkpoint, convert, llmc
from gpt2.data import batches, bytelevel, documents, hf_tokenizer, nanogpt_meta, shards
from gpt2.data import tokenizers as tk
from gpt2.errors import InputError, brief, quoted
from gpt2.evaluate import multiple_choice
from gpt2.generate import completion

KINDS = {"pipe": "a named pipe", "socket": "a socket", "device": "a device", "folder": "a folder"}


@pytest.fixture(params=KINDS)
def odd(request, tmp_path, monkeypatch):
    """A name that is no regular file, with any suffix; and the kind of thing it is."""
    monkeypatch.chdir(tmp_path)  # keeps the name of a socket short

    def make(name):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if request.param == "pipe":
            os.mkfifo(name)
        elif request.param == "socket":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(name)
        elif request.param == "device":
            os.symlink("/dev/zero", name)
        else:
            os.mkdir(name)
        return name

    return make, KINDS[request.param]


READERS = {
    "prompts": ("p.txt", lambda p: completion.read_prompts(p)),
    "choices": ("c.jsonl", lambda p: multiple_choice.read(p, tk.byte(), 8)),
    "meta": ("meta.pkl", lambda p: nanogpt_meta.load(Path(p))),
    "shard": ("t.bin", lambda p: shards.read(Path(p), 10)),
    "described": ("tokenizer.json", lambda p: convert.described(p)),
    "text": ("text", lambda p: files.read_text(p)),
}


@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_opened(reader, odd):
    """A pipe without a writer made readers wait for ever; /dev/zero ended in a MemoryError."""
    name, read = READERS[reader]
    make, kind = odd
    start = time.perf_counter()
    with pytest.raises((InputError, OSError), match=kind):
        read(make(name))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("name", ["model.safetensors", "ckpt.pt", "model.bin", "tokenizer.json"])
def test_a_model_s_file_that_is_no_file(name, odd):
    make, kind = odd
    folder = Path(make(f"model/{name}")).parent
    shards.write(folder / "train.bin", np.zeros(99, dtype=np.uint16))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    for source in (folder, folder / name):
        with pytest.raises(InputError):
            convert.read(source)
        with pytest.raises(InputError):
            tk.load(source)
    if name == "model.safetensors":
        with pytest.raises(InputError, match=kind):
            convert.read(folder)
    if name == "tokenizer.json":
        with pytest.raises(InputError, match=kind if kind != "a folder" else "must hold"):
            batches.load(str(folder / "train.bin"), 4)
    if kind != "a folder":
        with pytest.raises(InputError, match=f"model .* got {kind}"):
            convert.read(folder / name)


def test_a_pipe_as_data_is_standard_input_s(tmp_path, monkeypatch, odd):
    make, kind = odd
    if kind == "a folder":
        pytest.skip("a folder of texts is data")
    with pytest.raises(InputError, match=kind) as refused:
        documents.documents(make("data"))
    assert ("- < PIPE" in str(refused.value)) == (kind == "a named pipe")


def test_an_endless_standard_input_ends(monkeypatch):
    class Endless:
        def read(self, size):
            return b"a\n" * (size // 2)

    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=Endless()))
    monkeypatch.setattr(files.reading, "MAX_LINES_BYTES", 2**22)
    with pytest.raises(InputError, match="at most 4194304 bytes of standard input"):
        files.read_lines("prompts", "-")
    with pytest.raises(InputError, match="data: at most 4194304 bytes"):
        files.read_stdin("data", 2**22)


def test_no_more_than_the_limit_is_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # zeros, without a block on the disk
    for read in (tk.load, convert.described, lambda p: files.read_lines("prompts", p)):
        with pytest.raises(InputError, match="at most"):
            read(path)
    for name in ("vocab.json", "merges.txt"):
        os.link(path, tmp_path / name)
    with pytest.raises(InputError, match="at most"):
        tk.load(tmp_path / "vocab.json")
    with pytest.raises(ValueError, match="grows"):
        files.read_text("/proc/self/status")


def test_a_name_that_no_file_can_have(tmp_path):
    """NUL raised a ValueError with a traceback; a long name gave a message of the same length."""
    for name in ("a\0b", "a" * 5000, "a/" * 3000, "\ud800"):
        for call in (
            lambda n: gpt2.load(n),
            lambda n: gpt2.load(tmp_path, tokenizer=n),
            lambda n: batches.load(n, 8),
            lambda n: tk.load(n),
            lambda n: tk.named(n),
            lambda n: tk.gpt2(n),
            lambda n: files.read_lines("prompts", n),
            lambda n: files.check_new("out", n),
            lambda n: files.check_new_folder("out", n),
            lambda n: files.make_folder("out", n),
            lambda n: convert.described(n),
        ):
            with pytest.raises(InputError) as refused:
                call(name)
            message = str(refused.value)
            assert len(message) < 500 and "\0" not in message and "\n" not in message
            message.encode()


def test_long_names_are_shortened():
    assert quoted("a b") == "'a b'"
    long = quoted("/".join(map(str, range(999))))
    assert len(long) == 200 and long.startswith("'0/1/2/") and long.endswith("/997/998'")
    assert len(brief("é" * 999)) == 200


def test_a_folder_1200_deep(tmp_path, monkeypatch):
    """Path.rglob and glob recurse once per level and raised RecursionError."""
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("a.txt").write_text("hello world " * 20)
    os.chdir(tmp_path)
    try:
        assert sum(document.size for document in documents.documents(str(tmp_path))) == 240
        assert sum(document.size for document in documents.documents("**/*.txt")) == 240
        os.rename("d", ".d.tmp-1")
        with pytest.raises(InputError, match="nests too deeply"):
            files.sweep(tmp_path)
    finally:
        os.rename(".d.tmp-1", "d") if os.path.exists(".d.tmp-1") else None
        remove_deep(tmp_path, 1200)


def remove_deep(folder, levels):
    """Removes a deep folder; shutil.rmtree recurses once per level."""
    os.chdir(folder)
    for _ in range(levels):
        os.chdir("d")
    Path("a.txt").unlink(missing_ok=True)
    for _ in range(levels):
        os.chdir("..")
        os.rmdir("d")


def test_the_sweep_leaves_what_no_writer_makes(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    os.symlink(tmp_path / "kept", tmp_path / ".x.tmp-link")
    (tmp_path / ".x.tmp-file").write_text("mine")
    (tmp_path / ".x.tmp-folder" / "deep").mkdir(parents=True)
    files.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".x.tmp-file", ".x.tmp-link", "kept"]
    assert (tmp_path / "kept" / "file").read_text() == "mine"


# ---- JSON


def test_keys_twice_are_found_in_time():
    """Comparing every key with all others took 17 s for 429 KB."""
    text = "{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":1}'
    start = time.perf_counter()
    with pytest.raises(ValueError, match="key '99999' twice"):
        files.parse_json(text)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("depth", [101, 500, 990, 10**5])
def test_json_nests_a_hundred_deep(depth):
    """At the deepest readable nesting, repr in a message exceeded the recursion limit."""
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        with pytest.raises(ValueError, match="nested too deeply"):
            files.parse_json(text)


def test_brackets_in_texts_are_no_depth():
    found = {"a": "[{" * 1000, '"[': '\\"' * 200, "b": [[["]"]]] * 200}
    assert files.parse_json(json.dumps(found)) == found


# ---- sizes


def test_layers_are_bounded_by_the_file(tmp_path):
    """A file of 3 MB with a width of 1 took 1.5 GB and 20 s."""
    header = np.zeros(256, dtype="<i4")
    L = 60_000
    header[:8] = llmc.MAGIC, 5, 1, 1, L, 1, 1, 1
    path = tmp_path / "model.bin"
    path.write_bytes(header.tobytes() + bytes(2 * (1 + 1 + 25 * L + 2)))
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"must have at most 1000 layers in 3\d+ bytes, got 60000"):
        convert.read(path).state()
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("n_layer", [10**18, 10**5, 101])
@pytest.mark.parametrize("format", ["hf", "nanogpt"])
def test_absurd_layers_are_refused_at_once(format, n_layer, tmp_path):
    path = write(CONFIG, random_state(), tmp_path, format)
    if format == "hf":
        found = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**found, "n_layer": n_layer}))
    else:
        held = torch.load(path, weights_only=True)
        held["model_args"]["n_layer"] = n_layer
        torch.save(held, path)
    start = time.perf_counter()
    with pytest.raises(InputError, match=f"weights of {n_layer} layers"):
        convert.read(path)
    assert time.perf_counter() - start < 1.0


def test_what_is_read_of_hf_is_what_its_files_hold(tmp_path):
    """--init took the sizes from config.json alone, whatever the weights were."""
    path = write(CONFIG, random_state(), tmp_path, "hf")
    found = json.loads((path / "config.json").read_text())
    for key in ("n_embd", "vocab_size", "n_positions"):
        (path / "config.json").write_text(json.dumps({**found, key: 2**40}))
        with pytest.raises(InputError, match="must hold"):
            convert.read(path)


def many_layers(header):
    described = json.loads(header["__metadata__"]["gpt2"])
    described["config"]["n_layer"] = 1500
    header["__metadata__"]["gpt2"] = json.dumps(described)
    at = max(part["data_offsets"][1] for part in header.values() if "data_offsets" in part)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [at, at]}
    return {**header, **{f"x{i}": empty for i in range(20_000)}}


def test_a_checkpoint_of_many_names_is_judged_in_time(tmp_path):
    """Each name was compared with all others, which took 20 s."""
    folder = write(CONFIG, random_state(), tmp_path, "run")
    header_of(folder / checkpoint.FILE, many_layers)
    start = time.perf_counter()
    with pytest.raises(InputError, match="must have at most 1000 layers"):
        checkpoint.read(folder / checkpoint.FILE)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_checkpoint_with_one_weight_under_two_names(prefix, tmp_path):
    """The last in the order of names was used, whatever the other contained."""
    folder = write(CONFIG, random_state(), tmp_path, "run")
    name = "transformer.ln_f.weight"

    def change(header):
        at = max(part["data_offsets"][1] for part in header.values() if "data_offsets" in part)
        size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
        return {**header, prefix + name: {**header[name], "data_offsets": [at, at + size]}}

    header_of(folder / checkpoint.FILE, change)
    with (folder / checkpoint.FILE).open("ab") as file:
        file.write(bytes(4 * CONFIG.n_embd))
    with pytest.raises(InputError, match=f"must hold {name} once"):
        checkpoint.read(folder / checkpoint.FILE)


def test_json_of_many_values_is_not_read():
    with pytest.raises(ValueError, match="more than 4194304 values"):
        files.parse_json("[" + "[]," * 2**21 + "[]]")


def test_lines_are_bounded(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\n" * (2**20 + 1))
    with pytest.raises(InputError, match="at most 1048576 lines are read, got 1048577"):
        files.read_lines("prompts", path)


def test_an_excerpt_of_lines_that_cannot_be_encoded_ends(tmp_path):
    """Each line raised an exception: a minute for 4 MB."""
    path = tmp_path / "text"
    path.write_bytes(b"\n" * 2**22)
    start = time.perf_counter()
    assert len(documents.excerpt(str(path), tk.char("a"), 10)) == 0
    assert time.perf_counter() - start < 10.0


def test_an_alphabet_has_no_more_characters_than_unicode():
    with pytest.raises(InputError, match="at most 262144 characters, got 300000"):
        tk.characters(list(map(chr, range(100, 300_100))))


@pytest.mark.parametrize("word", ["ab", "", "\ud800"])
def test_an_alphabet_has_single_characters(word, tmp_path):
    """A word in the tokenizer.json of a character tokenizer raised a TypeError."""
    with pytest.raises(InputError, match="single characters, got"):
        tk.characters(["a", word])
    state = hf_tokenizer.to_state(tk.char("a"))
    state["model"]["vocab"][word] = 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="single characters, got"):
        tk.load(tmp_path)


def test_the_merges_of_a_long_token_are_found_in_time():
    """Every pair was looked up again for every merge: 100 KB took hours."""
    ranks = [bytes([b]) for b in range(256)] + [b"aa", b"aaaa", b"a" * 100_000 + b"b"]
    start = time.perf_counter()
    assert bytelevel.merges_of(ranks) == ([(b"a", b"a"), (b"aa", b"aa")], False)
    assert time.perf_counter() - start < 5.0
