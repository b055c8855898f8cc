"""GPT-2, once, for both ways to compute it.

Every operation that has a kernel is called through `ops`: the kernels with fast=True, their plain
PyTorch meaning with fast=False. Parameters, state dict and code are the same.

    B batch   T time   H heads   D head size   C = H * D features   V vocabulary
"""

import math
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .config import Config
from .kernels import reference
from .kernels.ops import check_ids


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, h: Tensor, ops) -> Tensor:
        qkv = project(self.c_attn, h, ops)  # (B, T, 3C)
        dropout_p = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=h.device) if dropout_p else None
        o = ops.causal_attention_qkv(qkv, self.n_head, dropout_p=dropout_p, seed=seed)  # (B, T, C)
        return F.dropout(project(self.c_proj, o, ops), self.dropout, self.training)


def project(layer: nn.Linear, h: Tensor, ops) -> Tensor:
    return ops.linear(h, layer.weight, layer.bias)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, h: Tensor, ops) -> Tensor:
        h = ops.bias_gelu(ops.linear(h, self.c_fc.weight), self.c_fc.bias)  # (B, T, 4C)
        return F.dropout(project(self.c_proj, h, ops), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Pre-norm: s += attn(ln_1(s)), then s += mlp(ln_2(s)).

    The last addition of a block is left to the norm of the next, which does both in one pass: x is
    what is still to be added to the stream s.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, s: Tensor | None, ops) -> tuple[Tensor, Tensor]:
        h, s = add_norm(self.ln_1, x, s, ops)
        h, s = add_norm(self.ln_2, self.attn(h, ops), s, ops)
        return self.mlp(h, ops), s


def add_norm(norm: nn.LayerNorm, x: Tensor, s: Tensor | None, ops) -> tuple[Tensor, Tensor]:
    """(norm(s + x), s + x); before the first block there is no s."""
    if s is None:
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps), x
    return ops.add_layer_norm(x, s, norm.weight, norm.bias, norm.eps)


class Model(nn.Module):
    """GPT-2 (Radford et al., 2019) with the state-dict names of the published checkpoints.

    fast may be switched at any time. With fast=True an op that no kernel can serve here falls back
    to plain PyTorch and says so once.
    """

    def __init__(self, config: Config | None = None, *, fast: bool = False):
        super().__init__()
        self.config = config = Config() if config is None else config
        self.fast = fast
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal 0.02; less for the 2 n_layer projections into the stream, which add up."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear) and module is not self.lm_head:
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block):
            std = 0.02 / math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.attn.c_proj.weight, std=std)
            nn.init.normal_(module.mlp.c_proj.weight, std=std)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_logits: bool | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss) of token ids idx (B, T), int64.

        With targets (B, T), int64, of which -1 is ignored, loss is the mean cross-entropy in nats,
        else None. logits (B, T, V) are returned unless return_logits is False, or None while
        training with targets: the loss is then computed without ever storing B T V numbers. Raises
        ValueError where T exceeds block_size or an id lies outside the vocabulary.
        """
        self._check_shape("idx", idx)
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(
                f"targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}"
            )
        ops = kernels if self.fast else reference
        h = self._hidden(idx, ops)  # (B, T, C)
        if targets is None:
            return project(self.lm_head, h, ops), None  # (B, T, V)
        if not self.fast:  # the kernels' wrappers look at targets themselves
            targets = check_ids("targets", targets, self.config.vocab_size, ignore_index=-1)
        if return_logits is None:
            return_logits = not self.training
        if not return_logits:
            return None, ops.linear_cross_entropy(h, self.lm_head.weight, targets)
        logits = project(self.lm_head, h, ops)  # (B, T, V)
        return logits, ops.cross_entropy(logits, targets)

    def _hidden(self, idx: Tensor, ops) -> Tensor:
        """What the head sees: (B, T, C)."""
        idx = check_ids("idx", idx, self.config.vocab_size)
        wte, wpe, blocks, ln_f = (self.transformer[name] for name in ("wte", "wpe", "h", "ln_f"))
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = F.dropout(wte(idx) + wpe(positions), self.config.dropout, self.training)  # (B, T, C)
        s = None
        for block in blocks:
            x, s = block(x, s, ops)
        h, _ = add_norm(ln_f, x, s, ops)
        return h

    def _check_shape(self, name: str, idx: Tensor) -> None:
        if not isinstance(idx, Tensor) or idx.dtype != torch.int64:
            got = idx.dtype if isinstance(idx, Tensor) else type(idx).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {got}")
        if idx.dim() != 2:
            raise ValueError(f"{name} must have shape (B, T), got {tuple(idx.shape)}")
        if idx.shape[1] > self.config.block_size:
            raise ValueError(
                f"{name} must be at most block_size={self.config.block_size} tokens long, "
                f"got T={idx.shape[1]}"
            )

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """idx (B, T), T >= 1, continued by max_new_tokens sampled tokens: (B, T + max_new_tokens).

        temperature 0 is greedy; top_k and top_p cut the distribution before it is sampled; the same
        seed gives the same tokens. Beyond block_size the model sees the last block_size tokens.
        """
        return torch.cat(
            [idx, *self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed)], dim=1
        )

    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of generate, (B, 1) each, as they are sampled."""
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"idx must have shape (B, T) with T >= 1, got {tuple(idx.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        generator = None
        if seed is not None:
            generator = torch.Generator(idx.device).manual_seed(seed)
        return self._stream(idx, max_new_tokens, temperature, top_k, top_p, generator)

    @torch.no_grad()
    def _stream(self, idx, max_new_tokens, temperature, top_k, top_p, generator):
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                idx = idx[:, -self.config.block_size :]
                self._check_shape("idx", idx)
                ops = kernels if self.fast else reference
                h = self._hidden(idx, ops)
                logits = project(self.lm_head, h[:, -1], ops)  # (B, V)
                token = sample(logits, temperature, top_k, top_p, generator)
                idx = torch.cat([idx, token], dim=1)
                yield token
        finally:
            self.train(was_training)

    def num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters, shared ones once; position embeddings count if asked for."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() * non_embedding

    def flops_per_token(self, T: int) -> int:
        """Of one training step, forward and backward: 6 N + 12 L C T (Chowdhery et al., PaLM)."""
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token id per row: logits (B, V) to (B, 1), int64."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        # Keep the likeliest tokens up to the first that brings their sum to top_p.
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    return torch.multinomial(probs, 1, generator=generator)
