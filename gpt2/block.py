"""A block of GPT-2: attention and the MLP, each after a norm and before an addition.

B batch   T time   C features
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .config import Config
from .kernels import block as whole
from .kernels import reference
from .layers import add_norm, is_stock, own, project, project_gelu, stock_parameters


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, h: Tensor, ops, attend=None) -> Tensor:
        qkv = project(self.c_attn, h, ops)  # (B, T, 3C)
        if attend is not None:  # attention over cached keys and values
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

    The last addition is fused with the next block's norm, so a block passes on x, the pending
    addition, beside the stream s.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, s: Tensor | None, ops, attend=None) -> tuple[Tensor, Tensor]:
        if ops is kernels and attend is None and (both := self._as_a_whole(x, s)):
            return both
        h, s = add_norm(self.ln_1, x, s, ops)
        h, s = add_norm(self.ln_2, self.attn(h, ops, attend), s, ops)
        return self.mlp(h, ops), s

    def _as_a_whole(self, x: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """forward by one autograd function, in training without dropout; None if something needs
        the single ops: a layer that was replaced or has hooks, torch.compile, torch.func, a mode
        that watches operators, or a dtype or machine without kernels."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return None
        if reference.is_transformed() or type(x) is not Tensor:
            return None
        modules = self._modules  # nn.Module finds an attribute only after a search elsewhere
        attn, mlp = modules["attn"], modules["mlp"]
        if self.training and (attn.dropout or mlp.dropout):
            return None
        if not (is_stock(attn, Attention) and is_stock(mlp, MLP)):
            return None
        ln_1, ln_2 = modules["ln_1"], modules["ln_2"]
        attn_layers, mlp_layers = attn._modules, mlp._modules
        parameters = stock_parameters(
            (ln_1, nn.LayerNorm),
            (attn_layers["c_attn"], nn.Linear),
            (attn_layers["c_proj"], nn.Linear),
            (ln_2, nn.LayerNorm),
            (mlp_layers["c_fc"], nn.Linear),
            (mlp_layers["c_proj"], nn.Linear),
        )
        if parameters is None:
            return None
        return whole.block(x, s, attn.n_head, ln_1.eps, ln_2.eps, *parameters)
