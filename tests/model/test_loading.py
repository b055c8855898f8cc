"""gpt2.load and Model.from_pretrained: every format, vocabularies of every size, the form of
GELU."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from huggingface_models import random_model
from util import bits_equal

import gpt2
from gpt2 import Config, Model, loading
from gpt2.checkpoints import convert, llmc, nanogpt
from gpt2.cli import main
from gpt2.data import bytelevel, tokenizers
from gpt2.errors import InputError
from gpt2.generate import completion

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

BYTES = Config(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16)
FORMATS = {"hf": "hf", "run": "run", "nanogpt": "ckpt.pt", "llmc": "model.bin"}


@pytest.fixture(autouse=True)
def gelu_not_said(monkeypatch):
    monkeypatch.setattr(nanogpt, "_said", False)


def write(model, folder, format):
    """Writes a model in a format, unchanged, even if a byte tokenizer does not fit."""
    path, state = folder / FORMATS[format], model.to_state()
    if format == "hf":
        model.save_pretrained(path)
    elif format == "run":
        nanogpt.write(model.config, state, folder / "first.pt")
        convert.convert(folder / "first.pt", path, "run", tokenizer="byte")
    else:
        {"nanogpt": nanogpt, "llmc": llmc}[format].write(model.config, state, path)
    return path


def same(a, b):
    return all(bits_equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- formats


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:.*GELU")
def test_every_format_gives_a_model_and_its_tokenizer(format, tmp_path):
    model = random_model(BYTES)
    path = write(model, tmp_path, format)
    loaded, tokenizer = gpt2.load(path, tokenizer=None if format == "run" else "byte")
    assert tokenizer.name == "byte" and not loaded.training and loaded.fast
    assert same(loaded, model)
    loaded, _ = gpt2.load(str(path), tokenizer="byte", dtype=torch.bfloat16, fast=False)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and not loaded.fast


@pytest.mark.parametrize("source", [3, None, b"gpt2"])
def test_a_source_that_is_none_is_named(source):
    for load in (gpt2.load, Model.from_pretrained):
        with pytest.raises(InputError, match="model must be a name or a path, got"):
            load(source)


def test_a_device_that_is_none_is_named(tmp_path):
    Model(Config(8, 256, 1, 1, 16)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="device must be auto or one that works here, got 'mars'"):
        gpt2.load(tmp_path, device="mars", tokenizer="byte")


@pytest.mark.parametrize("dtype", ["float32", torch.int64, 32])
def test_a_dtype_that_is_none_is_named(dtype):
    with pytest.raises(InputError, match=r"dtype must be a floating torch.dtype or None, got"):
        gpt2.load("gpt2", dtype=dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:.*GELU")
def test_from_pretrained_reads_every_format(format, tmp_path):
    """Once it read only Hugging Face's folders."""
    model = random_model(BYTES)
    loaded = Model.from_pretrained(write(model, tmp_path, format), fast=True, dropout=0.2)
    assert same(loaded, model) and loaded.fast and not loaded.training
    assert loaded.config.dropout == 0.2
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_dropout_is_the_file_s_if_asked_for(tmp_path):
    config = Config(8, 256, 1, 2, 8, dropout=0.25)
    path = write(random_model(config), tmp_path, "run")
    assert Model.from_pretrained(path).config.dropout == 0.0
    assert Model.from_pretrained(path, dropout=None).config.dropout == 0.25


def test_importing_gpt2_loads_no_torch():
    code = "import gpt2, sys; assert 'torch' not in sys.modules; gpt2.load; import gpt2.loading"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert gpt2.load is loading.load


# ---- sizes


@pytest.mark.parametrize("format", ["hf", "nanogpt", "llmc"])
@pytest.mark.parametrize("rows", [200, 255, 257, 320, 1024])
@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_of_any_size_loads(rows, format, tmp_path):
    """A padded head, a resized one and a smaller one were refused, except for nanoGPT's padding."""
    model = random_model(Config(8, rows, 1, 2, 8))
    path = write(model, tmp_path, format)
    loaded, tokenizer = gpt2.load(path, tokenizer="byte")
    size = min(rows, 256)
    assert loaded.config.vocab_size == tokenizer.vocab_size == size
    wte = model.transformer.wte.weight
    assert bits_equal(loaded.transformer.wte.weight, wte[:size].contiguous())
    assert tokenizer.encode("abc").tolist() == [97, 98, 99]
    assert Model.from_pretrained(path).config.vocab_size == rows
    Model.from_pretrained(path).save_pretrained(tmp_path / "again")
    assert same(Model.from_pretrained(tmp_path / "again"), model)


def test_ids_beyond_the_tokenizer_are_never_sampled(tmp_path):
    """The padding rows have by far the largest logits, until they are dropped."""
    model = random_model(Config(32, 320, 1, 2, 8))
    with torch.no_grad():
        model.transformer.wte.weight[256:] *= 1e3
    path = write(model, tmp_path, "hf")
    assert (model.generate(torch.zeros(1, 1, dtype=torch.long), 50, seed=1) >= 256).any()
    loaded, tokenizer = gpt2.load(path, tokenizer="byte")
    ids = loaded.generate(torch.zeros(1, 1, dtype=torch.long), 50, seed=1)
    assert ids.max() < 256 and tokenizer.decode(ids[0])


