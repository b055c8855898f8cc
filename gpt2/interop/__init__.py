"""Runs transformers' models on these kernels: their attention only, or a whole GPT-2.

transformers is imported only when a function needs it. lm_eval.py makes our models available to
EleutherAI's lm-evaluation-harness.
"""

import inspect

from ..errors import InputError, brief


def register_attention() -> None:
    """Registers our causal attention with transformers as attn_implementation="gpt2_kernels".

    It works for models that transformers can run with SDPA and whose keys have as many heads as
    their queries: GPT-2, GPT-NeoX, OPT, Phi, Qwen2 or Llama without grouped heads, and others. It
    supports padding on either side, dynamic and static caches, and gradients. Anything that the
    kernels do not compute (grouped heads, sliding windows, packed sequences, cross-attention, other
    masks) is left to PyTorch, with a warning once. A model without SDPA, output_attentions and
    head_mask raise InputError.

    May be called again. Raises InputError if transformers is not installed or too old.
    """
    _need_transformers()
    from . import transformers_attention

    transformers_attention.register()


def accelerate_transformers(model):
    """Switches a GPT2LMHeadModel of transformers to the kernels, in place, and returns it.

    The kernels compute its attention, norms, GELU and loss; its parameters stay the same objects.
    Raises InputError, naming the part and changing nothing, if the model has parts that are not
    GPT-2's.
    """
    _need_transformers()
    from . import transformers_model

    return transformers_model.accelerate(model)


def restore_transformers(model):
    """Undoes accelerate_transformers, and returns the model. Does nothing to other models."""
    _need_transformers()
    from . import transformers_model

    return transformers_model.restore(model)


def _need_transformers() -> None:
    try:
        import transformers
        from transformers.masking_utils import sdpa_mask
    except ImportError as e:
        raise InputError(
            f"this needs transformers 5.4 or newer: pip install -U transformers ({brief(e)})"
        ) from e
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise InputError(
            f"transformers must be 5.4 or newer, got {transformers.__version__}: "
            "pip install -U transformers"
        )
