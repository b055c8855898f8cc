"""Every readable format, with a small good file and its reader. test_hostile.py spoils a few of
each for the readers; tools/fuzz_files.py spoils a million.

A spoilt file is a function of its target and its number, so that failures can be reproduced.
"""

import json
import pickle
import random
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import spoiled_files
import torch

from gpt2 import Config, Model, files
from gpt2.checkpoints import checkpoint, convert, huggingface, llmc, nanogpt, weights
from gpt2.data import batches, documents, shards, tiktoken_file, tokenizers
from gpt2.evaluate import multiple_choice
from gpt2.generate import completion
from gpt2.train import best, metrics, optim, run_folder
from gpt2.train.config import TrainConfig

CONFIG = Config(block_size=4, vocab_size=5, n_layer=1, n_head=2, n_embd=4)
ALPHABET = "abc\n\u00e9"


class Target(NamedTuple):
    file: str  # the one to spoil, in a folder of good files
    mutation: spoiled_files.Mutation
    read: Callable[[Path], object]  # reads from the folder
    files: int  # its share of 128,000
    is_read: bool = True  # whether the good file is read, not refused
    refused: float = 0.3  # least share of spoilt files that must be refused


def read_hf(folder):
    return huggingface.read_state(folder, huggingface.read_config(folder))


def read_source(name):
    return lambda folder: convert.read(folder / name).state()


def read_checkpoint(folder):
    config, _ = checkpoint.read(folder / checkpoint.FILE)
    model = Model(config)
    adamw = optim.adamw(model, lr=1.0, betas=(0.9, 0.9), weight_decay=0.0)
    checkpoint.load(folder / checkpoint.FILE, model, adamw)


def read_run(folder):
    model = convert.read(folder)
    return model.state(), convert.own_tokenizer(model), convert.described(folder / "tokenizer.json")


def read_tokenizer(name):
    """A reader of a tokenizer file that encodes a text with all its characters."""

    def read(folder):
        tokenizer = tokenizers.load(folder / name)
        ids = tokenizer.encode(tokenizer.decode(range(tokenizer.vocab_size))[:1000])
        return tokenizer.decode(ids)

    return read


def read_data(name):
    return lambda folder: batches.load(str(folder / name), block_size=4)


def read_prompts(name):
    def read(folder):
        completion.read_prompts(str(folder / name), strict=False)
        return completion.read_prompts(str(folder / name))

    return read


def read_excerpt(folder):
    return documents.excerpt(str(folder / "text"), tokenizers.char(ALPHABET), 99)


