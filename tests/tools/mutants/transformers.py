"""Bugs to plant in transformers' GPT-2 on our kernels."""

from . import Mutant

ATTENTION = "gpt2/interop/transformers_attention.py"
MODEL = "gpt2/interop/transformers_model.py"
EQUALS = "interop/test_transformers.py::test_equals_theirs"
OTHER_MASKS = "interop/test_transformers_masks.py::test_other_masks_are_left_to_sdpa_and_it_is_said"
BACK = "interop/test_transformers_swap.py::test_there_and_back"

TRANSFORMERS_MUTANTS = [
    # the mask function
    Mutant(
        "padding dropped", ATTENTION,
        "(padding is None or _true(padding[:, kv_offset:].all()))", "True",
        f"{EQUALS}[gpt2_kernels-left]", quick=True,
    ),
    Mutant(
        "packed sequences see each other", ATTENTION,
        "if allow_is_causal_skip and mask_function is causal_mask_function:", "if True:",
        f"{OTHER_MASKS}[gpt2_kernels-packed]",
    ),
    # spans
    Mutant(
        "the offset of the last query", ATTENTION,
        "masked_fill(counts == 0, 0).max().clamp(0, Tk - Tq)",
        "masked_fill(counts == 0, 0).max() * 0 + (Tk - Tq)",
        "interop/test_transformers_masks.py::test_a_mask_is_one_of_spans_or_is_not[2-4]",
    ),
    # attention
    Mutant(
        "the usual scale", ATTENTION,
        "attend = functools.partial(_attend, scale=scaling,",
        "attend = functools.partial(_attend, scale=None,",
        "interop/test_transformers.py::test_its_configuration_is_the_one_computed"
        "[scale_attn_by_inverse_layer_idx]",
    ),
    Mutant(
        "a silent fallback", ATTENTION,
        "        _say_once(reason)\n", "",
        f"{OTHER_MASKS}[gpt2_kernels-hole]",
    ),
    # the model
    Mutant(
        "shifted labels shifted again", MODEL,
        "    if shift_labels is None:\n", "    if labels is not None:\n",
        "interop/test_transformers.py::test_loss[some-True-mean]",
    ),
    Mutant(
        "a trace is left behind", MODEL,
        "    delattr(model, _BEFORE)\n", "",
        BACK,
    ),
]  # fmt: skip
