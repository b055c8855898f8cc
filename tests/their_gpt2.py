"""transformers' GPT-2 for tests: random models, as they compute them and on our kernels."""

import copy

import pytest
import torch
from util import DEVICE, assert_close_to

from gpt2 import interop

transformers = pytest.importorskip("transformers", minversion="5.4")
BACKEND = "triton" if DEVICE == "cuda" else "cpu"
MARKS = pytest.mark.triton if DEVICE == "cuda" else pytest.mark.cpu_kernels
OURS = ("gpt2_kernels", "accelerated")
SMALL = {"vocab_size": 65, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}


def config_of(dropout=0.0, **sizes):
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return transformers.GPT2Config(**ends, **{**dict.fromkeys(names, dropout), **sizes})


def their_model(sizes=SMALL, how="eager", noise=0.05, **options):
    """Random weights, biases and norms too: all of them matter."""
    model = transformers.GPT2LMHeadModel(config_of(**sizes, **options)).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return served(model.eval(), how)


def served(model, how):
    """model itself, its attention or all of it computed in this way."""
    if how == "accelerated":
        return interop.accelerate_transformers(model)
    interop.register_attention()
    model.set_attn_implementation(how)
    return model


def as_served(model, how):
    return served(copy.deepcopy(model), how)


def batch(B=3, T=13, V=65, padding="none", count=(4, 0, 7)):
    """Ids, mask and positions with count[b] tokens of padding, and labels without it."""
    ids = torch.randint(1, V, (B, T), device=DEVICE)
    missing = torch.tensor(count, device=DEVICE)[:B, None] * (padding != "none")
    position = torch.arange(T, device=DEVICE)
    mask = position < T - missing if padding == "right" else position >= missing
    before = torch.cat([mask[:, :1], mask[:, :-1]], 1)  # the first token is predicted from padding
    return {
        "input_ids": ids.where(mask, 0),
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": ids.where(mask & before, -100),
    }


def results(model, inputs, seed=0):
    """Logits but for padding's, loss, and every gradient."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**inputs)
    output.loss.backward()
    logits = output.logits.detach()
    if (mask := inputs.get("attention_mask")) is not None and mask.dim() == 2:
        logits = logits[mask.bool()]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits, output.loss.detach(), gradients


def assert_as_good(exact, ours, plain, factor=2):
    """ours and plain as results gives them: the errors of a kernel against those of PyTorch."""
    logits, loss, gradients = exact
    assert_close_to(
        logits, ours[0], plain[0], "logits", factor=factor, terms=logits.abs().max().item()
    )
    # A single number: it may move by as much as a logit does, and by its own last bits.
    noise = factor * (plain[0] - logits).abs().max()
    assert (ours[1] - loss).abs() <= noise + 4 * torch.finfo(ours[1].dtype).eps * loss
    assert gradients.keys() == ours[2].keys()
    scale = max(g.square().mean().sqrt().item() for g in gradients.values())
    for name, g in gradients.items():
        assert g.abs().max() > 0, name
        what = (g, ours[2][name], plain[2][name], name)
        assert_close_to(*what, factor=factor + 1, terms=scale / 8)
