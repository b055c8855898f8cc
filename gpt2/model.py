"""GPT-2, once, for both ways to compute it.

Every operation that has a kernel is called through `ops`: the kernels with fast=True, their plain
PyTorch meaning with fast=False. Parameters, state dict and code are the same.

    B batch   T time   H heads   D head size   C = H * D features   V vocabulary
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .config import Config
from .kernels import reference
from .kernels.checks import check_ids
from .layers import add_norm, is_stock, own, project, project_gelu

IGNORED = -1  # a target without a loss, as nanoGPT has it; -100, PyTorch's, is read as it


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, h: Tensor, ops, attend=None) -> Tensor:
        qkv = project(self.c_attn, h, ops)  # (B, T, 3C)
        if attend is not None:  # over what a cache holds, too
            return project(self.c_proj, attend(qkv, ops), ops)
        dropout_p = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=h.device) if dropout_p else None
        o = ops.causal_attention_qkv(qkv, self.n_head, dropout_p=dropout_p, seed=seed)  # (B, T, C)
        return F.dropout(own(project(self.c_proj, o, ops)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, h: Tensor, ops) -> Tensor:
        h = project_gelu(self.c_fc, h, ops)  # (B, T, 4C)
        h = own(project(self.c_proj, h, ops))  # (B, T, C)
        return F.dropout(h, self.dropout, self.training)


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

    def forward(self, x: Tensor, s: Tensor | None, ops, attend=None) -> tuple[Tensor, Tensor]:
        h, s = add_norm(self.ln_1, x, s, ops)
        h, s = add_norm(self.ln_2, self.attn(h, ops, attend), s, ops)
        return self.mlp(h, ops), s


class Model(nn.Module):
    """GPT-2 (Radford et al., 2019) with the state-dict names of the published checkpoints.

    fast may be switched at any time. With fast=True an op that no kernel can serve here falls back
    to plain PyTorch and says so once.
    """

    def __init__(self, config: Config | None = None, *, fast: bool = False):
        super().__init__()
        if config is not None and not isinstance(config, Config):
            raise TypeError(f"config must be a Config, got {type(config).__name__}")
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

        With targets (B, T), int64, loss is the mean cross-entropy in nats over those that are
        neither -1 nor -100 (NaN of none, with gradients of 0), else None. logits (B, T, V) are
        returned unless return_logits is False, or None while training with targets: the loss is
        then computed without ever storing B T V numbers. Raises ValueError where T exceeds
        block_size or an id lies outside the vocabulary.
        """
        self._check_shape("idx", idx)
        if targets is not None:
            self._check_tokens("targets", targets)
            if targets.shape != idx.shape:
                raise ValueError(
                    f"targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}"
                )
            if targets.device != idx.device:
                raise ValueError(f"targets must be on {idx.device}, got {targets.device}")
        ops = self._ops()
        h = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.logits_of(h), None  # (B, T, V)
        targets = torch.where(targets == -100, IGNORED, targets)
        if not self.fast:  # the kernels' wrappers check targets themselves
            targets = check_ids("targets", targets, self.config.vocab_size, IGNORED)
        if return_logits is None:
            return_logits = not self.training
        head = self.lm_head
        if not return_logits and is_stock(head, nn.Linear) and head.bias is None:
            return None, ops.linear_cross_entropy(h, head.weight, targets, IGNORED)
        logits = self.logits_of(h)  # (B, T, V)
        loss = ops.cross_entropy(logits, targets, IGNORED)
        return (logits if return_logits else None), loss

    def hidden(self, idx: Tensor, past=None) -> Tensor:
        """What the head sees of idx (B, T), int64: (B, T, C). past is a form of a cache (cache.py),
        after whose tokens these come; with one, nothing is dropped out."""
        ops = self._ops()
        idx = check_ids("idx", idx, self.config.vocab_size)
        wte, wpe, blocks, ln_f = (self.transformer[name] for name in ("wte", "wpe", "h", "ln_f"))
        positions = (
            torch.arange(idx.shape[1], device=idx.device) if past is None else past.positions
        )
        x = F.dropout(wte(idx) + wpe(positions), self.config.dropout, self.training)  # (B, T, C)
        s = None
        for layer, block in enumerate(blocks):
            attend = None if past is None else functools.partial(past.attend, layer)
            x, s = block(x, s, ops, attend)
        h, _ = add_norm(ln_f, x, s, ops)
        return h

    def logits_of(self, h: Tensor) -> Tensor:
        """The head: h (..., C) to logits (..., V)."""
        return project(self.lm_head, h, self._ops())

    def _ops(self):
        return kernels if self.fast else reference

    def _check_tokens(self, name: str, idx: Tensor) -> None:
        if not isinstance(idx, Tensor) or idx.dtype != torch.int64:
            got = idx.dtype if isinstance(idx, Tensor) else type(idx).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {got}")
        if idx.dim() != 2:
            raise ValueError(f"{name} must have shape (B, T), got {tuple(idx.shape)}")

    def _check_shape(self, name: str, idx: Tensor) -> None:
        self._check_tokens(name, idx)
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
        seed gives the same tokens, whatever else is in the batch, and equal prompts differ. With
        fast=True keys and values are cached: a token costs one token's work. Beyond block_size the
        model sees the last block_size tokens, and as positions are absolute, each costs a run over
        them all. generation.tokens takes prompts of different lengths, and stops.
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
        from . import generation  # not above: it builds on the model

        self._check_tokens("idx", idx)
        if idx.shape[1] == 0:
            raise ValueError(f"idx must have shape (B, T) with T >= 1, got {tuple(idx.shape)}")
        sampling = generation.Sampling(temperature, top_k, top_p)
        prompts = idx.tolist()
        return (
            token[:, None]
            for token in generation.tokens(self, prompts, max_new_tokens, sampling, seed=seed)
        )

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, fast: bool = False, dropout: float | None = 0.0
    ) -> "Model":
        """The model of a folder in Hugging Face's format, a run's folder, nanoGPT's ckpt.pt or
        llm.c's model.bin; or a published one: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2
        (through huggingface_hub; a folder so called is `./gpt2`). gpt2.load gives its tokenizer.

        In eval mode, in PyTorch's default dtype, on the CPU. dropout is the new model's, for
        training; None takes the file's, of which config.json must have one. Raises InputError,
        naming file, key and value, for a configuration that this model does not compute, and
        unless the weights are exactly its own: before memory is taken for them.
        """
        from . import loading  # not above: it builds on the model

        return loading.model(name_or_path, fast=fast, dropout=dropout)

    def save_pretrained(
        self, folder: str | Path, *, tokenizer=None, max_shard_size: int | str = "50GB"
    ) -> None:
        """Writes config.json and model.safetensors, as transformers' GPT2LMHeadModel loads them;
        and a tokenizer (tokenizer.Tokenizer), if given, as AutoTokenizer loads it.

        Weights beyond max_shard_size (bytes, or such as "5GB") go into several files and an index.
        Each file appears whole; those of a model that lay there before are replaced. Raises
        InputError, with nothing written, for a tokenizer with more ids than the model.
        """
        from . import interop

        interop.save(self, folder, tokenizer=tokenizer, max_shard_size=max_shard_size)

    def num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters, shared ones once; position embeddings count if asked for."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() * non_embedding

    def flops_per_token(self, T: int) -> int:
        """Of one training step, forward and backward: 6 N + 12 L C T (Chowdhery et al., PaLM)."""
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T
