"""Training that starts from weights, not from random numbers: `gpt2 train --init MODEL`.

The run keeps all it needs, and goes on without MODEL. A model and its tokenizer are one: a run
brings its own; for any other the tokenizer is GPT-2's, or the one that is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import convert, weights
from . import tokenizer as tokenizers
from .convert import Source
from .errors import InputError
from .tokenizer import Tokenizer
from .train_config import TrainConfig
from .weights import State

_SIZES = ("n_layer", "n_head", "n_embd")
_LR = 3e-5  # as nanoGPT tunes GPT-2; what suits random weights would destroy trained ones


@dataclass(frozen=True)
class Start:
    tokenizer: Tokenizer
    state: Callable[[], State]


def options(init: str, **chosen: Any) -> TrainConfig:
    """The options of a run that starts from init: the model's sizes, and others as chosen."""
    config = convert.read(init, dropout=0.0).config
    sizes = {name: getattr(config, name) for name in (*_SIZES, "block_size")}
    return TrainConfig(**{**sizes, "lr": _LR, **chosen, "init": init})


def start(options: TrainConfig) -> Start:
    """What the run begins with. Raises InputError where the options do not fit its model."""
    model = convert.read(options.init, dropout=0.0)
    for name in _SIZES:
        if getattr(options, name) != getattr(model.config, name):
            raise InputError(
                f"{name} must be that of init {options.init!r}, {getattr(model.config, name)}, "
                f"got {getattr(options, name)}"
            )
    if options.block_size > model.config.block_size:
        raise InputError(
            f"block_size must be at most that of init {options.init!r}, "
            f"{model.config.block_size}, got {options.block_size}"
        )
    tokenizer = _tokenizer(model, options)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"tokenizer must fit init {options.init!r} with vocab_size {model.config.vocab_size}, "
            f"got {tokenizer.vocab_size} ids"
        )
    return Start(
        tokenizer,
        lambda: weights.crop(model.config, model.state(), block_size=options.block_size)[1],
    )


def _tokenizer(model: Source, options: TrainConfig) -> Tokenizer:
    spec, folder = options.tokenizer, options.tokenizer_dir
    own = None
    if model.format == "run":
        own = tokenizers.load(model.path / tokenizers.FILE, folder)
    named = None
    if spec != "char" and (spec is not None or own is None):  # char would be the new text's
        named = tokenizers.named(spec or "gpt2", folder)
    if spec is not None and (named is None or (own is not None and named.tokens != own.tokens)):
        raise InputError(f"tokenizer must be that of init {options.init!r}, got {spec!r}")
    return own or named
