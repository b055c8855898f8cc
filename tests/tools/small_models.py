"""Small models with random weights, on the tests' device."""

import torch
from util import DEVICE

from gpt2 import Config, Model

SMALL = Config(block_size=48, vocab_size=65, n_layer=2, n_head=2, n_embd=32)


def ids(B, T, V=65):
    return torch.randint(V, (B, T), device=DEVICE)


def model_in(config=SMALL, dtype=torch.float32, **kwargs):
    """A model with random parameters, biases and norms included."""
    model = Model(config, **kwargs).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(dtype)


def loss_and_gradients(model, idx, targets, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    _, loss = model(idx, targets)
    loss.backward()
    # clones: Module.double() would convert the gradients in place
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
