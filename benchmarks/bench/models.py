"""The models whose training steps are compared, all with the weights of one plain gpt2.Model.

B batch   T time   C features   V vocabulary
"""

import copy
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt2 import Model


class NanoBlock(nn.Module):
    """nanoGPT's block: biases in all layers, SDPA, PyTorch's LayerNorm and GELU."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        heads = (t.view(B, T, self.n_head, -1).transpose(1, 2)
                 for t in self.c_attn(self.ln_1(x)).split(C, dim=2))  # fmt: skip
        o = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.attn_proj(o.transpose(1, 2).reshape(B, T, C))
        h = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.mlp_proj(h)


class NanoGPT(nn.Module):
    """loss = model(idx, targets), from F.cross_entropy of the whole logits."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(NanoBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nanogpt(plain: Model) -> nn.Module:
    with torch.device("meta"):  # skips random initialization
        model = NanoGPT(plain.config)
    renamed = {}
    for name, value in plain.state_dict().items():
        name = name.removeprefix("transformer.").replace("attn.c_attn", "c_attn")
        name = name.replace("attn.c_proj", "attn_proj").replace("mlp.c_proj", "mlp_proj")
        renamed[name.replace("mlp.c_fc", "c_fc")] = value
    del renamed["lm_head.weight"]  # tied
    model.to_empty(device="cpu").load_state_dict(renamed)
    return model


def transformers(plain: Model) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: getattr(plain.config, name) for name in ("vocab_size", "n_embd", "n_layer")}
    config = GPT2Config(
        **sizes, n_head=plain.config.n_head, n_positions=plain.config.block_size,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    linears = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D stores (in, out)
    model.load_state_dict(
        {
            name: value.t() if name.endswith(linears) else value
            for name, value in plain.state_dict().items()
        }
    )
    return model


class WithLoss(nn.Module):
    """Wraps a model so that loss = model(idx, targets)."""

    def __init__(self, model: nn.Module, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, idx, targets):
        return self.loss(self.model, idx, targets)


def second(model, idx, targets):
    return model(idx, targets)[1]


def shifted(model, idx, targets):
    """The loss with labels shifted by one, because transformers compares position i with i + 1."""
    logits = model(input_ids=idx).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def ours(plain: Model, fast: bool) -> nn.Module:
    model = copy.deepcopy(plain)
    model.fast = fast
    return WithLoss(model, second)


def compiled(plain: Model, fast: bool, mode: str = "default") -> nn.Module:
    """reduce-overhead and max-autotune launch the forward and the backward as CUDA graphs."""
    return torch.compile(ours(plain, fast), dynamic=False, mode=mode)


BACKENDS = ["fast", "fast-graph", "fast-compiled", "fast-reduce-overhead"]
PEERS = ["compiled", "plain", "nanogpt", "transformers", "reduce-overhead", "max-autotune"]
# Compiled by torch.compile; without models that choose by timing, which other processes disturb
COMPILED = ["fast-compiled", "fast-reduce-overhead", "compiled", "reduce-overhead"]


def makers(plain: Model) -> dict[str, Callable[[], nn.Module]]:
    """Name -> function that makes the model on the CPU, with loss = module(idx, targets). The most
    important come first. fast-graph is the fast model; train_step.py captures its step."""
    return {
        "fast": lambda: ours(plain, True),
        "fast-graph": lambda: ours(plain, True),
        "compiled": lambda: compiled(plain, False),
        "plain": lambda: ours(plain, False),
        "fast-compiled": lambda: compiled(plain, True),
        "fast-reduce-overhead": lambda: compiled(plain, True, "reduce-overhead"),
        "nanogpt": lambda: WithLoss(nanogpt(plain), lambda m, i, t: m(i, t)),
        "transformers": lambda: WithLoss(transformers(plain), shifted),
        "reduce-overhead": lambda: compiled(plain, False, "reduce-overhead"),
        "max-autotune": lambda: compiled(plain, False, "max-autotune"),
    }
