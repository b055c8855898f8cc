"""Everything that can be chosen about a training run; `gpt2 train --help` is made from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from operator import ge, gt, lt
from types import NoneType
from typing import Any, get_args, get_type_hints

from .errors import InputError, brief

# What a run keeps to its end; the rest may change where it goes on from a checkpoint.
FIXED = {
    *("tokenizer", "val_fraction", "block_size", "n_layer", "n_head", "n_embd", "dropout"),
    *("init", "seed", "out"),
}


def _option(group: str, default: Any, help: str, **checks: Any) -> Any:
    """A field: its group and line in --help, and its checks (see TrainConfig.__post_init__)."""
    return field(default=default, metadata={"group": group, "help": help, **checks})


_data, _model, _training, _evaluation, _machine = (
    partial(_option, group) for group in ("data", "model", "training", "evaluation", "machine")
)


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run. Raises InputError, naming the field, for a value that cannot be.

    The defaults train a small model on Python's language reference on two CPU cores.
    """

    data: str | None = _data(
        None,
        "text file, folder of text, pattern, - for standard input (also of a pipe: - < PIPE), or "
        "token shards (.bin) "
        "[default: Python's own language reference]",
        metavar="PATH",
    )
    tokenizer: str | None = _data(
        None,
        "char, byte, gpt2, or a file that `gpt2 tokenizer` wrote "
        "[default: char for text; for shards their tokenizer.json or meta.pkl, or gpt2]",
    )
    tokenizer_dir: str | None = _data(
        None, "folder with GPT-2's vocab.bpe and encoder.json", metavar="PATH"
    )
    val_fraction: float = _data(
        0.1, "part of the tokens, at the end, to validate on", above=0, below=1
    )

    init: str | None = _model(
        None,
        "weights to start from: the folder of a run, a folder or name of Hugging Face's (gpt2, …), "
        "or another file that `gpt2 convert` reads; sizes that are not given are the model's, a "
        "smaller block_size crops it, lr is 3e-5 unless given [default: random weights]",
        metavar="MODEL",
    )
    block_size: int = _model(64, "tokens that the model sees at a time", at_least=1)
    n_layer: int = _model(3, "blocks", at_least=1)
    n_head: int = _model(4, "attention heads in a block", at_least=1)
    n_embd: int = _model(128, "features of a token; a multiple of n_head", at_least=1)
    dropout: float = _model(0.0, "probability that a feature is dropped", at_least=0, below=1)

    steps: int = _training(1500, "optimizer steps", at_least=1)
    batch_size: int = _training(16, "windows in a forward pass", at_least=1)
    grad_accum: int = _training(1, "forward passes in an optimizer step", at_least=1)
    lr: float = _training(4e-3, "highest learning rate; 6e-4 suits GPT-2 itself", above=0)
    min_lr: float | None = _training(
        None, "learning rate at the end [default: lr / 10]", at_least=0
    )
    warmup_steps: int = _training(100, "steps until lr is reached", at_least=0)
    weight_decay: float = _training(0.1, "of matrices and embeddings", at_least=0)
    beta1: float = _training(0.9, "AdamW's decay of the mean gradient", at_least=0, below=1)
    beta2: float = _training(
        0.99, "AdamW's decay of the mean squared gradient", at_least=0, below=1
    )
    grad_clip: float = _training(1.0, "highest norm of the gradient; 0: any", at_least=0)
    seed: int = _training(1337, "of weights, batches and dropout", at_least=0, below=2**63)

    eval_interval: int = _evaluation(250, "steps between evaluations", at_least=1)
    eval_batches: int = _evaluation(
        20, "batches in an evaluation, 0: the whole split (as always at the end)", at_least=0
    )
    log_interval: int = _evaluation(10, "steps between lines of metrics.jsonl", at_least=1)
    save_interval: int = _evaluation(250, "steps between checkpoints", at_least=1)
    keep_best: bool = _evaluation(
        False,
        "keep the weights with the lowest validation loss, over eval_batches, in RUN/best, which "
        "sample, eval, convert and --init read",
    )
    sample_tokens: int = _evaluation(400, "tokens to sample at the end", at_least=0)

    device: str = _machine("auto", "cpu, cuda, cuda:1, … [default: cuda where there is one]")
    dtype: str = _machine(
        "auto",
        "of the matrix products [default: bfloat16 on CUDA]",
        choices=("auto", "float32", "bfloat16"),
    )
    fast: bool | None = _machine(None, "use the fused kernels [default: on CUDA]")
    compile: bool = _machine(False, "run the model through torch.compile")
    out: str | None = _machine(
        None, "the run's folder, new or empty [default: runs/ and the time]", metavar="PATH"
    )

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in fields(self):
            types = get_args(hints[f.name]) or (hints[f.name],)
            check(f.name, getattr(self, f.name), types, f.metadata)
        if self.n_embd % self.n_head:
            raise InputError(
                f"n_embd must be divisible by n_head, "
                f"got n_embd={self.n_embd}, n_head={self.n_head}"
            )
        if self.final_lr > self.lr:
            raise InputError(f"min_lr must be at most lr, got min_lr={self.min_lr}, lr={self.lr}")

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.block_size

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of dataclasses.asdict. Raises InputError for unknown or wrong values."""
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise InputError(f"unknown option {min(unknown)!r}")
        return cls(**values)


def check(name: str, value: Any, types: tuple[type, ...], metadata: Mapping[str, Any]) -> None:
    """Raises InputError, naming the value, unless it has one of the types, is finite, and is in the
    range of metadata: choices, at_least, above, below. An int must fit 64 bits."""
    allowed = (*types, int) if float in types else types
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join("absent" if t is NoneType else t.__name__ for t in types)
        raise InputError(f"{name} must be {expected}, got {brief(repr(value))}")
    if "choices" in metadata and value not in metadata["choices"]:
        raise InputError(
            f"{name} must be {' or '.join(metadata['choices'])}, got {brief(repr(value))}"
        )
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{name} must be below 2**63, got {brief(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} must be finite, got {value}")
    for words, holds in (("at_least", ge), ("above", gt), ("below", lt)):
        bound = metadata.get(words)
        if value is not None and bound is not None and not holds(value, bound):
            raise InputError(f"{name} must be {words.replace('_', ' ')} {bound}, got {value}")
