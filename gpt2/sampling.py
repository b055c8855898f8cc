"""Text from a model, as it is sampled."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from . import checkpoint
from . import tokenizer as tokenizers
from .errors import InputError
from .model import Model
from .tokenizer import Tokenizer


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_new_tokens: int = 500,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """What follows prompt, in pieces of whole characters, as the model samples it.

    It ends with max_new_tokens or with the document, at the tokenizer's `<|endoftext|>`. An empty
    prompt starts a document. Raises InputError for a prompt that the tokenizer cannot encode.
    """
    ids = tokenizer.encode(prompt)
    idx = torch.from_numpy((ids if len(ids) else _start(tokenizer)).astype(np.int64))[None]
    device = next(model.parameters()).device
    tokens = model.stream(idx.to(device), max_new_tokens, temperature, top_k, top_p, seed)
    return tokenizer.decode_stream(_until(tokenizer.eot, tokens))


def load_run(
    folder: str | Path, device: str | torch.device = "cpu", tokenizer_dir: str | None = None
) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer of a run's folder.

    Raises InputError, naming the file, where one is missing, broken, or does not fit the other.
    """
    path = Path(folder) / checkpoint.FILE
    if not path.is_file():
        raise InputError(f"run must be a folder that holds {checkpoint.FILE}, got {str(folder)!r}")
    config, _ = checkpoint.read(path)
    tokenizer = tokenizers.load(Path(folder) / tokenizers.FILE, tokenizer_dir)
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"run {str(folder)!r}: the tokenizer must fit the model's vocab_size "
            f"{config.vocab_size}, got {tokenizer.vocab_size} ids"
        )
    model = Model(config)
    checkpoint.load(path, model)
    return model.to(device).eval(), tokenizer


def _start(tokenizer: Tokenizer) -> np.ndarray:
    """What stands before a text: the end of another, else a new line, else any first token."""
    if tokenizer.eot is not None:
        return np.array([tokenizer.eot])
    try:
        return tokenizer.encode("\n")
    except InputError:
        return np.array([0])


def _until(eot: int | None, tokens: Iterator[torch.Tensor]) -> Iterator[int]:
    for token in tokens:
        if (i := token.item()) == eot:
            return
        yield i
