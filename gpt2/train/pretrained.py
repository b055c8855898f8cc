"""Training from existing weights instead of random ones: `gpt2 train --init MODEL`.

The run keeps everything it needs, so a resume does not need MODEL. loading.tokenizer_of chooses
the tokenizer, and the run's embedding has exactly one row for each of its ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import loading
from ..checkpoints import convert, nanogpt, weights
from ..checkpoints.convert import Source
from ..checkpoints.weights import State
from ..data import tokenizers
from ..data.tokenizer import Tokenizer
from ..errors import InputError, quoted
from .config import TrainConfig

_SIZES = ("n_layer", "n_head", "n_embd")
_LR = 3e-5  # nanoGPT's for finetuning; a rate that suits random weights destroys trained ones


@dataclass(frozen=True)
class Start:
    tokenizer: Tokenizer
    state: Callable[[], State]


def options(init: str, **chosen: Any) -> TrainConfig:
    """The options of a run that starts from init: its sizes and _LR, unless chosen otherwise."""
    config = convert.read(init, dropout=0.0).config
    sizes = {name: getattr(config, name) for name in (*_SIZES, "block_size")}
    return TrainConfig(**{**sizes, "lr": _LR, **chosen, "init": init})


def start(options: TrainConfig) -> Start:
    """The tokenizer and weights that a run starts from. Raises InputError if the options do not
    fit the model of options.init."""
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
    if spec == "char":  # would be made from the new text
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
