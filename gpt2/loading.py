"""gpt2.load: a model and its tokenizer, from any file that holds a GPT-2.

The tokenizer is the one that the caller names. By default it is the model's own, for a run or a
Hugging Face folder, and GPT-2's for any other model with a vocabulary of nearly that size. Model
and tokenizer then have the same ids: rows of the embedding beyond the tokenizer (padding) are
dropped, so that no such id is sampled. If the model has fewer ids, the tokenizer refuses text that
needs the others.
"""

import warnings
from pathlib import Path

import torch

from .checkpoints import convert, nanogpt, weights
from .checkpoints.convert import Source
from .data import tokenizers
from .data.tokenizer import Tokenizer
from .device import pick_device
from .errors import InputError, quoted
from .model import Model

_NEAR = 0.75  # least ratio of the smaller to the larger vocabulary, to use GPT-2's by default


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

    source is a published name (gpt2, …), a Hugging Face folder, the folder of a run, nanoGPT's or
    build-nanogpt's checkpoint, or llm.c's model.bin. tokenizer is byte, gpt2, or a file or folder
    with a tokenizer. tokenizer_dir holds GPT-2's vocab.bpe and encoder.json. dtype is PyTorch's
    default unless given. Raises InputError, naming the file, if one is missing or broken, or if
    model and tokenizer do not fit.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    found = convert.read(source, dropout=0.0)
    device = pick_device(device) if isinstance(device, str) else device
    reads = tokenizer_of(found, None if tokenizer is None else str(tokenizer), tokenizer_dir)
    nanogpt.say(found)
    config, state = weights.crop(found.config, found.state(), vocab_size=reads.vocab_size)
    return Model.from_state(config, state, fast=fast, dtype=dtype).to(device), reads


def tokenizer_of(model: Source, spec: str | None, folder: str | Path | None) -> Tokenizer:
    """The named tokenizer, or the model's own, or GPT-2's, cut to the model's ids.

    Raises InputError if it cannot be read, if the tokenizer of a run does not have the run's size,
    or if GPT-2's is assumed and the model's size is not close to it.
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
        return "name nanoGPT's own: --tokenizer data/DATASET/meta.pkl"
    return "--tokenizer FILE names another, gpt2 convert --vocab-size N removes padding"
