"""Weights as int8, for sampling: a byte each in place of two or four.

A token of one sequence takes the time of reading the weights, so that this is what it saves. Each
row of a linear weight is kept as int8 numbers and one scale (kernels.quantize_int8); activations
are never int8. Embeddings, norms and biases stay as they are: of the table of embeddings a token
reads one row, while the head, which shares it, gets int8 numbers of its own.
"""

from collections.abc import Sequence

from . import evaluate
from .evaluate import Perplexity
from .layers import Int8Linear
from .model import Model


def quantize_int8(model: Model) -> Model:
    """The model itself, its linear layers replaced by Int8Linear: for inference, not to be saved.

    Raises TypeError and ValueError for what is not a Model, or one that is int8 already, and
    ValueError where a weight is not finite.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must be a Model, got {type(model).__name__}")
    if isinstance(model.lm_head, Int8Linear):
        raise ValueError("model must have floating weights, got int8 ones: it is quantized already")
    for block in model.transformer["h"]:
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"),
                           (block.mlp, "c_fc"), (block.mlp, "c_proj")):  # fmt: skip
            setattr(part, name, Int8Linear(getattr(part, name)))
    model.lm_head = Int8Linear(model.lm_head)
    return model.requires_grad_(False)


def measured(model: Model, ids: Sequence[int]) -> tuple[Perplexity, Perplexity]:
    """Quantises the model; how well it predicts ids (2 or more) before, and after."""
    before = evaluate.perplexity(model, ids)
    quantize_int8(model)
    return before, evaluate.perplexity(model, ids)
