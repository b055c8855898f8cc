"""Switches transformers' GPT2LMHeadModel to our kernels, and back: attention, norms, GELU, loss.

Each module stays the same object, with its parameters, hooks and name. Only its class is replaced
by a subclass that calls a kernel. Attention is set as an attn_implementation, and the loss as the
model's loss_function. So state dicts, Trainer, generate, PEFT, gradient checkpointing, copies and
pickles keep working.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from .. import kernels
from ..errors import InputError, brief
from . import transformers_attention

_BEFORE = "gpt2_kernels_before"  # attribute of the model that holds its original settings


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def __setstate__(self, state):
        """Registers the attention: a pickled model needs it in a process that has not done so."""
        transformers_attention.register()
        super().__setstate__(state)


class NewGelu(NewGELUActivation):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.gelu(x)


class TanhGelu(GELUTanh):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.gelu(x)


_FAST = {nn.LayerNorm: LayerNorm, NewGELUActivation: NewGelu, GELUTanh: TanhGelu}
_PLAIN = {fast: plain for plain, fast in _FAST.items()}


def causal_lm_loss(
    logits: Tensor,  # (B, T, V)
    labels: Tensor | None,  # (B, T) int64
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,  # (B, T), in place of labels
    **kwargs,
) -> Tensor:
    """transformers' ForCausalLMLoss: each position predicts the next label. The mean over labels
    that are not ignore_index, or their sum / num_items_in_batch if that is given."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten().to(logits.device)
    rows = logits.view(-1, vocab_size)
    if num_items_in_batch is None:
        return kernels.cross_entropy(rows, targets, ignore_index)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return kernels.cross_entropy(rows, targets, ignore_index, reduction="sum") / num_items_in_batch


class Before(NamedTuple):
    """The settings that restore puts back."""

    attention: str
    loss: Callable | None  # None: transformers' default


def accelerate(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Implements interop.accelerate_transformers."""
    _check(model)
    transformers_attention.register()
    if not hasattr(model, _BEFORE):
        loss = model.__dict__.get("_loss_function")
        setattr(model, _BEFORE, Before(model.config._attn_implementation, loss))
    for _, module in _swapped(model):
        module.__class__ = _FAST.get(type(module), type(module))
    model.set_attn_implementation(transformers_attention.NAME)
    model.loss_function = causal_lm_loss
    return model


def restore(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Implements interop.restore_transformers."""
    before = getattr(model, _BEFORE, None)
    if before is None:
        return model
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
    if model.config._attn_implementation == transformers_attention.NAME:
        model.set_attn_implementation(before.attention)
    if model.__dict__.get("_loss_function") is causal_lm_loss:
        del model._loss_function
        if before.loss is not None:
            model.loss_function = before.loss
    delattr(model, _BEFORE)
    return model


def _swapped(model: GPT2LMHeadModel) -> Iterator[tuple[str, nn.Module]]:
    """The norms and activations, by name."""
    for i, block in enumerate(model.transformer.h):
        for name, module in (
            ("ln_1", block.ln_1), ("ln_2", block.ln_2), ("mlp.act", block.mlp.act)
        ):  # fmt: skip
            yield f"transformer.h.{i}.{name}", module
    yield "transformer.ln_f", model.transformer.ln_f


def _check(model: GPT2LMHeadModel) -> None:
    """Raises InputError, naming the part, unless model is a plain GPT-2."""
    if not isinstance(model, GPT2LMHeadModel):
        raise InputError(f"model must be a GPT2LMHeadModel, got {type(model).__name__}")
    if model.config.add_cross_attention or not getattr(model.config, "is_causal", True):
        raise InputError("model must be causal and without cross-attention, by its configuration")
    for i, block in enumerate(model.transformer.h):
        _check_type(f"transformer.h.{i}.attn", block.attn, (GPT2Attention,))
    for name, module in _swapped(model):
        supported = (nn.LayerNorm,) if ".ln_" in name else (NewGELUActivation, GELUTanh)
        _check_type(name, module, (*supported, *(_FAST[plain] for plain in supported)))
        if isinstance(module, nn.LayerNorm) and (module.bias is None or module.weight.dim() != 1):
            raise InputError(f"{name} must have a weight and a bias of one dimension")
    loss = model.__dict__.get("_loss_function") or model.loss_type  # the property warns for None
    if loss not in (None, "ForCausalLM", ForCausalLMLoss, causal_lm_loss):
        raise InputError(f"loss_function must be ForCausalLMLoss, got {brief(loss)}")


def _check_type(name: str, module: nn.Module, supported: tuple[type, ...]) -> None:
    if type(module) not in supported:
        names = " or ".join(t.__name__ for t in supported if t not in _PLAIN)
        raise InputError(f"{name} must be {names}, got {type(module).__name__}")
