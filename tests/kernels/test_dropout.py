"""Attention's dropout: its rate, its mask, and its generator."""

import math

import numpy as np
import pytest
import torch
from inputs import qkv_in
from util import DEVICE, bits_equal, launches

from gpt2 import kernels
from gpt2.kernels import reference


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_rate(p, backend):
    """With v = 1, o[i] is the kept probability mass; with uniform scores it is a binomial rate."""
    T, n = 128, 4 * 128 * 129 // 2
    q, v = torch.zeros(1, T, 4, 16, device=DEVICE), torch.ones(1, T, 4, 16, device=DEVICE)
    with kernels.use(backend):
        o = kernels.causal_attention(q, q, v, dropout_p=p)[..., 0]
    seen = torch.arange(1, T + 1, device=DEVICE)[:, None]
    kept = (o * (1 - p) * seen).sum().item()
    sigma = math.sqrt(n * p * (1 - p))
    assert abs(kept - n * (1 - p)) < 5 * sigma


def test_dropout_mask_is_the_same_in_forward_and_backward(kernel_backend):
    """do/dv is the dropped probability: o = P v, so dv = P^T do gives P."""
    T = 65
    q, v = torch.zeros(1, T, 1, 128, device=DEVICE), torch.zeros(1, T, 1, 128, device=DEVICE)
    v[0, :, 0, :T] = torch.eye(T)
    v.requires_grad_()
    with kernels.use(kernel_backend):
        o = kernels.causal_attention(q, q, v, dropout_p=0.3, seed=7)
        (dv,) = torch.autograd.grad(o, v, v.detach())
    P = o[0, :, 0, :T]
    assert torch.equal(P > 0, dv[0, :, 0, :T].T > 0)
    assert torch.allclose(P, dv[0, :, 0, :T].T)
    keep = reference.dropout_keep(torch.tensor([7]), (1, 1, T, T), 0.3)[0, 0].to(P.device)
    assert torch.equal(P > 0, keep.tril())


@pytest.mark.parametrize("seed", [np.int64(7), np.uint8(7), torch.tensor(7), torch.tensor([7])])
def test_seeds_of_every_kind_of_integer(seed):
    q = torch.randn(1, 5, 1, 16, device=DEVICE)
    if isinstance(seed, torch.Tensor):
        seed = seed.to(DEVICE)
    same = kernels.causal_attention(q, q, q, dropout_p=0.5, seed=7)
    assert bits_equal(kernels.causal_attention(q, q, q, dropout_p=0.5, seed=seed), same)


def test_dropout_masks_differ_by_seed_and_position(backend):
    q, k, v = qkv_in("contiguous", 1, 64, 64, 2, 16, torch.float32)

    def run(**kwargs):
        with kernels.use(backend):
            return kernels.causal_attention(q, k, v, dropout_p=0.5, **kwargs)

    assert bits_equal(run(seed=1), run(seed=1))
    assert not bits_equal(run(seed=1), run(seed=2))
    assert not bits_equal(run(seed=1), run(seed=1 + 2**32)), "the upper half of the key counts"
    assert not bits_equal(run(), run()), "drawn anew from the generator"
    torch.manual_seed(0)
    first = run()
    torch.manual_seed(0)
    assert bits_equal(first, run())


def test_dropout_of_nothing_and_of_everything(kernel_backend):
    q, k, v = (x.requires_grad_() for x in qkv_in("contiguous", 1, 33, 33, 1, 16, torch.float32))
    with kernels.use(kernel_backend), launches():
        assert bits_equal(
            kernels.causal_attention(q, k, v), kernels.causal_attention(q, k, v, dropout_p=0.0)
        )
        o = kernels.causal_attention(q, k, v, dropout_p=1.0)
        grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert not o.any() and not any(g.any() for g in grads)


def test_philox_of_the_reference_is_philox():
    """Philox4x32-10 from the known-answer file of Random123 (Salmon et al.); ours uses 7 rounds."""
    key = torch.tensor([(0x299F31D0 << 32 | 0xA4093822) - (1 << 64) * (0x299F31D0 >> 31)])
    counter = [torch.tensor([c]) for c in (0x243F6A88, 0x85A308D3, 0x13198A2E)]
    zero = [torch.tensor([0])] * 3
    words = reference._philox(torch.tensor([0]), *zero, rounds=10)
    assert [hex(w.item()) for w in words] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    assert len({w.item() for w in reference._philox(key, *counter)}) == 4
