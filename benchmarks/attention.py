"""Causal attention against every other implementation that is installed.

    python benchmarks/attention.py                                  # small shapes on a CPU
    python benchmarks/attention.py --shapes 16x1024x12x64,4x4096x12x64 --dtype bfloat16
    python benchmarks/attention.py --json out.json --plot out.png

Shapes are BxTxHxD: batch, time, heads, head size. The forward counts as 2 B H T² D operations, half
of 4 B H T² D because half of the score matrix is masked; the backward counts as 2.5 times that.
causal_attention_qkv is attention on GPT-2's packed projection; its time includes unpacking.
"""

import math
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from bench import harness
from bench.clock import FLOP, Work
from bench.harness import BACKWARD, Contender, Op
from bench.peers import autotuned, compiled, deterministic_flash, flash
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2 import kernels
from gpt2.kernels import reference

DIMS = "BxTxHxD"
SHAPES = {
    "cpu": "1x256x12x64,1x1024x12x64",
    "cuda": "16x1024x12x64,8x2048x12x64,4x4096x12x64,32x512x12x64,2x8192x12x64,1x16384x12x64",
}
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


def eager(q, k, v):
    """The formula, one PyTorch call per step. Inputs and result are (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return (s.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flex(device):
    """FlexAttention, compiled with a causal block mask of this length."""
    if device.type != "cuda":
        return Contender("flex", None, why_not="measured on a GPU only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    fused = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def call(q, k, v):
        T = q.shape[1]
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return fused(q, k, v, block_mask=masks[T]).transpose(1, 2)

    return Contender("flex", call, compiles=True)


def peers(device, wrap=lambda call: call):
    """Peers, the likely fastest first and the slowest to compile last, in case time runs out."""
    for name, backend in SDPA.items():
        yield Contender(name, wrap(sdpa), lambda backend=backend: sdpa_kernel(backend))
    theirs = "flash_attn_func", lambda f, q, k, v: f(q, k, v, causal=True), device
    for peer in (*flash(*theirs), deterministic_flash(*theirs)):
        yield replace(peer, call=peer.call and wrap(peer.call))
    yield Contender("eager", wrap(eager))
    flexible = flex(device)
    yield replace(flexible, call=flexible.call and wrap(flexible.call))
    yield compiled("compiled", wrap(eager))
    yield autotuned(wrap(eager), device)


def packed_peers(device):
    """Peers with packed inputs; on a GPU without eager and the peers that need compiling."""
    slow = () if device.type == "cpu" else ("eager", "compiled", "max-autotune", "flex")
    for peer in peers(device, unpacked):
        why_not = "measured without the packing" if peer.name in slow else peer.why_not
        yield replace(peer, why_not=why_not)


def unpacked(call):
    """`call` as a function of packed q, k and v, (B, T, 3, H, D), the output of c_attn."""
    return lambda qkv: call(*qkv.unbind(2))


def work(shape, step, _):
    forward = 4 * shape.B * shape.H * shape.T**2 * shape.D / 2
    return Work(forward * (2.5 if step == BACKWARD else 1), FLOP)


def corners(x):
    """The first and the last sequence and head; for long sequences only the last. The float64
    scores of all of them would not fit in memory."""
    ends = [0, -1] if x.shape[1] <= 8192 else [-1]
    return x[ends][..., ends, :]


def ours_packed(qkv):
    H = qkv.shape[3]
    return kernels.causal_attention_qkv(qkv.flatten(2), H).unflatten(-1, (H, -1))


OPS = [
    Op(
        name="causal_attention",
        kernel="attention",
        inputs=lambda s, randn, _: [randn(s.B, s.T, s.H, s.D) for _ in range(3)],
        call=lambda q, k, v: kernels.causal_attention(q, k, v),
        truth=lambda q, k, v: reference.causal_attention(q, k, v),
        plain=eager,
        peers=peers,
        work=work,
        part=corners,
        size=lambda s: s.D,
    ),
    Op(
        name="causal_attention_qkv",
        kernel="attention",
        inputs=lambda s, randn, _: [randn(s.B, s.T, 3, s.H, s.D)],
        call=ours_packed,
        truth=unpacked(reference.causal_attention),
        plain=unpacked(eager),
        peers=packed_peers,
        work=work,
        part=corners,
        size=lambda s: s.D,
    ),
]

if __name__ == "__main__":
    sys.exit(harness.main(OPS, doc=__doc__, dims=DIMS, shapes=SHAPES))
