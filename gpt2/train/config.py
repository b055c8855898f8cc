"""The options of a training run. `gpt2 train --help` is generated from them."""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, get_args, get_type_hints

from ..checks import check_value
from ..errors import InputError

# Options that a resume cannot change; all others it can.
FIXED = {
    *("tokenizer", "val_fraction", "block_size", "n_layer", "n_head", "n_embd", "dropout"),
    *("init", "seed", "out"),
}


def _option(group: str, default: Any, help: str, **checks: Any) -> Any:
    """A field with its group and text in --help, and its checks for TrainConfig.__post_init__."""
    return field(default=default, metadata={"group": group, "help": help, **checks})


_data, _model, _training, _evaluation, _machine = (
    partial(_option, group) for group in ("data", "model", "training", "evaluation", "machine")
)


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run. Raises InputError, naming the field, for an invalid value.

    The defaults train a small model on Python's language reference on two CPU cores.
    """

    data: str | None = _data(
        None,
        "text file, folder of text, pattern, - for standard input (for a named pipe: - < PIPE), or "
        "token shards (.bin) "
        "[default: Python's own language reference]",
        metavar="PATH",
    )
    tokenizer: str | None = _data(
        None,
        "char, byte, gpt2, or a file that `gpt2 tokenizer` wrote "
        "[default: char for text; for shards, their tokenizer.json or meta.pkl, else gpt2]",
    )
    tokenizer_dir: str | None = _data(
        None, "folder with GPT-2's vocab.bpe and encoder.json", metavar="PATH"
    )
    val_fraction: float = _data(
        0.1, "fraction of the tokens, at the end, for validation", above=0, below=1
    )

    init: str | None = _model(
        None,
        "weights to start from: the folder of a run, a Hugging Face folder or name (gpt2, …), or "
        "another file that `gpt2 convert` reads; sizes default to the model's, a smaller "
        "block_size crops it, and lr defaults to 3e-5 [default: random weights]",
        metavar="MODEL",
    )
    block_size: int = _model(64, "context length in tokens", at_least=1)
    n_layer: int = _model(3, "number of blocks", at_least=1)
    n_head: int = _model(4, "attention heads per block", at_least=1)
    n_embd: int = _model(128, "features per token; a multiple of n_head", at_least=1)
    dropout: float = _model(0.0, "probability that a feature is dropped", at_least=0, below=1)

    steps: int = _training(1500, "optimizer steps", at_least=1)
    batch_size: int = _training(16, "windows per forward pass", at_least=1)
    grad_accum: int = _training(1, "forward passes per optimizer step", at_least=1)
    lr: float = _training(4e-3, "highest learning rate; 6e-4 suits GPT-2 itself", above=0)
    min_lr: float | None = _training(
        None, "learning rate at the end [default: lr / 10]", at_least=0
    )
    warmup_steps: int = _training(100, "steps until lr is reached", at_least=0)
    weight_decay: float = _training(0.1, "decay of matrices and embeddings", at_least=0)
    beta1: float = _training(0.9, "AdamW's decay of the mean gradient", at_least=0, below=1)
    beta2: float = _training(
        0.99, "AdamW's decay of the mean squared gradient", at_least=0, below=1
    )
    grad_clip: float = _training(1.0, "highest norm of the gradient; 0: no limit", at_least=0)
    seed: int = _training(1337, "seed of weights, batches, dropout", at_least=0, below=2**63)

    eval_interval: int = _evaluation(250, "steps between evaluations", at_least=1)
    eval_batches: int = _evaluation(
        20, "batches per evaluation; 0: the whole split, as always at the end", at_least=0
    )
    log_interval: int = _evaluation(10, "steps between lines of metrics.jsonl", at_least=1)
    save_interval: int = _evaluation(250, "steps between checkpoints", at_least=1)
    keep_best: bool = _evaluation(
        False,
        "keep the weights with the lowest validation loss over eval_batches in RUN/best, for "
        "sample, eval, convert and --init",
    )
    sample_tokens: int = _evaluation(400, "tokens to sample at the end", at_least=0)

    device: str = _machine("auto", "cpu, cuda, cuda:1, … [default: cuda if available]")
    dtype: str = _machine(
        "auto",
        "float32 or bfloat16, for matrix products [default: bfloat16 on GPUs that support it]",
        choices=("auto", "float32", "bfloat16"),
    )
    fast: bool | None = _machine(None, "use the fused kernels [default: on CUDA]")
    cuda_graph: bool = _machine(
        True, "on a GPU, replay each part of a step as one CUDA graph; the losses are the same"
    )
    compile: bool = _machine(False, "run the model through torch.compile")
    out: str | None = _machine(
        None, "folder of the run, new or empty [default: runs/ and the time]", metavar="PATH"
    )

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in fields(self):
            types = get_args(hints[f.name]) or (hints[f.name],)
            check_value(f.name, getattr(self, f.name), types, f.metadata)
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
        """The inverse of dataclasses.asdict. Raises InputError for an unknown option or an
        invalid value."""
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise InputError(f"unknown option {min(unknown)!r}")
        return cls(**values)