TARGETS = {
    "config": Target("hf/config.json", spoiled_files.of_json, lambda f: read_hf(f / "hf"), 20_000),
    "safetensors": Target(
        "hf/model.safetensors", spoiled_files.of_safetensors, lambda f: read_hf(f / "hf"), 20_000
    ),
    "index": Target(
        "shards/model.safetensors.index.json",
        spoiled_files.of_json,
        lambda f: read_hf(f / "shards"),
        10_000,
    ),
    "llmc": Target("model.bin", spoiled_files.of_bytes, read_source("model.bin"), 15_000),
    "nanogpt": Target("ckpt.pt", spoiled_files.of_archive, read_source("ckpt.pt"), 10_000),
    "build": Target("build.pt", spoiled_files.of_archive, read_source("build.pt"), 3_000),
    "checkpoint": Target(checkpoint.FILE, spoiled_files.of_safetensors, read_checkpoint, 5_000),
    "run": Target(
        f"run/{checkpoint.FILE}", spoiled_files.of_safetensors, lambda f: read_run(f / "run"), 3_000
    ),
    "described": Target(
        "run/tokenizer.json", spoiled_files.of_json, lambda f: read_run(f / "run"), 2_000
    ),
    "best": Target(
        f"run/{best.FOLDER}/{checkpoint.FILE}",
        spoiled_files.of_safetensors,
        lambda f: best.read(f / "run"),
        1_000,
    ),
    "options": Target(
        "config.json",
        spoiled_files.of_json,
        lambda f: run_folder.settings(f / "config.json"),
        5_000,
    ),
    "metrics": Target(
        "metrics.jsonl",
        spoiled_files.of_lines,
        lambda f: metrics.last_step(f / "metrics.jsonl"),
        1_000,
    ),
    "char": Target("char.json", spoiled_files.of_json, read_tokenizer("char.json"), 5_000),
    "bpe": Target("bpe.json", spoiled_files.of_json, read_tokenizer("bpe.json"), 3_000),
    "ranks": Target("ranks", spoiled_files.of_lines, read_tokenizer("ranks"), 3_000),
    "encoder": Target("encoder.json", spoiled_files.of_json, tokenizers.gpt2, 2_000, False),
    "merges": Target("vocab.bpe", spoiled_files.of_lines, tokenizers.gpt2, 2_000, False),
    "hf_json": Target("tok/tokenizer.json", spoiled_files.of_json, read_tokenizer("tok"), 3_000),
    "hf_settings": Target(
        "tok/tokenizer_config.json", spoiled_files.of_json, read_tokenizer("tok"), 1_000
    ),
    "hf_char": Target(
        "tok_char/tokenizer.json", spoiled_files.of_json, read_tokenizer("tok_char"), 500
    ),
    "hf_vocab": Target(
        "old/vocab.json", spoiled_files.of_json, read_tokenizer("old/vocab.json"), 1_000
    ),
    "hf_merges": Target(
        "old/merges.txt", spoiled_files.of_lines, read_tokenizer("old/vocab.json"), 1_000
    ),
    "hf_added": Target(
        "old/added_tokens.json", spoiled_files.of_json, read_tokenizer("old/vocab.json"), 500
    ),
    "meta": Target(
        "chars/meta.pkl", spoiled_files.of_pickle, read_tokenizer("chars/meta.pkl"), 4_000
    ),
    "shard": Target("chars/train.bin", spoiled_files.of_bytes, read_data("chars"), 2_000),
    "shard_llmc": Target("ids/train_0.bin", spoiled_files.of_bytes, read_data("ids"), 2_000),
    "text": Target("text", spoiled_files.of_lines, read_data("text"), 1_000, refused=0.05),
    "excerpt": Target("text", spoiled_files.of_lines, read_excerpt, 500, refused=0.05),
    "prompts": Target(
        "prompts.txt", spoiled_files.of_lines, read_prompts("prompts.txt"), 500, refused=0.05
    ),
    "prompts_jsonl": Target("p.jsonl", spoiled_files.of_lines, read_prompts("p.jsonl"), 1_000),
    "choices": Target(
        "c.jsonl",
        spoiled_files.of_json,
        lambda f: multiple_choice.read(f / "c.jsonl", tokenizers.byte(), 8),
        1_000,
    ),
}


def spoilt(target: str, n: int, folder: Path) -> bytes:
    """File number n of a target, made from the good files in folder."""
    rng = random.Random(f"{target} {n}")
    good = _content(folder / TARGETS[target].file)
    if rng.random() < 0.03:
        other = _content(folder / TARGETS[rng.choice(list(TARGETS))].file)
        return spoiled_files.splice(good, other, rng)
    return TARGETS[target].mutation(good, rng)


@cache
def _content(path: Path) -> bytes:
    """The content of a good file, cached: make_good reads all."""
    return path.read_bytes()


