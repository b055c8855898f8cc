"""Training that starts from weights, not from random numbers: `gpt2 train --init MODEL`.

The run keeps all it needs, and goes on without MODEL. A model and its tokenizer are one, as
loading.tokenizer_of says; the run's embedding has the rows of that tokenizer's ids alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import convert, loading, nanogpt, weights
from . import tokenizer as tokenizers
from .convert import Source
from .errors import InputError, quoted
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
                f"{name} must be that of init {quoted(options.init)}, "
                f"{getattr(model.config, name)}, got {getattr(options, name)}"
            )
    if options.block_size > model.config.block_size:
        raise InputError(
            f"block_size must be at most that of init {quoted(options.init)}, "
            f"{model.config.block_size}, got {options.block_size}"
        )
    tokenizer = _tokenizer(model, options)
    nanogpt.say(model)
    sizes = {"block_size": options.block_size, "vocab_size": tokenizer.vocab_size}
    return Start(tokenizer, lambda: weights.crop(model.config, model.state(), **sizes)[1])


def _tokenizer(model: Source, options: TrainConfig) -> Tokenizer:
    spec, folder = options.tokenizer, options.tokenizer_dir
    if spec == "char":  # would be the new text's
        raise InputError(
            f"tokenizer must be that of init {quoted(options.init)}, got {quoted(spec)}"
        )
    if spec is not None and model.format == "run":
        own = convert.own_tokenizer(model, folder)
        if tokenizers.named(spec, folder).tokens != own.tokens:
            raise InputError(
                f"tokenizer must be that of init {quoted(options.init)}, got {quoted(spec)}"
            )
        spec = None
    return loading.tokenizer_of(model, spec, folder)


def _another_tokenizer(options: TrainConfig) -> InputError:
    init, spec = quoted(options.init), quoted(options.tokenizer)
    return InputError(f"tokenizer must be that of init {init}, got {spec}")
