"""A cache of keys and values, so that each past token's are computed once.

    kv (L, B, T, 2, H, D)      layer, sequence, position, key or value

The cache is one fixed allocation, so a CUDA graph can replay a step of decoding. All sequences
begin at position 0 and may end at different positions. Attention never uses entries beyond a
sequence's end.

The model uses the cache through Prefill, for a run of tokens, or Decode, for one more token of
each sequence. Both have positions, those of the new tokens, and attend, which computes attention.
"""

import torch
from torch import Tensor

from ..config import Config


class Cache:
    """Keys and values of B sequences of up to T tokens. T is at most config.block_size."""

    def __init__(self, config: Config, B: int, T: int, *, device=None, dtype=None):
        if not 1 <= T <= config.block_size:
            raise ValueError(f"T must be 1 to block_size={config.block_size} tokens, got {T}")
        D = config.n_embd // config.n_head
        self.n_head = config.n_head
        self.kv = torch.zeros(
            config.n_layer, B, T, 2, config.n_head, D, device=device, dtype=dtype
        )  # zeros, because masked lanes of a tile may read beyond an end: no NaN may be there

    @property
    def room(self) -> int:
        """The capacity: the number of tokens per sequence."""
        return self.kv.shape[2]


class Prefill:
    """T tokens of every sequence at positions start, start + 1, …, with causal attention to all
    tokens so far.

    Shorter sequences are padded on the right, which no earlier token can see.
    """

    def __init__(self, cache: Cache, start: int, T: int):
        self.cache, self.start, self.end = cache, start, start + T
        self.positions = torch.arange(start, self.end, device=cache.kv.device)

    def attend(self, layer: int, qkv: Tensor, ops) -> Tensor:
        """Attention for qkv (B, T, 3C), to (B, T, C). Stores the keys and values in the cache."""
        q, k, v = qkv.unflatten(-1, (3, self.cache.n_head, -1)).unbind(2)  # (B, T, H, D) each
        kv = self.cache.kv[layer, :, : self.end]
        kv[:, self.start :, 0], kv[:, self.start :, 1] = k, v
        return ops.causal_attention(q, *kv.unbind(2)).flatten(2)  # the last query sees every key


class Decode:
    """The next token of every sequence. lengths (B,) int64 counts the tokens already cached."""

    def __init__(self, cache: Cache, lengths: Tensor):
        self.cache, self.lengths = cache, lengths
        self.positions = lengths[:, None]
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.seen = lengths + 1

    def attend(self, layer: int, qkv: Tensor, ops) -> Tensor:
        """Attention for qkv (B, 1, 3C), to (B, 1, C). Stores the keys and values in the cache."""
        qkv = qkv.unflatten(-1, (3, self.cache.n_head, -1))  # (B, 1, 3, H, D)
        kv = self.cache.kv[layer]
        kv.index_put_((self.rows, self.lengths), qkv[:, 0, 1:])
        k, v = kv.unbind(2)
        return ops.decode_attention(qkv[:, :, 0], k, v, self.seen).flatten(2)
