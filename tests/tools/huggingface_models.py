"""Small models, ours and transformers', in which all weights affect the result; and changes to the
files of a saved one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from util import bits_equal

from gpt2 import Config, Model
from gpt2.checkpoints import huggingface

SMALL = Config(block_size=16, vocab_size=33, n_layer=2, n_head=2, n_embd=8)


def random_model(config=SMALL):
    """A model with random parameters, biases and norms included."""
    model = Model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def their_model(config):
    """transformers' GPT-2 with random weights."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return theirs


def same(a, b):
    return all(bits_equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def rewrite(folder, change):
    """Replaces the weights in a folder by change(weights), or changes them in place."""
    tensors = load_file(folder / huggingface.FILE)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / huggingface.FILE, {"format": "pt"})


def reconfigure(folder, **changes):
    """Changes entries of a folder's config.json."""
    found = json.loads((folder / huggingface.CONFIG).read_text())
    (folder / huggingface.CONFIG).write_text(json.dumps({**found, **changes}))