def test_a_smaller_vocabulary_refuses_text_that_it_lacks(tmp_path, capsys):
    path = write(random_model(Config(8, 200, 1, 2, 8)), tmp_path, "hf")
    tokenizer = gpt2.load(path, tokenizer="byte")[1]
    with pytest.raises(InputError, match=r"text must be made of the model's 200 ids, got id 240"):
        tokenizer.encode("a😀")
    flags = ["sample", str(path), "--tokenizer", "byte", "--max-new-tokens", "3", "--prompt"]
    assert main([*flags, "abc"]) == 0
    assert main([*flags, "😀"]) == 2
    assert "got id 240" in capsys.readouterr().err
    again = tokenizers.from_json(tokenizer.to_json())
    assert again.vocab_size == 200 and again.decode([97]) == "a"
    with pytest.raises(InputError, match="200 ids"):
        again.encode("😀")


@pytest.fixture
def gpt2_of_bytes(monkeypatch):
    """Replaces GPT-2's tokenizer by one of 400 ids."""
    few = tokenizers.bpe([*[bytes([b]) for b in range(256)], *[b"a%c" % b for b in range(143)]])
    monkeypatch.setattr(tokenizers, "gpt2", lambda folder=None: few)
    return few


@pytest.mark.parametrize("rows", [65, 256, 1000])
@pytest.mark.parametrize("format", ["hf", "nanogpt", "llmc"])
@pytest.mark.filterwarnings("ignore:.*GELU")
def test_gpt2_s_tokenizer_is_not_assumed_for_another_size(format, rows, tmp_path, gpt2_of_bytes):
    """A model of characters would have been read and written with GPT-2's words."""
    path = write(random_model(Config(8, rows, 1, 2, 8)), tmp_path, format)
    advice = "data/DATASET/meta.pkl" if format == "nanogpt" else "convert --vocab-size"
    with pytest.raises(InputError, match=f"vocab_size {rows}, got 400 ids of GPT-2; .*{advice}"):
        gpt2.load(path)
    with pytest.warns(UserWarning, match="only the first"):
        gpt2.load(path, tokenizer="gpt2" if rows == 65 else str(few_ids(tmp_path)))


def few_ids(folder):
    (folder / "few.json").write_text(tokenizers.char("abc").to_json())
    return folder / "few.json"


@pytest.mark.parametrize("rows", [399, 400, 401, 448])
def test_gpt2_s_tokenizer_is_assumed_where_the_size_is_near(rows, tmp_path, gpt2_of_bytes):
    path = write(random_model(Config(8, rows, 1, 2, 8)), tmp_path, "hf")
    with warnings.catch_warnings(action="error"):
        model, tokenizer = gpt2.load(path)
    assert model.config.vocab_size == tokenizer.vocab_size == min(rows, 400)
    assert tokenizer.eot == (399 if rows >= 400 else None)
    assert "".join(completion.stream_text(model, tokenizer, "abc", 5, seed=1)) is not None


# ---- GELU


def gelu_lines(text):
    return [line for line in text.splitlines() if "GELU" in line]


COMMANDS = {
    "sample": "sample ckpt.pt --tokenizer byte --max-new-tokens 2",
    "eval": "eval ckpt.pt --tokenizer byte --data text.txt",
    "train": "train --init ckpt.pt --tokenizer byte --data text.txt --steps 1 --sample-tokens 0 "
    "--eval-batches 1 --out new",
    "convert": "convert ckpt.pt hf --to hf",
    "write": "convert hf new.pt --to nanogpt",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("default:.* was trained with GELU by erf")
def test_gelu_by_erf_is_said_in_one_line(command, tmp_path, monkeypatch, capsys):
    """sample, eval and train --init printed nothing."""
    monkeypatch.chdir(tmp_path)
    model = random_model(BYTES)
    write(model, tmp_path, "hf" if command == "write" else "nanogpt")
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 50)
    assert main(COMMANDS[command].split()) == 0
    (line,) = gelu_lines(capsys.readouterr().err)
    assert line.startswith("gpt2: warning: ") and "erf" in line and "tanh" in line


def test_gelu_is_said_from_python_once_and_of_nanogpt_alone(tmp_path):
    model = random_model(BYTES)
    with warnings.catch_warnings(action="error"):
        for format in ("hf", "llmc"):
            gpt2.load(write(model, tmp_path, format), tokenizer="byte")
    path = write(model, tmp_path, "nanogpt")
    with pytest.warns(UserWarning, match="GELU by erf"):
        Model.from_pretrained(path)
    with warnings.catch_warnings(action="error"):
        gpt2.load(path, tokenizer="byte")
        convert.convert(path, tmp_path / "copy.pt", "nanogpt")


@pytest.mark.parametrize("kind", ["dangling", "pipe", "folder"])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_tokenizer_that_cannot_be_read_is_not_absent(kind, name, tmp_path):
    """GPT-2's tokenizer was used instead, or none written, without an error."""
    folder = write(random_model(BYTES), tmp_path, "hf")
    if kind == "dangling":
        (folder / name).symlink_to("none")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    told = f"tokenizer {str(folder / name)!r} cannot be read: "
    for read in (
        lambda: loading.load(folder),
        lambda: tokenizers.load(folder),
        lambda: convert.convert(folder, tmp_path / "out", "hf"),
        lambda: convert.convert(folder, tmp_path / "out", "run"),
    ):
        with pytest.raises(InputError, match=told):
            read()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
def test_what_belongs_to_a_tokenizer_is_not_absent_either(name, tmp_path):
    vocab = {c: i for i, c in enumerate(bytelevel.BYTE_OF_CHAR)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert tokenizers.load(tmp_path).vocab_size == 256
    (tmp_path / name).symlink_to("none")
    with pytest.raises(InputError, match=f"{name}' cannot be read: "):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "ckpt.pt"])
def test_a_model_that_is_a_dangling_link_is_named(name, tmp_path):
    (tmp_path / name).symlink_to("none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=f"{name}' cannot be read: No such file"):
        loading.load(tmp_path)
