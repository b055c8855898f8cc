"""Attention of one new token per sequence over a cache, against PyTorch's attention.

    python benchmarks/decode_attention.py --shapes 8x1024x12x64 --dtype bfloat16

Shapes are BxTxHxD: sequences, keys in each sequence's cache, heads, head size. The rate counts the
bytes of the two caches, read once. Every sequence attends to its whole cache, so peers without a
lengths argument need no mask; our kernels read the lengths in any case.
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from attention import SDPA
from bench import harness
from bench.clock import BYTE, Work
from bench.harness import FORWARD, Contender, Op
from bench.peers import autotuned, compiled, flash
from torch.nn.attention import sdpa_kernel

from gpt2 import kernels
from gpt2.kernels import reference

DIMS = "BxTxHxD"
SHAPES = {
    "cpu": "1x1024x12x64,8x1024x12x64",
    "cuda": ",".join(f"{B}x{T}x12x64" for T in (1024, 256, 512, 128) for B in (1, 8, 64)),
}


def inputs(shape, randn, _):
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    q, k_cache, v_cache = (randn(B, n, H, D) for n in (1, T, T))
    return [q, k_cache, v_cache, torch.full((B,), T, device=q.device)]


def eager(q, k_cache, v_cache, lengths):
    """The formula, one PyTorch call per step, with the mask that caches of several lengths need."""
    return reference.decode_attention(q, k_cache, v_cache, lengths)


def sdpa(q, k_cache, v_cache, lengths):
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def with_cache(function, q, k_cache, v_cache, lengths):
    return function(q, k_cache, v_cache, cache_seqlens=lengths.int(), causal=True)


def peers(device):
    for name, backend in SDPA.items():
        yield Contender(name, sdpa, lambda backend=backend: sdpa_kernel(backend))
    for peer in flash("flash_attn_with_kvcache", with_cache, device):
        yield replace(peer, name=f"{peer.name}-kvcache")
    yield Contender("eager", eager)
    yield compiled("compiled", eager)
    yield autotuned(eager, device)


def work(shape, step, itemsize):
    return Work(2 * shape.B * shape.T * shape.H * shape.D * itemsize, BYTE)


OPS = [
    Op(
        name="decode_attention",
        kernel="decode_attention",
        inputs=inputs,
        call=lambda *inputs: kernels.decode_attention(*inputs),
        truth=reference.decode_attention,
        plain=eager,
        peers=peers,
        work=work,
        passes=(FORWARD,),
        size=lambda s: s.D,
    )
]

if __name__ == "__main__":
    sys.exit(harness.main(OPS, doc=__doc__, dims=DIMS, shapes=SHAPES))
