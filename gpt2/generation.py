"""The next tokens of a batch of prompts: logits step by step, and what is chosen from them.

With fast=True the keys and values of past tokens are kept (cache.py): the prompts are read once,
and a step computes one token of each sequence. With fast=False every step runs the model over all
that it can see, which says what the cache must give. Beyond block_size both see the last block_size
tokens; GPT-2's positions are absolute, so that every one of them changes with each step, no key can
be kept, and a token costs a run over block_size tokens.

    B sequences   T tokens   V vocabulary
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from . import kernels, memory
from .cache import Cache, Decode, Prefill
from .errors import brief
from .layers import Int8Linear, is_hooked, is_stock
from .model import MLP, Attention, Block
from .picking import DEFAULT, Sampling, Uniform, Watch, as_int, seeds_of

CHUNK = 16384  # tokens of a prefill that are in the model at a time: bounds its memory


class Rows:
    """Sequences of different lengths, right-padded, that grow."""

    def __init__(self, prompts: Sequence[Sequence[int]], device: torch.device):
        self.counts = [len(p) for p in prompts]  # what `lengths` holds, without asking the device
        self.lengths = torch.tensor(self.counts, device=device)
        ids = torch.zeros(len(prompts), max(self.counts), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt)
        self.ids = ids.to(device)

    @property
    def longest(self) -> int:
        return max(self.counts)

    def last(self) -> Tensor:
        """The last token of each: (B, 1)."""
        return self.ids.gather(1, self.lengths[:, None] - 1)

    def append(self, tokens: Tensor, growing: list[bool]) -> None:
        """tokens (B,), one more for each sequence that grows."""
        if self.longest == self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.zeros_like(self.ids)], dim=1)
        self.ids.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + (1 if all(growing) else self.lengths.new_tensor(growing))
        self.counts = [n + grows for n, grows in zip(self.counts, growing, strict=True)]

    def window(self, size: int) -> tuple[Tensor, Tensor]:
        """The last `size` tokens of each sequence, right-padded, and how many they are, (B,)."""
        lengths = self.lengths.clamp(max=size)
        width = min(self.longest, size)
        columns = torch.arange(width, device=self.ids.device) + (self.lengths - lengths)[:, None]
        return self.ids.gather(1, columns.clamp_(max=self.ids.shape[1] - 1)), lengths


def last_of(h: Tensor, lengths: Tensor) -> Tensor:
    """The last row of each sequence: h (B, T, C), lengths (B,), to (B, C)."""
    return h[torch.arange(len(h), device=h.device), lengths - 1]


def recomputed(model, rows: Rows) -> Tensor:
    """The logits (B, V) after the last block_size tokens of each sequence, from those alone."""
    ids, lengths = rows.window(model.config.block_size)
    return model.logits_of(last_of(model.hidden(ids), lengths))


def decode_layers(model, weight: Tensor, B: int) -> kernels.DecodeLayers | None:
    """The model's blocks as one call, where there is one: on a CPU, for a few sequences."""
    if not kernels.DecodeLayers.serve(weight, B) or not _is_stock(model):
        return None

    def linear(layer):
        return kernels.DecodeLayers.Linear(layer.weight, layer.bias, getattr(layer, "scale", None))

    def norm(layer):
        return kernels.DecodeLayers.Norm(layer.weight, layer.bias)

    layers = [
        kernels.DecodeLayers.Layer(
            norm(block.ln_1), linear(block.attn.c_attn), linear(block.attn.c_proj),
            norm(block.ln_2), linear(block.mlp.c_fc), linear(block.mlp.c_proj),
        )
        for block in model.transformer["h"]
    ]  # fmt: skip
    ln_f = model.transformer["ln_f"]
    return kernels.DecodeLayers(layers, norm(ln_f), n_head=model.config.n_head, eps=ln_f.eps)


def _is_stock(model) -> bool:
    """Whether every layer computes what its parameters say, and nobody listens."""
    blocks = model.transformer["h"]
    norms = [model.transformer["ln_f"]]
    linears = []
    for block in blocks:
        parts = zip((block, block.attn, block.mlp), (Block, Attention, MLP), strict=True)
        if not all(is_stock(part, kind) for part, kind in parts):
            return False
        norms += block.ln_1, block.ln_2
        linears += block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
    return all(is_stock(norm, nn.LayerNorm) for norm in norms) and all(
        is_stock(layer, nn.Linear, Int8Linear) for layer in linears
    )


class Cached:
    """The same logits from a cache, while the sequences fit into it."""

    def __init__(self, model, rows: Rows, room: int):
        self.model, self.rows = model, rows
        weight = model.transformer["wte"].weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        B = len(rows.counts)
        self.cache = Cache(model.config, B, room, device=weight.device, dtype=dtype)
        self.steps, self.graph = 0, None
        # Hooks would be called once, in the capture, and never again.
        self.graphs = weight.is_cuda and not autocast and not any(map(is_hooked, model.modules()))
        self.layers = decode_layers(model, weight, B)

    def logits(self) -> Tensor:
        """(B, V); the cache takes in the tokens that have come since the last call."""
        self.steps += 1
        if self.steps == 1:
            return self._prefill()
        token, lengths = self.rows.last(), self.rows.lengths - 1
        if not self.graphs:
            return self._decode(token, lengths)
        if self.steps == 2:  # compiles, outside of the capture
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
        """One step as a CUDA graph over `token` and `lengths`: no launch waits for Python."""
        self.token, self.lengths = token.clone(), lengths.clone()
        torch.cuda.synchronize(token.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(token.device), torch.cuda.graph(self.graph):
            self.output = self._decode(self.token, self.lengths)


def step_bytes(model, lengths: Sequence[int]) -> int:
    """What a step of decoding has to read at least: each weight once (of the embeddings a row,
    which does not count), and the keys and values of the tokens so far, lengths (B,), as long as
    all fit into the cache."""
    parts = (model.transformer["h"], model.transformer["ln_f"], model.lm_head)
    weights = sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))
    c = model.config
    cached = sum(lengths) if max(lengths, default=0) <= c.block_size else 0
    itemsize = model.transformer["wte"].weight.itemsize
    return weights + cached * 2 * c.n_layer * c.n_embd * itemsize


def check_batch(model, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raises InputError, naming batch_size, where prompts of these lengths and what follows them
    cannot fit into the device's memory together."""
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
    """What follows each prompt, a token of each sequence at a time: (B,) int64, where the model is.

    A sequence that has met one of the ids in stop gives -1 from then on; so does one that `ended`
    tells of, which is asked after each step, when its tokens have been taken. The stream ends when
    all have, or with max_new_tokens. seed is one for all (see seeds_of), or one for each. The same
    seed gives the same tokens whatever else is in the batch, as far as the model's own products do:
    a matrix product may round differently in a batch. Raises ValueError, naming the argument,
    before anything is computed.

    Logits that are NaN, +inf, or -inf alone choose no token: NonFiniteError names the step. It
    comes in place of the step's tokens. On a GPU, which must not be waited for, such a sequence
    gives -2 (picking.NO_TOKEN), and the error comes with the next step or at the end.
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
            rows.append(token.clamp(min=0), growing)  # below 0 are no ids
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
