"""GELU in its tanh form, alone and fused with the preceding bias, against PyTorch's.

    python benchmarks/gelu.py --shapes 16384x3072 --dtype bfloat16

Shapes are NxC: rows and features; GPT-2 has C = 4 * n_embd. The rate counts the bytes of the (N, C)
tensors that must be read and written: x and y in the forward; x, dy and dx in the backward.
"""

import sys

import torch.nn.functional as F
from bench import harness
from bench.clock import BYTE, Work
from bench.harness import FORWARD, Contender, Op
from bench.peers import autotuned, compiled

from gpt2 import kernels
from gpt2.kernels import reference

DIMS = "NxC"
SHAPES = {"cpu": "256x3072,2048x3072", "cuda": "65536x3072,16384x3072,32768x6400"}


def gelu(x):
    return F.gelu(x, approximate="tanh")


def bias_gelu(x, bias):
    return F.gelu(x + bias, approximate="tanh")


def against(call):
    def peers(device):
        yield Contender("eager", call)
        yield compiled("compiled", call)
        yield autotuned(call, device)

    return peers


def work(shape, step, itemsize):
    return Work((2 if step == FORWARD else 3) * shape.N * shape.C * itemsize, BYTE)


OPS = [
    Op(
        name="gelu",
        kernel="gelu",
        inputs=lambda s, randn, _: [randn(s.N, s.C)],
        call=lambda x: kernels.gelu(x),
        truth=reference.gelu,
        plain=gelu,
        peers=against(gelu),
        work=work,
    ),
    Op(
        name="bias_gelu",
        kernel="gelu",
        inputs=lambda s, randn, _: [randn(s.N, s.C), randn(s.C)],
        call=lambda x, bias: kernels.bias_gelu(x, bias),
        truth=reference.bias_gelu,
        plain=bias_gelu,
        peers=against(bias_gelu),
        work=work,
    ),
]

if __name__ == "__main__":
    sys.exit(harness.main(OPS, doc=__doc__, dims=DIMS, shapes=SHAPES))
