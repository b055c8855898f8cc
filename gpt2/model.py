"""GPT-2. One model for the kernels and for plain PyTorch.

Every operation that has a kernel is called through `ops`: gpt2.kernels with fast=True, and
gpt2.kernels.reference with fast=False. Parameters, state dict and code are the same.

    B batch   T time   H heads   D head size   C = H * D features   V vocabulary
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .block import MLP, Attention, Block
from .config import Config
from .kernels import reference
from .kernels.checks import check_ids
from .kernels.ids import guard, poison
from .layers import Int8Linear, add_norm, first_rows, is_stock, project

IGNORED = -1  # a target without a loss, as in nanoGPT; -100, as in PyTorch, becomes -1


class Model(nn.Module):
    """GPT-2 (Radford et al., 2019) with the state-dict names of the published checkpoints.

    fast may be switched at any time. With fast=True an op without a kernel for this machine falls
    back to plain PyTorch, with one warning.
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
        """Normal with std 0.02; 0.02 / sqrt(2 n_layer) for the projections into the stream."""
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

        loss is None without targets. With targets (B, T), int64, it is the mean cross-entropy in
        nats over targets other than -1 and -100; if there are none, it is NaN, with gradients of 0.

        logits (B, T, V) are None if return_logits is False, or if it is None while training with
        targets: the loss is then computed without storing B T V numbers. Raises ValueError if T
        exceeds block_size, or if an id lies outside the vocabulary. On a GPU such an id makes the
        result NaN, and a later call raises the error, because a call does not wait for the GPU.
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
        valid = None
        if not self.fast:  # the kernels check targets themselves
            targets = check_ids("targets", targets, self.config.vocab_size, IGNORED)
            targets, valid = guard(targets, self.config.vocab_size, IGNORED)
        if return_logits is None:
            return_logits = not self.training
        head = self.lm_head
        if not return_logits and is_stock(head, nn.Linear) and head.bias is None:
            return None, poison(ops.linear_cross_entropy(h, head.weight, targets, IGNORED), valid)
        logits = self.logits_of(h)  # (B, T, V)
        loss = poison(ops.cross_entropy(logits, targets, IGNORED), valid)
        return (logits if return_logits else None), loss

    def hidden(self, idx: Tensor, past=None) -> Tensor:
        """The input of the head for idx (B, T), int64: (B, T, C).

        past is a Prefill or Decode (generate/kv_cache.py): idx follows its tokens, and dropout is
        off.
        """
        ops = self._ops()
        idx = check_ids("idx", idx, self.config.vocab_size)
        # The tokens of past come from the sampler and from prompts that were checked on the CPU.
        idx, valid = guard(idx, self.config.vocab_size) if past is None else (idx, None)
        wte, wpe, blocks, ln_f = (self.transformer[name] for name in ("wte", "wpe", "h", "ln_f"))
        places = wpe(past.positions) if past else first_rows(wpe, idx.shape[1], idx.device)
        x = wte(idx) + poison(places, valid)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
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

        temperature 0 is greedy; top_k and top_p restrict the choice to the likeliest tokens. The
        same seed gives the same tokens, whatever else is in the batch; equal prompts get different
        tokens.

        With fast=True keys and values are cached, so a step computes only the new token. Beyond
        block_size the model sees the last block_size tokens. Positions are absolute, so each token
        then costs a forward over all of them. gpt2.generate.decoding.tokens takes prompts of
        different lengths, and can stop early.
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
        """Yields the tokens of generate one step at a time, (B, 1) each."""
        from .generate import decoding

        self._check_tokens("idx", idx)
        if idx.shape[1] == 0:
            raise ValueError(f"idx must have shape (B, T) with T >= 1, got {tuple(idx.shape)}")
        sampling = decoding.Sampling(temperature, top_k, top_p)
        prompts = idx.tolist()
        return (
            token[:, None]
            for token in decoding.tokens(self, prompts, max_new_tokens, sampling, seed=seed)
        )

    def is_stock(self) -> bool:
        """Whether no layer was replaced or has hooks, so that the parameters define the result."""
        norms, linears = [self.transformer["ln_f"]], []
        for block in self.transformer["h"]:
            parts = zip((block, block.attn, block.mlp), (Block, Attention, MLP), strict=True)
            if not all(is_stock(part, kind) for part, kind in parts):
                return False
            norms += block.ln_1, block.ln_2
            linears += block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
        return all(is_stock(norm, nn.LayerNorm) for norm in norms) and all(
            is_stock(layer, nn.Linear, Int8Linear) for layer in linears
        )

    @classmethod
    def from_state(
        cls,
        config: Config,
        state: dict[str, Tensor],
        *,
        fast: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "Model":
        """A model in eval mode with a copy of these weights (names: checkpoints/weights.py), in
        PyTorch's default dtype unless dtype is given."""
        with torch.device("meta"):  # shapes without memory
            model = cls(config, fast=fast)
        dtype = dtype or torch.get_default_dtype()
        names = [name for name, _ in model.named_parameters()]
        copies = {name: state[name].to(dtype, copy=True).contiguous() for name in names}
        copies["lm_head.weight"] = copies["transformer.wte.weight"]
        model.load_state_dict(copies, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def to_state(self) -> dict[str, Tensor]:
        """The weights by name, the tied one once, on the CPU. CPU weights share the model's memory.

        Raises InputError if the weights are int8, which no file format here supports.
        """
        from .checkpoints import weights

        return weights.complete(self.config, dict(self.named_parameters()))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, fast: bool = False, dropout: float | None = 0.0
    ) -> "Model":
        """A model from a folder in Hugging Face's format, a run's folder, nanoGPT's ckpt.pt or
        llm.c's model.bin; or a published one: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2
        (through huggingface_hub; a local folder of that name is `./gpt2`). gpt2.load also returns
        the tokenizer.

        The model is in eval mode, in PyTorch's default dtype, on the CPU. dropout is for training;
        None takes the file's rate. Raises InputError, naming file, key and value, for a
        configuration that this model cannot compute, and if the weights are not exactly those of
        the configuration. Both are checked before memory is allocated for weights.
        """
        from .checkpoints import convert, nanogpt

        found = convert.read(name_or_path, dropout=dropout)
        nanogpt.say(found)
        config = found.config if dropout is None else replace(found.config, dropout=dropout)
        return cls.from_state(config, found.state(), fast=fast)

    def save_pretrained(
        self, folder: str | Path, *, tokenizer=None, max_shard_size: int | str = "50GB"
    ) -> None:
        """Writes config.json and model.safetensors for transformers' GPT2LMHeadModel. With
        tokenizer (a gpt2.data.tokenizer.Tokenizer), also writes its files for AutoTokenizer.

        Weights larger than max_shard_size (bytes, or text such as "5GB") are split into several
        files with an index. Each file is written atomically and replaces that of an earlier model.
        Raises InputError, with nothing written, if the tokenizer has more ids than the model.
        """
        from .checkpoints import huggingface

        huggingface.write(
            self.config, self.to_state(), folder, tokenizer=tokenizer, max_shard_size=max_shard_size
        )

    def num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters. Shared ones count once; position embeddings count only with
        non_embedding=False."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() * non_embedding

    def flops_per_token(self, T: int) -> int:
        """FLOPs of a training step, forward and backward: 6 N + 12 L C T (Chowdhery et al.,
        PaLM)."""
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T
