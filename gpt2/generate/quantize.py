"""int8 weights for sampling: one byte per weight instead of two or four.

With one sequence, a token takes as long as reading the weights, so smaller weights are faster.
Each row of a linear weight is stored as int8 with one scale (kernels.quantize_int8). Activations,
embeddings, norms and biases are not quantized. The head is no longer tied: it gets int8 weights
of its own, while the embedding, from which a token reads one row, keeps its dtype.
"""

from collections.abc import Sequence

from ..evaluate import scoring
from ..evaluate.scoring import Perplexity
from ..layers import Int8Linear
from ..model import Model


def quantize_int8(model: Model) -> Model:
    """Replaces the linear layers of model by Int8Linear, in place, and returns model. It can then
    be used for inference only, and not be saved.

    Raises TypeError if model is not a Model, and ValueError if it is int8 already or a weight is
    not finite.
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
    """Quantizes model in place. Returns its perplexity on ids (2 or more) before and after."""
    before = scoring.perplexity(model, ids)
    quantize_int8(model)
    return before, scoring.perplexity(model, ids)
