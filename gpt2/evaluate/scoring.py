"""The loss of every token of a text, on which all evaluation is based.

A text longer than the context is read through windows. With L = context and S = stride, window k
has the inputs k S … k S + L - 1 (at most L tokens) and scores only targets that no earlier window
has scored: all of the first window's, and the last S of every other one's. So each token except the
first is scored exactly once, given at least the L - S + 1 tokens before it, or all if there are
fewer. The first token has no prediction.

    S = L   disjoint windows, as in training's validation loss
    S < L   Hugging Face's "perplexity of fixed-length models" with max_length = L + 1, because it
            also counts the last token of a window, which is only a target
    S = 1   every token given the L tokens before it, at the cost of one run of the model per token

    B windows   T inputs of the longest   C features   V vocabulary   N scored tokens
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import bars, memory
from ..data.tokenizer import Tokenizer
from ..errors import InputError, NonFiniteError
from ..kernels.ids import validate
from ..model import Model

ROWS = 512  # rows of logits in memory at a time, in place of all N


class Window(NamedTuple):
    """Consecutive tokens. The last `scored` of them are scored, each given all tokens before it."""

    ids: np.ndarray | Sequence[int]  # 2 to block_size + 1
    scored: int  # 1 to len(ids) - 1


class Scores(NamedTuple):
    """The scores of a window's scored tokens, on the CPU."""

    losses: Tensor  # (scored,) float64: -log p, in nats
    greedy: Tensor  # (scored,) bool: whether no token is likelier


@dataclass(frozen=True)
class Perplexity:
    """The losses of a text, summed."""

    nats: float
    tokens: int  # number scored
    bytes: int | None  # of their text; `<|endoftext|>` has none, but its loss counts
    context: int
    stride: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token), or inf if that overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte; None without a tokenizer, or if no byte was scored."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of scoring; None if the clock did not advance."""
        return bars.per_second(self.tokens, self.seconds)

    def figures(self) -> dict[str, float | int | None]:
        """All figures, as JSON values: None for an infinite or unknown one."""
        return {
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "context": self.context,
            "stride": self.stride,
            "tokens_per_second": self.tokens_per_second,
        }

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        size = "" if self.bytes is None else f", {self.bytes:,} bytes"
        return (
            f"{self.nats_per_token:.4f} nats per token, perplexity {self.perplexity:.2f}{bits}; "
            f"{self.tokens:,} tokens{size}, context {self.context}, stride {self.stride}, "
            f"{bars.shown(self.tokens_per_second)} tokens/s"
        )


