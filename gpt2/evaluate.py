"""How well a model predicts text: the loss of every token, from which all evaluation is made.

A text longer than the context is read through windows. Window k has the inputs k S … k S + L - 1,
of L = context tokens at most, and scores what no window before it has: the first all its targets,
every other one the last S. So each token but the first is scored exactly once, given at least the
L - S + 1 tokens before it, or all of them where there are fewer. Nothing predicts the first.

    S = L   disjoint windows: what training calls the validation loss
    S < L   Hugging Face's "perplexity of fixed-length models", whose max_length is L + 1: it
            counts the last token of a window, which is only predicted
    S = 1   every token given the L before it, at the price of a run of the model each

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

from . import bars, memory
from .errors import InputError, NonFiniteError
from .model import Model
from .tokenizer import Tokenizer

ROWS = 512  # of logits that exist at a time: N V numbers never do


class Window(NamedTuple):
    """Tokens in a row, of which the last `scored` are predicted, each from all that precede it."""

    ids: np.ndarray | Sequence[int]  # 2 to block_size + 1
    scored: int  # 1 to len(ids) - 1


class Scores(NamedTuple):
    """Of a window's scored tokens, on the CPU, in float64."""

    losses: Tensor  # (scored,) -log p, in nats
    greedy: Tensor  # (scored,) bool: no token is likelier


@dataclass(frozen=True)
class Perplexity:
    """The losses of a text, summed."""

    nats: float
    tokens: int  # scored ones
    bytes: int | None  # of text in these; `<|endoftext|>` has none, but its loss counts
    context: int
    stride: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token), inf beyond what a float holds."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """None without a tokenizer, or where no byte was scored."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def tokens_per_second(self) -> float | None:
        """None where the clock did not advance."""
        return bars.per_second(self.tokens, self.seconds)

    def figures(self) -> dict[str, float | int | None]:
        """All of it, as JSON can hold it: None for what is infinite or unknown."""
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
    """How well model predicts the ids of each text, which no window crosses.

    context is block_size by default, stride half of it; batch_size windows go through the model at
    a time, which changes its speed and nothing else, beyond rounding. tokenizer tells the bytes.
    progress hears how many tokens were scored. Raises InputError, naming the argument, where they
    do not fit, and NonFiniteError for a loss that is no number.
    """
    context, stride = check_windows(model, context, stride, batch_size)
    texts = [np.asarray(ids) for ids in texts]
    if not any(len(ids) > 1 for ids in texts):
        raise InputError(
            f"text must be at least 2 tokens, of which the second is predicted, "
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
    """context and stride, by default block_size and half the context, rounded up.

    Raises InputError, naming the argument, where one does not fit.
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
    """The windows of a text; none of a single token."""
    done = 1  # tokens that are scored, or cannot be
    for start in itertools.count(0, stride):
        if done >= len(ids):
            return
        end = min(start + context + 1, len(ids))
        yield Window(ids[start:end], end - done)
        done = end


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of text in each token, (V,) int64: none in `<|endoftext|>`."""
    sizes = np.array([len(token) for token in tokenizer.tokens])
    if tokenizer.eot is not None:
        sizes[tokenizer.eot] = 0
    return sizes


def score(model: Model, windows: Iterable[Window], batch_size: int) -> Iterator[Scores]:
    """The scores of each window, in order, batch_size of them at a time.

    The model is in eval mode meanwhile. Raises ValueError for a window that does not fit it.
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
    """The same of windows of all lengths, the longest first: little of a batch is padding.
    progress hears of each."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    if order:
        _check_batch(model, min(batch_size, len(order)), len(windows[order[0]].ids) - 1)
    results = {}
    for i, scores in zip(order, score(model, (windows[i] for i in order), batch_size), strict=True):
        results[i] = scores
        progress(1)
    return [results[i] for i in range(len(windows))]


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises InputError for ids of a text that the model does not have."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise InputError(f"text must hold ids from 0 to {vocab_size - 1}, got {bad}")


def _check_batch(model: Model, B: int, T: int) -> None:
    """Raises InputError where B windows of T tokens do not fit into memory at a time."""
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
    """One run of the model; the head sees the scored rows alone, ROWS at a time."""
    device = model.transformer["wte"].weight.device
    T = max(len(w.ids) for w in batch) - 1
    ids = np.zeros((len(batch), T + 1), dtype=np.int64)  # padded on the right, which no token sees
    rows = []  # of the (B T) inputs, those that predict a scored token
    for b, window in enumerate(batch):
        n = len(window.ids)
        ids[b, :n] = window.ids
        rows.append(np.arange(b * T + n - 1 - window.scored, b * T + n - 1))
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
    """-log softmax(logits)[target] at least in float32, and whether target is the likeliest."""
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
