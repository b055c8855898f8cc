"""Cross-entropy over the vocabulary, from logits, and fused with the head that computes them.

    python benchmarks/cross_entropy.py --shapes 16384x50257x768 --dtype bfloat16

Shapes are NxVxC: tokens, vocabulary, features (only linear_cross_entropy uses C). Forward and
backward are timed together, because several contenders prepare the gradient in the forward. The
rate of cross_entropy counts the bytes of the logits: read once for the loss, then read and written
for the gradient. That of linear_cross_entropy counts the operations of its three matrix products.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from bench import harness
from bench.clock import BYTE, FLOP, Work
from bench.harness import BOTH, FORWARD, Contender, Op
from bench.peers import autotuned, compiled, liger, quack

from gpt2 import kernels
from gpt2.kernels import reference

DIMS = "NxVxC"
SHAPES = {"cpu": "128x50257x768", "cuda": "16384x50257x768,8192x50257x768,8192x50304x1600"}


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets, ignore_index=-1)


def linear_cross_entropy(x, weight, targets):
    return cross_entropy(F.linear(x, weight), targets)


def peers(device):
    yield Contender("eager", cross_entropy)
    yield compiled("compiled", cross_entropy)
    yield liger(
        "liger_cross_entropy",
        lambda loss, logits, targets: loss(logits, targets, ignore_index=-1),
    )
    yield quack("cross_entropy", quacks, device)
    yield autotuned(cross_entropy, device)


def quacks(module, logits, targets):
    return module.cross_entropy(logits, targets, ignore_index=-1, reduction="mean")


def linear_peers(device):
    yield Contender("eager", linear_cross_entropy)
    yield compiled("compiled", linear_cross_entropy)
    yield liger(
        "liger_fused_linear_cross_entropy",
        lambda loss, x, weight, targets: loss(x, weight, targets, ignore_index=-1),
    )
    yield autotuned(linear_cross_entropy, device)


def targets(shape, randint):
    """Random targets; one in sixteen is ignored."""
    y = randint(shape.V, shape.N)
    return torch.where(randint(16, shape.N) == 0, -1, y)


OPS = [
    Op(
        name="cross_entropy",
        kernel="cross_entropy",
        inputs=lambda s, randn, randint: [randn(s.N, s.V), targets(s, randint)],
        call=lambda logits, targets: kernels.cross_entropy(logits, targets, -1),
        truth=partial(reference.cross_entropy, ignore_index=-1),
        plain=cross_entropy,
        peers=peers,
        work=lambda s, step, size: Work((1 if step == FORWARD else 3) * s.N * s.V * size, BYTE),
        passes=(FORWARD, BOTH),
    ),
    Op(
        name="linear_cross_entropy",
        kernel="cross_entropy",
        inputs=lambda s, randn, randint: [
            randn(s.N, s.C), s.C**-0.5 * randn(s.V, s.C), targets(s, randint),
        ],
        call=lambda x, weight, targets: kernels.linear_cross_entropy(x, weight, targets, -1),
        truth=partial(reference.linear_cross_entropy, ignore_index=-1),
        plain=linear_cross_entropy,
        peers=linear_peers,
        work=lambda s, step, _: Work((2 if step == FORWARD else 6) * s.N * s.C * s.V, FLOP),
        passes=(FORWARD, BOTH),
    ),
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(harness.main(OPS, doc=__doc__, dims=DIMS, shapes=SHAPES))