def perplexity(
    model: Model,
    *texts: np.ndarray | Sequence[int],
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Perplexity:
    """The perplexity of model on the ids of all texts together. No window crosses from one text
    into the next.

    context is block_size by default, and stride half of the context. batch_size windows go through
    the model at a time; apart from rounding, this changes only the speed. tokenizer is needed to
    count bytes. progress(n) is called whenever n more tokens have been scored. Raises InputError,
    naming the argument, if one does not fit, and NonFiniteError if the loss is not finite.
    """
    context, stride = check_windows(model, context, stride, batch_size)
    texts = [np.asarray(ids) for ids in texts]
    if not any(len(ids) > 1 for ids in texts):
        raise InputError(
            f"text must be at least 2 tokens, because the first is not scored, "
            f"got {sum(map(len, texts))}"
        )
    count = sum(max(1, 1 - (context + 1 - len(ids)) // stride) for ids in texts if len(ids) > 1)
    _check_batch(model, min(batch_size, count), min(context, max(map(len, texts))))
    for ids in texts:
        check_ids(ids, model.config.vocab_size)
    sizes = None if tokenizer is None else token_bytes(tokenizer)
    nats, tokens, size, start = 0.0, 0, 0, time.perf_counter()
    read, scored = itertools.tee(w for ids in texts for w in windows(ids, context, stride))
    for window, scores in zip(scored, score(model, read, batch_size), strict=True):
        nats += scores.losses.sum().item()
        tokens += window.scored
        if sizes is not None:
            size += int(sizes[window.ids[-window.scored :]].sum())
        progress(window.scored)
    if not math.isfinite(nats):
        raise NonFiniteError(f"the loss over {tokens:,} tokens is {nats}")
    seconds = time.perf_counter() - start
    return Perplexity(nats, tokens, None if sizes is None else size, context, stride, seconds)


def check_windows(
    model: Model, context: int | None, stride: int | None, batch_size: int
) -> tuple[int, int]:
    """context and stride; the defaults are block_size and half of the context, rounded up.

    Raises InputError, naming the argument, if one does not fit.
    """
    block_size = model.config.block_size
    context = block_size if context is None else context
    if not 1 <= context <= block_size:
        raise InputError(f"context must be 1 to block_size {block_size}, got {context}")
    stride = (context + 1) // 2 if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"stride must be 1 to context {context}, got {stride}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    return context, stride


def windows(ids: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """The windows of a text; none if it has a single token."""
    done = 1  # tokens already scored, and the first, which cannot be
    for start in itertools.count(0, stride):
        if done >= len(ids):
            return
        end = min(start + context + 1, len(ids))
        yield Window(ids[start:end], end - done)
        done = end


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """The number of bytes of text in each token, (V,) int64; 0 for `<|endoftext|>`."""
    sizes = np.array([len(token) for token in tokenizer.tokens])
    if tokenizer.eot is not None:
        sizes[tokenizer.eot] = 0
    return sizes


def score(model: Model, windows: Iterable[Window], batch_size: int) -> Iterator[Scores]:
    """Yields the scores of each window in order, and computes batch_size windows at a time.

    The model is in eval mode while it runs. Raises ValueError for a window that does not fit it.
    """
    windows = iter(windows)
    while batch := list(itertools.islice(windows, min(batch_size, sys.maxsize))):
        for window in batch:
            _check(window, model.config.block_size)
        with _evaluating(model):
            scores = _score(model, batch)
        yield from scores


def score_all(
    model: Model,
    windows: Sequence[Window],
    batch_size: int,
    progress: Callable[[int], object] = lambda n: None,
) -> list[Scores]:
    """The scores of windows of mixed lengths, in order. The longest are computed first, so that
    batches have little padding. progress(1) is called after each window."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    if order:
        _check_batch(model, min(batch_size, len(order)), len(windows[order[0]].ids) - 1)
    results = {}
    for i, scores in zip(order, score(model, (windows[i] for i in order), batch_size), strict=True):
        results[i] = scores
        progress(1)
    return [results[i] for i in range(len(windows))]


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises InputError if an id is outside the model's vocabulary."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise InputError(f"text must hold ids from 0 to {vocab_size - 1}, got {bad}")


def _check_batch(model: Model, B: int, T: int) -> None:
    """Raises InputError if a batch of B windows of T tokens does not fit in memory."""
    weight = model.transformer["wte"].weight
    memory.check_inference(model.config, B, T, itemsize=weight.itemsize, device=weight.device)


def _check(window: Window, block_size: int) -> None:
    n = len(window.ids)
    if not 2 <= n <= block_size + 1 or not 1 <= window.scored < n:
        raise ValueError(
            f"a window must hold 2 to block_size + 1 = {block_size + 1} tokens and score 1 to all "
            f"but one, got {n} tokens, {window.scored} to score"
        )


@torch.no_grad()
def _score(model: Model, batch: list[Window]) -> list[Scores]:
    """The scores of a batch, from one run of the model. The head is applied only to scored rows,
    ROWS at a time."""
    device = model.transformer["wte"].weight.device
    T = max(len(w.ids) for w in batch) - 1
    ids = np.zeros((len(batch), T + 1), dtype=np.int64)  # right padding, which no token sees
    rows = []  # those of the B T inputs that predict a scored token
    for b, window in enumerate(batch):
        n = len(window.ids)
        ids[b, :n] = window.ids
        rows.append(np.arange(b * T + n - 1 - window.scored, b * T + n - 1))
    validate(torch.from_numpy(ids), "idx", model.config.vocab_size)  # on a GPU an error comes late
    idx = torch.from_numpy(ids).to(device)  # (B, T + 1)
    rows = torch.from_numpy(np.concatenate(rows)).to(device)  # (N,)
    h = model.hidden(idx[:, :-1].contiguous()).flatten(0, 1)[rows]  # (N, C)
    targets = idx[:, 1:].flatten()[rows]  # (N,)
    parts = [
        _losses(model.logits_of(x), y)
        for x, y in zip(h.split(ROWS), targets.split(ROWS), strict=True)
    ]
    losses, greedy = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    counts = [window.scored for window in batch]
    return list(map(Scores, losses.double().split(counts), greedy.split(counts)))


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[target], in float32 or wider, and whether target is the likeliest."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)
    own = logits.gather(1, targets[:, None])[:, 0]
    return logits.logsumexp(dim=1) - own, logits.argmax(dim=1) == targets


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