def make_good(folder: Path) -> None:
    """Writes a good file of every kind into a new folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same files each time
        model = Model(CONFIG)
    state = model.to_state()
    bpe = tokenizers.bpe([*(bytes([b]) for b in range(256)), b"ab", b"abc"])
    char = tokenizers.characters(ALPHABET)
    wide = Config(block_size=8, vocab_size=bpe.vocab_size, n_layer=1, n_head=1, n_embd=1)
    huggingface.write(CONFIG, state, folder / "hf")
    huggingface.write(CONFIG, state, folder / "shards", max_shard_size=400)
    one = {name: torch.zeros(shape) for name, shape in weights.shapes(wide).items()}
    huggingface.write(wide, one, folder / "tok", tokenizer=bpe)
    huggingface.write(CONFIG, state, folder / "tok_char", tokenizer=char)
    (folder / "old").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / "tok" / name).rename(folder / "old" / name)
    (folder / "old" / "added_tokens.json").write_text('{"<|end|>": 259}')
    llmc.write(CONFIG, state, folder / "model.bin")
    nanogpt.write(CONFIG, state, folder / "ckpt.pt")
    _write_build_nanogpt(state, folder / "build.pt")
    adamw = optim.adamw(model, lr=1.0, betas=(0.9, 0.9), weight_decay=0.0)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    adamw.step()
    checkpoint.save(folder / checkpoint.FILE, model, adamw, step=1, train_tokens=9)
    (folder / "run").mkdir()
    checkpoint.save(folder / "run" / checkpoint.FILE, model, adamw, step=1, train_tokens=9)
    files.write_atomic(folder / "run" / "tokenizer.json", char.to_json())
    best.write(folder / "run", model, char, step=1, val_loss=1.5, measure=[1, "x"])
    of_model = Config(64, 99, 3, 4, 128)  # as with the default options
    options = {"model": vars(of_model), "train": vars(TrainConfig())}
    (folder / "config.json").write_text(json.dumps(options))
    row = {"train_loss": 2.5, "lr": 1e-3, "tokens_per_s": 9.5, "mfu": 0.5, "elapsed_s": 1.5}
    rows = [{"step": step, **row, "val_loss": 3.5} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "char.json").write_text(tokenizers.char(ALPHABET).to_json())
    (folder / "bpe.json").write_text(bpe.to_json())
    (folder / "ranks").write_text(tiktoken_file.to_text(bpe))
    letters = [*map(chr, range(33, 90))]
    vocabulary = {token: i for i, token in enumerate([*letters, "AB", "<|endoftext|>"])}
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "vocab.bpe").write_text("#version: 0.2\nA B\nAB C\n")
    _write_data(folder, char)
    for target in TARGETS.values():
        _content(folder / target.file)


def _write_data(folder: Path, char: tokenizers.Tokenizer) -> None:
    text = "abc\ncab\u00e9\n" * 20
    ids = char.encode(text)
    for name in ("chars", "ids"):
        (folder / name).mkdir()
    ids.astype("<u2").tofile(folder / "chars" / "train.bin")
    alphabet = dict(enumerate(ALPHABET))
    meta = {"vocab_size": 5, "itos": alphabet, "stoi": {c: i for i, c in alphabet.items()}}
    (folder / "chars" / "meta.pkl").write_bytes(pickle.dumps(meta))
    for name in ("train_0.bin", "val_0.bin"):
        shards.write(folder / "ids" / name, ids.astype(np.uint16))
    (folder / "ids" / "tokenizer.json").write_text(char.to_json())
    (folder / "text").write_text(text)
    (folder / "prompts.txt").write_text("abc\n\u00e9\n\n")
    (folder / "p.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "\u00e9", "more": [1]}\n')
    question = {"ctx": "a b", "endings": ["c", "d e"], "label": 1, "ind": 7}
    (folder / "c.jsonl").write_text(json.dumps(question))


def _write_build_nanogpt(state: weights.State, path: Path) -> None:
    """Writes a checkpoint as build-nanogpt does: config is an object of a class in its main
    program."""
    holder = types.ModuleType("train_gpt2")
    holder.GPTConfig = type("GPTConfig", (), {"__module__": "train_gpt2"})
    config = holder.GPTConfig()
    for name in nanogpt._SIZES:
        setattr(config, name, getattr(CONFIG, name))
    sys.modules["train_gpt2"] = holder
    try:
        model = {**state, weights.HEAD: state[weights.WTE]}
        torch.save({"model": model, "config": config, "step": 1}, path)
    finally:
        del sys.modules["train_gpt2"]


def no_encoding(name: str) -> None:
    """Raises OSError: a spoilt file may name GPT-2's tokenizer, which is not part of the file."""
    raise OSError(f"{name} is not read here")
