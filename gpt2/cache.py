"""Keys and values of the tokens that a model has seen, so that each is computed once.

    kv (L, B, T, 2, H, D)      layer, sequence, position, key or value

A fixed piece of memory: every step of decoding reads and writes the same places, so that a CUDA
graph can replay it. Sequences begin at position 0 and may end at different ones; what lies beyond
a sequence's end is never read by it.

The model sees the cache through one of two forms, which say where its tokens stand (positions) and
compute its attention (attend): Prefill for a run of tokens, Decode for one more of each sequence.
"""

import torch
from torch import Tensor

from .config import Config


class Cache:
    """Room for B sequences of up to T tokens, T at most config.block_size."""

    def __init__(self, config: Config, B: int, T: int, *, device=None, dtype=None):
        if not 1 <= T <= config.block_size:
            raise ValueError(f"T must be 1 to block_size={config.block_size} tokens, got {T}")
        D = config.n_embd // config.n_head
        self.n_head = config.n_head
        self.kv = torch.zeros(
            config.n_layer, B, T, 2, config.n_head, D, device=device, dtype=dtype
        )  # zeros: beyond an end, where a tile's masked lanes may look, there must be no NaN

    @property
    def room(self) -> int:
        """The number of tokens that each sequence has room for."""
        return self.kv.shape[2]


class Prefill:
    """T tokens of every sequence at positions start, start + 1, …: causal attention to all so far.

    Sequences that are shorter are padded on the right: a token never sees what follows it.
    """

    def __init__(self, cache: Cache, start: int, T: int):
        self.cache, self.start, self.end = cache, start, start + T
        self.positions = torch.arange(start, self.end, device=cache.kv.device)

    def attend(self, layer: int, qkv: Tensor, ops) -> Tensor:
        """qkv (B, T, 3C) to (B, T, C); its keys and values are kept."""
        q, k, v = qkv.unflatten(-1, (3, self.cache.n_head, -1)).unbind(2)  # (B, T, H, D) each
        kv = self.cache.kv[layer, :, : self.end]
        kv[:, self.start :, 0], kv[:, self.start :, 1] = k, v
        return ops.causal_attention(q, *kv.unbind(2)).flatten(2)  # the last sees the last


class Decode:
    """The next token of every sequence, of which lengths (B,) int64 are there already."""

    def __init__(self, cache: Cache, lengths: Tensor):
        self.cache, self.lengths = cache, lengths
        self.positions = lengths[:, None]
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.seen = lengths + 1

    def attend(self, layer: int, qkv: Tensor, ops) -> Tensor:
        """qkv (B, 1, 3C) to (B, 1, C); its keys and values are kept."""
        qkv = qkv.unflatten(-1, (3, self.cache.n_head, -1))  # (B, 1, 3, H, D)
        kv = self.cache.kv[layer]
        kv.index_put_((self.rows, self.lengths), qkv[:, 0, 1:])
        k, v = kv.unbind(2)
        return ops.decode_attention(qkv[:, :, 0], k, v, self.seen).flatten(2)
