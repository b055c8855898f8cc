"""A model and its tokenizer, from whatever holds a GPT-2: `gpt2.load`, also for the command line.

A tokenizer that is named is taken. Otherwise a run and a Hugging Face folder bring their own; for
any other model it is GPT-2's, where the sizes are near. Both then know the same ids: the model's
rows beyond the tokenizer (padding) are left off, so that no such id is ever sampled; a model with
fewer ids gets a tokenizer that refuses every text that takes others.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from . import convert, nanogpt, weights
from . import tokenizer as tokenizers
from .convert import Source
from .errors import InputError, quoted
from .machine import pick_device
from .model import Model
from .tokenizer import Tokenizer

_NEAR = 0.75  # sizes of a model and a tokenizer that nobody named: smaller by larger, at least


def load(
    source: str | Path,
    *,
    fast: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    tokenizer_dir: str | Path | None = None,
) -> tuple[Model, Tokenizer]:
    """A model in eval mode, and its tokenizer.

    source is a published name (gpt2, …), a folder of Hugging Face's, the folder of a run, nanoGPT's
    or build-nanogpt's checkpoint, or llm.c's model.bin. tokenizer is byte, gpt2 or a file or folder
    that holds one; tokenizer_dir holds GPT-2's vocab.bpe and encoder.json. dtype is PyTorch's
    default unless given. Raises InputError, naming the file, where one is missing, broken, or does
    not fit the other.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    found = convert.read(source, dropout=0.0)
    device = pick_device(device) if isinstance(device, str) else device
    reads = tokenizer_of(found, None if tokenizer is None else str(tokenizer), tokenizer_dir)
    nanogpt.say(found)
    config, state = weights.crop(found.config, found.state(), vocab_size=reads.vocab_size)
    return weights.to_model(config, state, fast=fast, dtype=dtype).to(device), reads


def model(source: str | Path, *, fast: bool = False, dropout: float | None = 0.0) -> Model:
    """What Model.from_pretrained returns: every row of the embedding, padding included."""
    found = convert.read(source, dropout=dropout)
    nanogpt.say(found)
    config = found.config if dropout is None else replace(found.config, dropout=dropout)
    return weights.to_model(config, found.state(), fast=fast)


def tokenizer_of(model: Source, spec: str | None, folder: str | Path | None) -> Tokenizer:
    """The tokenizer of a model, with at most its ids: the one named, or its own, or GPT-2's.

    Raises InputError where it cannot be read, where that of a run does not have the run's size,
    and where GPT-2's, which nobody named, has another size altogether.
    """
    size = model.config.vocab_size
    own = convert.own_tokenizer(model, folder) if spec is None else None
    reads = own or tokenizers.named(spec or "gpt2", folder)
    exact = own is not None and model.format == "run"
    assumed = own is None and spec is None
    if (exact and reads.vocab_size != size) or (assumed and not _near(reads.vocab_size, size)):
        raise InputError(
            f"model {quoted(model.name)}: the tokenizer must fit its vocab_size {size}, "
            f"got {reads.vocab_size} ids{' of GPT-2' if assumed else ''}; {_advice(model)}"
        )
    if not _near(reads.vocab_size, size):
        both = min(reads.vocab_size, size)
        warnings.warn(
            f"model {quoted(model.name)} has {size} ids and its tokenizer {reads.vocab_size}: "
            f"only the first {both} are used",
            stacklevel=3,
        )
    return tokenizers.first(reads, size)


def _near(a: int, b: int) -> bool:
    return min(a, b) >= _NEAR * max(a, b)


def _advice(model: Source) -> str:
    if model.format == "nanogpt":
        return "name its own, which nanoGPT keeps: --tokenizer data/DATASET/meta.pkl"
    return "--tokenizer FILE names another, gpt2 convert --vocab-size N leaves off padding"
