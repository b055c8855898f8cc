"""Hostile files: every reader takes each for what it is, or refuses it in one line, soon, and
without memory for what is not there.

    pytest tests/test_hostile.py --full     100,000 files

A file is a function of its target and its number: `spoilt(target, n)` makes the one that a failure
names again.
"""

import gc
import json
import random
import resource
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mutations
import pytest
import torch

from gpt2 import (
    Config,
    Model,
    checkpoint,
    convert,
    interop,
    llmc,
    nanogpt,
    optim,
    run_folder,
    tiktoken_file,
    weights,
)
from gpt2 import tokenizer as tokenizers
from gpt2.errors import InputError
from gpt2.train_config import TrainConfig

CONFIG = Config(block_size=4, vocab_size=5, n_layer=1, n_head=2, n_embd=4)
SLACK = 2**20  # bytes that reading the smallest file may take; beyond them, twice the file
ROOM = 2**28  # address space that one test may take: nobody gets memory for a number in a file


class Target(NamedTuple):
    file: str  # the one that is spoilt, in a folder where all is well
    mutation: mutations.Mutation
    read: Callable[[Path], object]  # of the folder
    files: int  # of the 100,000


def read_hf(folder):
    return interop.read_state(folder, interop.read_config(folder))


def read_source(name):
    return lambda folder: convert.read(folder / name).state()


def read_run(folder):
    config, _ = checkpoint.read(folder / checkpoint.FILE)
    model = Model(config)
    adamw = optim.adamw(model, lr=1.0, betas=(0.9, 0.9), weight_decay=0.0)
    checkpoint.load(folder / checkpoint.FILE, model, adamw)


def read_tokenizer(name):
    return lambda folder: tokenizers.load(folder / name)


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
    "nanogpt": Target("ckpt.pt", mutations.of_bytes, read_source("ckpt.pt"), 10_000),
    "checkpoint": Target(checkpoint.FILE, mutations.of_safetensors, read_run, 5_000),
    "options": Target(
        "config.json", mutations.of_json, lambda f: run_folder.settings(f / "config.json"), 5_000
    ),
    "char": Target("char.json", mutations.of_json, read_tokenizer("char.json"), 5_000),
    "bpe": Target("bpe.json", mutations.of_json, read_tokenizer("bpe.json"), 3_000),
    "ranks": Target("ranks", mutations.of_lines, read_tokenizer("ranks"), 3_000),
    "encoder": Target("encoder.json", mutations.of_json, tokenizers.gpt2, 2_000),
    "merges": Target("vocab.bpe", mutations.of_lines, tokenizers.gpt2, 2_000),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a good file of every kind."""
    gc.collect()
    gc.freeze()  # what earlier tests left is not read anew while a file is timed
    folder = tmp_path_factory.mktemp("good")
    model = Model(CONFIG)
    state = weights.of_model(model)
    interop.write(CONFIG, state, folder / "hf")
    interop.write(CONFIG, state, folder / "shards", max_shard_size=400)
    llmc.write(CONFIG, state, folder / "model.bin")
    nanogpt.write(CONFIG, state, folder / "ckpt.pt")
    adamw = optim.adamw(model, lr=1.0, betas=(0.9, 0.9), weight_decay=0.0)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    adamw.step()
    checkpoint.save(folder / checkpoint.FILE, model, adamw, step=1, train_tokens=9)
    of_model = Config(64, 99, 3, 4, 128)  # as the default options have it
    options = {"model": vars(of_model), "train": vars(TrainConfig())}
    (folder / "config.json").write_text(json.dumps(options))
    (folder / "char.json").write_text(tokenizers.char("abcé\n").to_json())
    bpe = tokenizers.bpe([*(bytes([b]) for b in range(256)), b"ab", b"abc"])
    (folder / "bpe.json").write_text(bpe.to_json())
    (folder / "ranks").write_text(tiktoken_file.to_text(bpe))
    letters = [*map(chr, range(33, 90))]
    vocabulary = {token: i for i, token in enumerate([*letters, "AB", "<|endoftext|>"])}
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "vocab.bpe").write_text("#version: 0.2\nA B\nAB C\n")
    yield folder
    gc.unfreeze()


@pytest.fixture
def little_room():
    """Memory for what a number in a file asks for is not to be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def spoilt(target: str, n: int, data: bytes) -> bytes:
    """File number n of a target, made of the good one."""
    return TARGETS[target].mutation(data, random.Random(f"{target} {n}"))


@pytest.mark.parametrize("size", ["some", pytest.param("all", marks=pytest.mark.full)])
@pytest.mark.parametrize("target", TARGETS)
def test_hostile_files(target, size, good, little_room):
    file, _, read, files = TARGETS[target]
    path = good / file
    data = path.read_bytes()
    read_well(target, read, good)
    refused = 0
    try:
        for n in range(files if size == "all" else files // 25):
            path.write_bytes(spoilt(target, n, data))
            refused += is_refused(f"spoilt({target!r}, {n})", read, good, path, measure=n % 8 == 0)
    finally:
        path.write_bytes(data)
    assert refused > 0.3 * (n + 1), "most mutations change nothing that matters"


def test_a_number_is_no_truth_value(good):
    """`1 == True`: a value of another type is not the one that is supported."""
    path = good / "hf" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": 1'))
    with pytest.raises(InputError, match="tie_word_embeddings must be True, got 1"):
        interop.read_config(good / "hf")
    path.write_text(text)


def read_well(target, read, folder):
    if target not in ("encoder", "merges"):  # which are GPT-2's, or none
        read(folder)


def is_refused(name, read, folder, path, measure):
    """Whether the file is refused. Fails where it is in more than a line, or late, or not by an
    InputError, and where memory is taken for what it does not hold."""
    message = None
    if measure:
        tracemalloc.start()
    start = time.process_time()
    try:
        read(folder)
    except InputError as e:
        message = str(e)
    except BaseException as e:
        pytest.fail(f"{name}: {type(e).__name__}: {e}"[:2000])
    took = time.process_time() - start
    if measure:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 2 * path.stat().st_size + SLACK, f"{name}: {peak} bytes"
    assert took < 1.0, f"{name}: {took:.1f} s"
    if message is not None:
        assert "\n" not in message and len(message) < 1000, f"{name}: {message}"
    return message is not None
