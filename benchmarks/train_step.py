"""A training step of GPT-2 124M: forward, backward, AdamW; gpt2.Model(fast=True) against its peers.

    python benchmarks/train_step.py --device cpu
    python benchmarks/train_step.py --shapes 4x64 --dtype float32,bfloat16 --json out.json

Shapes are BxT: sequences and tokens of each. float32 is plain; bfloat16 and float16 are autocast
over float32 parameters. All start from the same weights, and each first loss is compared with that
of the plain model in float32 before anything is timed. Operations are counted as 6 per
parameter and token and 12 L C T for attention (Chowdhery et al., PaLM, 2022), and given as a share
of a large matrix product's rate. torch.compile compiles the plain model; transformers' GPT-2 is its
own code with SDPA attention; nanogpt is an eager model in nanoGPT's form, written below.
"""

import contextlib
import sys

import harness
import torch
import torch.nn as nn
import torch.nn.functional as F
from clock import FLOP, Clock, Work
from harness import Contender, Wrong
from report import Result

from gpt2 import Config, Model

DIMS = "BxT"
SHAPES = {"cpu": "1x1024,4x64", "cuda": "16x1024,64x1024"}
CONFIG = Config.named("gpt2")


class NanoBlock(nn.Module):
    """nanoGPT's block: bias everywhere, SDPA, PyTorch's own LayerNorm and GELU."""

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
    model = NanoGPT(plain.config).to(plain.lm_head.weight.device)
    renamed = {}
    for name, value in plain.state_dict().items():
        name = name.removeprefix("transformer.").replace("attn.c_attn", "c_attn")
        name = name.replace("attn.c_proj", "attn_proj").replace("mlp.c_proj", "mlp_proj")
        renamed[name.replace("mlp.c_fc", "c_fc")] = value
    del renamed["lm_head.weight"]  # tied
    model.load_state_dict(renamed)
    return model


def transformers(plain: Model) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: getattr(plain.config, name) for name in ("vocab_size", "n_embd", "n_layer")}
    config = GPT2Config(
        **sizes, n_head=plain.config.n_head, n_positions=plain.config.block_size,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(plain.lm_head.weight.device)
    linears = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D stores (in, out)
    model.load_state_dict(
        {
            name: value.t() if name.endswith(linears) else value
            for name, value in plain.state_dict().items()
        }
    )
    return model


class Losses(nn.Module):
    """loss = model(idx, targets), whatever the model returns."""

    def __init__(self, model: nn.Module, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, idx, targets):
        return self.loss(self.model, idx, targets)


def second(model, idx, targets):
    return model(idx, targets)[1]


def shifted(model, idx, targets):
    """transformers shifts the labels itself: position i is judged by label i + 1."""
    logits = model(input_ids=idx).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def contenders(plain: Model):
    """Name, kind, and how to make each: one model at a time is in memory twice at the most."""

    def ours(fast):
        model = Model(plain.config, fast=fast).to(plain.lm_head.weight.device)
        model.load_state_dict(plain.state_dict())
        return Losses(model, second)

    yield Contender("fast", lambda: ours(True), kind="backend")
    yield Contender("plain", lambda: ours(False))
    yield Contender("compiled", lambda: torch.compile(ours(False), dynamic=False))
    yield Contender("transformers", lambda: Losses(transformers(plain), shifted))
    yield Contender("nanogpt", lambda: Losses(nanogpt(plain), lambda m, i, t: m(i, t)))


def stepper(model: nn.Module, idx, targets, dtype):
    """One training step as a function of nothing; it returns the loss before the update."""
    fused = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    device = idx.device.type
    autocast = dtype != torch.float32
    model.train()

    def step():
        context = torch.autocast(device, dtype) if autocast else contextlib.nullcontext()
        with context:
            loss = model(idx, targets)
        loss.backward()
        fused.step()
        fused.zero_grad()
        return loss.detach()

    return step


def measure(shape, dtype, clock: Clock, limit: dict, only) -> list[Result]:
    """Results of every contender at one shape: the loss compared, then steps timed in turns."""
    torch.compiler.reset()
    torch.manual_seed(0)
    device = clock.device
    plain = Model(CONFIG).to(device)
    idx, targets = torch.randint(CONFIG.vocab_size, (2, shape.B, shape.T), device=device)
    with torch.no_grad():
        truth = plain(idx, targets, return_logits=False)[1]
    work = Work(plain.flops_per_token(shape.T) * shape.B * shape.T, FLOP)
    results, runs, errors = [], {}, {}
    name = str(dtype).removeprefix("torch.")
    for contender in contenders(plain):
        if only[contender.kind] is not None and contender.name not in only[contender.kind]:
            continue
        try:
            run = stepper(contender.call(), idx, targets, dtype)
            errors[contender] = abs(run().item() - truth.item())
            # bfloat16 has 8 bits: a loss of 11 is known to a few hundredths
            if not errors[contender] <= 8 * torch.finfo(dtype).eps:
                raise Wrong(f"the first loss is off by {errors[contender]:.2e}")
            runs[contender] = run, contextlib.nullcontext
        except Exception as error:
            trouble = harness.trouble(contender, error)
            results.append(
                Result("train_step", "step", vars(shape), name, contender.name, contender.kind,
                       **trouble)
            )  # fmt: skip
    times = clock(runs)
    for contender, (median, p20, p80) in sorted(times.items(), key=lambda t: t[1][0]):
        rate = work.rate(median, device)
        results.append(
            Result(
                "train_step", "step", vars(shape), name, contender.name, contender.kind,
                median_ms=median, p20_ms=p20, p80_ms=p80, rate=rate, unit=work.unit(device),
                percent_of_limit=100 * rate / limit[work.unit(device)],
                times_faster_than={
                    c.name: t[0] / median for c, t in times.items() if c.kind == "peer"
                },
                max_error=errors[contender],
            )
        )  # fmt: skip
    return results


if __name__ == "__main__":
    names = ["fast"], ["plain", "compiled", "transformers", "nanogpt"]
    sys.exit(harness.run("train_step", [measure], *names, doc=__doc__, dims=DIMS, shapes=SHAPES))
