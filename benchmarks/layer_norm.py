"""LayerNorm, alone and fused with the preceding residual addition, against PyTorch's.

    python benchmarks/layer_norm.py --shapes 65536x768 --dtype bfloat16

Shapes are NxC: rows and features. The rate counts the bytes of the (N, C) tensors that must be read
and written. Forward: x and y; with the residual also residual and the sum. Backward: dy, x and dx;
with the residual also the gradient of the sum.
"""

import sys

import torch.nn.functional as F
from bench import harness
from bench.clock import BYTE, Work
from bench.harness import FORWARD, Contender, Op
from bench.peers import autotuned, compiled, liger

from gpt2 import kernels
from gpt2.kernels import reference

DIMS = "NxC"
SHAPES = {"cpu": "512x768,2048x768", "cuda": "65536x768,16384x768,65536x1024,32768x1600"}


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def add_layer_norm(x, residual, weight, bias):
    s = x + residual
    return layer_norm(s, weight, bias), s


def formula(x, weight, bias):
    """LayerNorm's formula, one PyTorch call per step, with float32 statistics."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    xhat = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return (xhat * weight + bias).to(x.dtype)


def peers(device):
    yield Contender("eager", layer_norm)
    yield compiled("compiled", layer_norm)
    yield compiled("formula-compiled", formula)
    yield liger("liger_layer_norm", lambda norm, x, weight, bias: norm(x, weight, bias, 1e-5))
    yield Contender("quack", None, why_not="its LayerNorm has no backward")
    yield autotuned(layer_norm, device)


def add_peers(device):
    yield Contender("eager", add_layer_norm)
    yield compiled("compiled", add_layer_norm)
    yield autotuned(add_layer_norm, device)


def traffic(forward, backward):
    def work(shape, step, itemsize):
        tensors = forward if step == FORWARD else backward
        return Work(tensors * shape.N * shape.C * itemsize, BYTE)

    return work


OPS = [
    Op(
        name="layer_norm",
        kernel="layer_norm",
        inputs=lambda s, randn, _: [randn(s.N, s.C), 1 + 0.1 * randn(s.C), randn(s.C)],
        call=lambda x, weight, bias: kernels.layer_norm(x, weight, bias),
        truth=reference.layer_norm,
        plain=layer_norm,
        peers=peers,
        work=traffic(2, 3),
        size=lambda s: s.C,
    ),
    Op(
        name="add_layer_norm",
        kernel="layer_norm",
        inputs=lambda s, randn, _: [
            *(randn(s.N, s.C) for _ in range(2)),
            *(1 + 0.1 * randn(s.C), randn(s.C)),
        ],
        call=lambda x, residual, weight, bias: kernels.add_layer_norm(x, residual, weight, bias),
        truth=reference.add_layer_norm,
        plain=add_layer_norm,
        peers=add_peers,
        work=traffic(4, 4),
        size=lambda s: s.C,
    ),
]

if __name__ == "__main__":
    sys.exit(harness.main(OPS, doc=__doc__, dims=DIMS, shapes=SHAPES))
