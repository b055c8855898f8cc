"""Writes model files of every format, and changes them for tests."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from util import bits_equal

from gpt2 import Config
from gpt2.checkpoints import nanogpt, weights
from gpt2.checkpoints.convert import convert
from gpt2.data import tokenizers as tk

CONFIG = Config(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=8, dropout=0.25)


def rewritten(path, change):
    """Rewrites the file with the result of change(tensors, description)."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["gpt2"])
    tensors = load_file(path)
    change(tensors, description)
    save_file(tensors, path, {"gpt2": json.dumps(description)})


def random_state(config=CONFIG, dtype=torch.float32):
    """Values of every kind except NaN: zeros of both signs, the largest, the smallest."""
    state = {}
    for name, shape in weights.shapes(config).items():
        tensor = torch.randn(shape).to(dtype)
        info = torch.finfo(dtype)
        special = torch.tensor([-0.0, info.max, info.tiny, info.tiny / 4]).to(dtype)
        tensor.view(-1)[:4] = special[: tensor.numel()]
        state[name] = tensor
    return state


def write(config, state, folder, format):
    """Writes a model in a format; `convert` writes the other formats from it."""
    nanogpt.write(config, state, folder / "ckpt.pt")
    if format == "nanogpt":
        return folder / "ckpt.pt"
    convert(folder / "ckpt.pt", folder / format, format, **options(format))
    return folder / format


def options(format):
    return {"tokenizer": "byte"} if format == "run" else {}


def same(a, b):
    return a.keys() == b.keys() and all(bits_equal(a[name], b[name]) for name in a)


def header_of(path, change):
    """Writes the safetensors file again with another header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def published():
    import os

    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: GPT-2's vocabulary is not at hand")
    return tk.gpt2()
