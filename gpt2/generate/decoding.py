"""Continues a batch of prompts, one token of each sequence per step.

With fast=True, the keys and values of past tokens are cached (kv_cache.py): the prompts are read
once, and a step computes one token per sequence. With fast=False, every step runs the model over
all visible tokens; this is the reference for the cache. Beyond block_size, both see the last
block_size tokens. GPT-2's positions are absolute, so they all shift with every step then. No key
can be reused, and each token costs a run over block_size tokens.

    B sequences   T tokens   V vocabulary
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from .. import memory
from ..errors import brief
from ..layers import is_hooked
from .decode_layers import decode_layers
from .kv_cache import Cache, Decode, Prefill
from .sampling import DEFAULT, Sampling, Uniform, Watch, as_int, seeds_of

CHUNK = 16384  # most tokens of a prefill in the model at a time: bounds its memory


class Rows:
    """Growing sequences of different lengths, right-padded."""

    def __init__(self, prompts: Sequence[Sequence[int]], device: torch.device):
        self.counts = [len(p) for p in prompts]  # the same as `lengths`, without synchronizing
        self.lengths = torch.tensor(self.counts, device=device)
        ids = torch.zeros(len(prompts), max(self.counts), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt)
        self.ids = ids.to(device)

    @property
    def longest(self) -> int:
        return max(self.counts)

    def last(self) -> Tensor:
        """The last token of each sequence, (B, 1)."""
        return self.ids.gather(1, self.lengths[:, None] - 1)

    def append(self, tokens: Tensor, growing: list[bool]) -> None:
        """Appends tokens (B,) to the sequences marked in growing."""
        if self.longest == self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.zeros_like(self.ids)], dim=1)
        self.ids.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + (1 if all(growing) else self.lengths.new_tensor(growing))
        self.counts = [n + grows for n, grows in zip(self.counts, growing, strict=True)]

    def window(self, size: int) -> tuple[Tensor, Tensor]:
        """The last `size` tokens of each sequence, right-padded, and their numbers, (B,)."""
        lengths = self.lengths.clamp(max=size)
        width = min(self.longest, size)
        columns = torch.arange(width, device=self.ids.device) + (self.lengths - lengths)[:, None]
        return self.ids.gather(1, columns.clamp_(max=self.ids.shape[1] - 1)), lengths


def last_of(h: Tensor, lengths: Tensor) -> Tensor:
    """The last row of each sequence: h (B, T, C) and lengths (B,) to (B, C)."""
    return h[torch.arange(len(h), device=h.device), lengths - 1]


def recomputed(model, rows: Rows) -> Tensor:
    """The logits (B, V) after the last block_size tokens of each sequence, without a cache."""
    ids, lengths = rows.window(model.config.block_size)
    return model.logits_of(last_of(model.hidden(ids), lengths))


class Cached:
    """The logits of `recomputed`, from a cache, as long as the sequences fit into it."""

    def __init__(self, model, rows: Rows, room: int):
        self.model, self.rows = model, rows
        weight = model.transformer["wte"].weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        B = len(rows.counts)
        self.cache = Cache(model.config, B, room, device=weight.device, dtype=dtype)
        self.steps, self.graph = 0, None
        # A replayed graph does not call hooks.
        self.graphs = weight.is_cuda and not autocast and not any(map(is_hooked, model.modules()))
        self.layers = decode_layers(model, weight, B)

    def logits(self) -> Tensor:
        """The logits (B, V). Adds the tokens appended since the last call to the cache."""
        self.steps += 1
        if self.steps == 1:
            return self._prefill()
        token, lengths = self.rows.last(), self.rows.lengths - 1
        if not self.graphs:
            return self._decode(token, lengths)
        if self.steps == 2:  # kernels compile here, before the capture
            return self._decode(token, lengths)
        if self.graph is None:
            self._capture(token, lengths)
        self.token.copy_(token)
        self.lengths.copy_(lengths)
        self.graph.replay()
        return self.output

    def _prefill(self) -> Tensor:
        ids, lengths = self.rows.window(self.cache.room)
        B, T = ids.shape
        step = max(1, CHUNK // B)
        last = None
        for start in range(0, T, step):
            chunk = ids[:, start : start + step]
            h = self.model.hidden(chunk, Prefill(self.cache, start, chunk.shape[1]))
            ends = (lengths - start).clamp(1, chunk.shape[1])
            here = (lengths > start)[:, None]
            last = last_of(h, ends) if last is None else torch.where(here, last_of(h, ends), last)
        return self.model.logits_of(last)

    def _decode(self, token: Tensor, lengths: Tensor) -> Tensor:
        model = self.model
        if self.layers is not None:
            wte, wpe = model.transformer["wte"], model.transformer["wpe"]
            x = wte(token[:, 0]) + wpe(lengths)  # (B, C)
            return model.logits_of(self.layers(x, self.cache.kv, lengths))
        return model.logits_of(model.hidden(token, Decode(self.cache, lengths))[:, 0])

    def _capture(self, token: Tensor, lengths: Tensor) -> None:
        """Captures one step as a CUDA graph over `token` and `lengths`, so that a replay launches
        all kernels without Python."""
        self.token, self.lengths = token.clone(), lengths.clone()
        torch.cuda.synchronize(token.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(token.device), torch.cuda.graph(self.graph):
            self.output = self._decode(self.token, self.lengths)


def step_bytes(model, lengths: Sequence[int]) -> int:
    """The least number of bytes that a step of decoding must read: each weight once, except the
    embeddings (one row each is negligible), and the cached keys and values of lengths (B,) tokens.
    Sequences longer than block_size use no cache."""
    parts = (model.transformer["h"], model.transformer["ln_f"], model.lm_head)
    weights = sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))
    c = model.config
    cached = sum(lengths) if max(lengths, default=0) <= c.block_size else 0
    itemsize = model.transformer["wte"].weight.itemsize
    return weights + cached * 2 * c.n_layer * c.n_embd * itemsize


def check_batch(model, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raises InputError, naming batch_size, if prompts of these lengths and their continuations
    do not fit into the device's memory together."""
    weight, B = model.transformer["wte"].weight, len(lengths)
    T = min(model.config.block_size, max(lengths) + max_new_tokens)
    check = memory.check_cache if model.fast else memory.check_inference
    check(model.config, B, T, itemsize=weight.itemsize, device=weight.device)


