"""Every format that is read, a small good file of each, and its reader: what is spoilt and fed to
the readers by test_hostile.py, a few of each, and by tools/fuzz_files.py, a million.

A spoilt file is a function of its target and its number, so that a failure can be made again.
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

import mutations
import numpy as np
import torch

from gpt2 import (
    Config,
    Model,
    best,
    checkpoint,
    choices,
    convert,
    data,
    files,
    interop,
    llmc,
    nanogpt,
    optim,
    report,
    run_folder,
    sampling,
    shards,
    sources,
    tiktoken_file,
    weights,
)
from gpt2 import tokenizer as tokenizers
from gpt2.train_config import TrainConfig

CONFIG = Config(block_size=4, vocab_size=5, n_layer=1, n_head=2, n_embd=4)
ALPHABET = "abc\n\u00e9"


class Target(NamedTuple):
    file: str  # the one that is spoilt, in a folder where all is well
    mutation: mutations.Mutation
    read: Callable[[Path], object]  # of the folder
    files: int  # of 128,000
    is_read: bool = True  # the good one
    refused: float = 0.3  # of the spoilt ones, at least


def read_hf(folder):
    return interop.read_state(folder, interop.read_config(folder))


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
    """Of a file, which encodes a text of all its characters."""

    def read(folder):
        tokenizer = tokenizers.load(folder / name)
        ids = tokenizer.encode(tokenizer.decode(range(tokenizer.vocab_size))[:1000])
        return tokenizer.decode(ids)

    return read


def read_data(name):
    return lambda folder: data.load(str(folder / name), block_size=4)


def read_prompts(name):
    def read(folder):
        sampling.read_prompts(str(folder / name), strict=False)
        return sampling.read_prompts(str(folder / name))

    return read


def read_excerpt(folder):
    return sources.excerpt(str(folder / "text"), tokenizers.char(ALPHABET), 99)


TARGETS = {
    "config": Target("hf/config.json", mutations.of_json, lambda f: read_hf(f / "hf"), 20_000),
    "safetensors": Target(
        "hf/model.safetensors", mutations.of_safetensors, lambda f: read_hf(f / "hf"), 20_000
    ),
    "index": Target(
        "shards/model.safetensors.index.json",
        mutations.of_json,
        lambda f: read_hf(f / "shards"),
        10_000,
    ),
    "llmc": Target("model.bin", mutations.of_bytes, read_source("model.bin"), 15_000),
    "nanogpt": Target("ckpt.pt", mutations.of_archive, read_source("ckpt.pt"), 10_000),
    "build": Target("build.pt", mutations.of_archive, read_source("build.pt"), 3_000),
    "checkpoint": Target(checkpoint.FILE, mutations.of_safetensors, read_checkpoint, 5_000),
    "run": Target(
        f"run/{checkpoint.FILE}", mutations.of_safetensors, lambda f: read_run(f / "run"), 3_000
    ),
    "described": Target(
        "run/tokenizer.json", mutations.of_json, lambda f: read_run(f / "run"), 2_000
    ),
    "best": Target(
        f"run/{best.FOLDER}/{checkpoint.FILE}",
        mutations.of_safetensors,
        lambda f: best.read(f / "run"),
        1_000,
    ),
    "options": Target(
        "config.json", mutations.of_json, lambda f: run_folder.settings(f / "config.json"), 5_000
    ),
    "metrics": Target(
        "metrics.jsonl",
        mutations.of_lines,
        lambda f: report.last_step(f / "metrics.jsonl"),
        1_000,
    ),
    "char": Target("char.json", mutations.of_json, read_tokenizer("char.json"), 5_000),
    "bpe": Target("bpe.json", mutations.of_json, read_tokenizer("bpe.json"), 3_000),
    "ranks": Target("ranks", mutations.of_lines, read_tokenizer("ranks"), 3_000),
    "encoder": Target("encoder.json", mutations.of_json, tokenizers.gpt2, 2_000, False),
    "merges": Target("vocab.bpe", mutations.of_lines, tokenizers.gpt2, 2_000, False),
    "hf_json": Target("tok/tokenizer.json", mutations.of_json, read_tokenizer("tok"), 3_000),
    "hf_settings": Target(
        "tok/tokenizer_config.json", mutations.of_json, read_tokenizer("tok"), 1_000
    ),
    "hf_char": Target(
        "tok_char/tokenizer.json", mutations.of_json, read_tokenizer("tok_char"), 500
    ),
    "hf_vocab": Target(
        "old/vocab.json", mutations.of_json, read_tokenizer("old/vocab.json"), 1_000
    ),
    "hf_merges": Target(
        "old/merges.txt", mutations.of_lines, read_tokenizer("old/vocab.json"), 1_000
    ),
    "hf_added": Target(
        "old/added_tokens.json", mutations.of_json, read_tokenizer("old/vocab.json"), 500
    ),
    "meta": Target("chars/meta.pkl", mutations.of_pickle, read_tokenizer("chars/meta.pkl"), 4_000),
    "shard": Target("chars/train.bin", mutations.of_bytes, read_data("chars"), 2_000),
    "shard_llmc": Target("ids/train_0.bin", mutations.of_bytes, read_data("ids"), 2_000),
    "text": Target("text", mutations.of_lines, read_data("text"), 1_000, refused=0.05),
    "excerpt": Target("text", mutations.of_lines, read_excerpt, 500, refused=0.05),
    "prompts": Target(
        "prompts.txt", mutations.of_lines, read_prompts("prompts.txt"), 500, refused=0.05
    ),
    "prompts_jsonl": Target("p.jsonl", mutations.of_lines, read_prompts("p.jsonl"), 1_000),
    "choices": Target(
        "c.jsonl",
        mutations.of_json,
        lambda f: choices.read(f / "c.jsonl", tokenizers.byte(), 8),
        1_000,
    ),
}


def spoilt(target: str, n: int, folder: Path) -> bytes:
    """File number n of a target, made of the good ones in folder."""
    rng = random.Random(f"{target} {n}")
    good = _content(folder / TARGETS[target].file)
    if rng.random() < 0.03:
        other = _content(folder / TARGETS[rng.choice(list(TARGETS))].file)
        return mutations.splice(good, other, rng)
    return TARGETS[target].mutation(good, rng)


@cache
def _content(path: Path) -> bytes:
    """Of a good file, before it is spoilt: make_good reads all."""
    return path.read_bytes()


def make_good(folder: Path) -> None:
    """Writes a good file of every kind into a new folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same files each time
        model = Model(CONFIG)
    state = weights.of_model(model)
    bpe = tokenizers.bpe([*(bytes([b]) for b in range(256)), b"ab", b"abc"])
    char = tokenizers.characters(ALPHABET)
    wide = Config(block_size=8, vocab_size=bpe.vocab_size, n_layer=1, n_head=1, n_embd=1)
    interop.write(CONFIG, state, folder / "hf")
    interop.write(CONFIG, state, folder / "shards", max_shard_size=400)
    one = {name: torch.zeros(shape) for name, shape in weights.shapes(wide).items()}
    interop.write(wide, one, folder / "tok", tokenizer=bpe)
    interop.write(CONFIG, state, folder / "tok_char", tokenizer=char)
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
    of_model = Config(64, 99, 3, 4, 128)  # as the default options have it
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
    """As build-nanogpt does: config is an object of a class in its main program."""
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
    """A spoilt file may name GPT-2's tokenizer, which is no part of it."""
    raise OSError(f"{name} is not read here")