def tokens(
    model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = DEFAULT,
    *,
    seed: int | Sequence[int] | None = None,
    stop: Collection[int] = (),
    ended: Callable[[], Sequence[bool]] | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each sequence, (B,) int64 on the model's device, step by step.

    A sequence yields -1 after it has produced an id in stop, or after `ended` has reported it.
    `ended` is called after each step, once the caller has taken its tokens. The iteration ends
    when all sequences have ended, or after max_new_tokens.

    seed is one int for all (see seeds_of), or one for each prompt. The same seed gives the same
    tokens whatever else is in the batch, unless a matrix product rounds differently for another
    batch size. Raises ValueError, naming the argument, before anything is computed.

    If a row of logits has a NaN or +inf, or only -inf, no token can be chosen. Then NonFiniteError,
    naming the step, is raised instead of yielding the step's tokens. On a GPU, to avoid
    synchronizing, the sequence yields -2 (sampling.NO_TOKEN), and the error is raised at a later
    step or at the end.
    """
    if isinstance(prompts, str) or not prompts or not all(len(p) for p in prompts):
        got = brief(repr(prompts))
        raise ValueError(f"prompts must be lists of at least one token, got {got}")
    max_new_tokens = as_int("max_new_tokens", max_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    V = model.config.vocab_size
    for prompt in prompts:
        if set(map(type, prompt)) != {int}:
            for token in prompt:
                as_int("each token of prompts", token)
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < V:
                raise ValueError(f"prompts must hold ids from 0 to {V - 1}, got {token}")
    check_batch(model, [len(p) for p in prompts], max_new_tokens)
    several = isinstance(seed, Sequence) and not isinstance(seed, str)
    seeds = seed if several else seeds_of(prompts, seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"seed must be one, or one for each of {len(prompts)} prompts, got {seed}")
    return _tokens(model, prompts, max_new_tokens, sampling, seeds, set(stop), ended)


@torch.no_grad()
def _tokens(model, prompts, max_new_tokens, sampling, seeds, stop, ended):
    device = model.transformer["wte"].weight.device
    rows, uniform, watch = Rows(prompts, device), Uniform(seeds, device), Watch(device)
    room = min(model.config.block_size, rows.longest + max_new_tokens)
    cached = None
    if model.fast and rows.longest <= room:
        cached = Cached(model, rows, room)
    growing = [True] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for step in range(1, max_new_tokens + 1):
            if cached is not None and rows.longest <= room:
                logits = cached.logits()
            else:
                logits = recomputed(model, rows)
            token = sampling.choose(logits, uniform())
            if not all(growing):
                finished = token.new_tensor([not grows for grows in growing], dtype=torch.bool)
                token = token.masked_fill(finished, -1)
            watch.see(token, step)
            yield token
            rows.append(token.clamp(min=0), growing)  # -1 and NO_TOKEN are not ids
            if stop:
                met = [t in stop for t in token.tolist()]
                growing = [g and not m for g, m in zip(growing, met, strict=True)]
            if ended is not None:
                growing = [g and not e for g, e in zip(growing, ended(), strict=True)]
            if not any(growing):
                break
        watch.finish()
    finally:
        model.train(was_training)
