"""Bugs to plant in transformers' GPT-2 on our kernels."""

from . import Mutant
from .kernels import AUTOGRAD

ATTENTION = "gpt2/transformers_attention.py"
MODEL = "gpt2/transformers_model.py"
INTEROP = "gpt2/interop.py"
GENERATES = "test_transformers.py::test_generates_what_they_do"
EQUALS = "test_transformers.py::test_equals_theirs"
SPANS = "test_transformers_masks.py::test_attention_over_spans"
OTHER_MASKS = "test_transformers_masks.py::test_other_masks_are_left_to_sdpa_and_it_is_said"
REFUSED = "test_transformers_swap.py::test_a_model_that_is_not_gpt_2_is_refused_as_it_is"
BACK = "test_transformers_swap.py::test_there_and_back"

TRANSFORMERS_MUTANTS = [
    # the mask function
    Mutant(
        "padding dropped", ATTENTION,
        "(padding is None or _true(padding[:, kv_offset:].all()))", "True",
        f"{EQUALS}[gpt2_kernels-left]", quick=True,
    ),
    Mutant(
        "no mask function", ATTENTION,
        "    AttentionMaskInterface.register(NAME, mask)\n", "",
        f"{GENERATES}[gpt2_kernels-left]",
    ),
    Mutant(
        "the empty end of a static cache seen", ATTENTION,
        "aligned = q_offset + q_length == kv_offset + kv_length", "aligned = True",
        "test_transformers.py::test_more_tokens_after_a_cache[gpt2_kernels-none-static]",
    ),
    Mutant(
        "packed sequences see each other", ATTENTION,
        "if allow_is_causal_skip and mask_function is causal_mask_function:", "if True:",
        f"{OTHER_MASKS}[gpt2_kernels-packed]",
    ),
    Mutant(
        "padding on the right sees", ATTENTION,
        "        found = found & padding[:, None, own, None]  # padding sees nothing\n", "",
        f"{EQUALS}[gpt2_kernels-right]",
    ),
    Mutant(
        "padding in another place", ATTENTION,
        "own = torch.arange(q_length, device=padding.device) + q_offset",
        "own = torch.arange(q_length, device=padding.device)",
        f"{GENERATES}[gpt2_kernels-static-left]",
    ),
    Mutant(
        "cross-attention without its mask", ATTENTION,
        "allow_is_bidirectional_skip=False,\n        **kwargs,\n    )\n",
        "allow_is_bidirectional_skip=allow_is_bidirectional_skip,\n        **kwargs,\n    )\n"
        "    if found is None:\n        return None\n",
        "test_transformers_masks.py::test_a_mask_is_spelled_out_where_it_is_not_causal",
    ),
    Mutant(
        "spans read in every layer", ATTENTION,
        "        setattr(found, _SPANS, spans_of(found))  # for every layer\n", "        pass\n",
        "test_transformers_masks.py::test_spans_are_read_once_per_forward",
    ),
    # spans
    Mutant(
        "any mask one of spans", ATTENTION,
        "if not torch.equal(seen, expected):", "if False:",
        "test_transformers_masks.py::test_a_mask_is_one_of_spans_or_is_not[2-2]",
    ),
    Mutant(
        "the offset of the last query", ATTENTION,
        "masked_fill(counts == 0, 0).max().clamp(0, Tk - Tq)",
        "masked_fill(counts == 0, 0).max() * 0 + (Tk - Tq)",
        "test_transformers_masks.py::test_a_mask_is_one_of_spans_or_is_not[2-4]",
    ),
    Mutant(
        "keys from the first on", ATTENTION,
        "(starts[..., None] <= j) & (j <= own[..., None])", "(j <= own[..., None])",
        "test_transformers_masks.py::test_a_mask_is_one_of_spans_or_is_not[3-3]",
    ),
    Mutant(
        "one start for all", ATTENTION,
        "itertools.groupby(self.starts)", "[(self.starts[0], self.starts)]",
        f"{SPANS}[left-False]",
    ),
    Mutant(
        "keys before a sequence", ATTENTION,
        "k[run, start:last], v[run, start:last]", "k[run, :last], v[run, :last]",
        f"{SPANS}[left-True]",
    ),
    Mutant(
        "keys beyond the last query", ATTENTION,
        "k[run, start:last], v[run, start:last]", "k[run, start:], v[run, start:]",
        f"{SPANS}[static-False]",
    ),
    Mutant(
        "queries not shifted back", ATTENTION,
        "(0, 0, 0, 0, padding, 0)", "(0, 0, 0, 0, 0, padding)",
        f"{SPANS}[left-and-past-True]",
    ),
    Mutant(
        "padding on the right not zero", ATTENTION,
        "if min(spans.ends) == last:", "if True:",
        f"{SPANS}[right-False]",
    ),
    Mutant(
        "the first token of padding", ATTENTION,
        ">= ends  # (B, Tq)", "> ends  # (B, Tq)",
        f"{SPANS}[right-False]",
    ),
    # attention
    Mutant(
        "the usual scale", ATTENTION,
        "attend = functools.partial(_attend, scale=scaling,",
        "attend = functools.partial(_attend, scale=None,",
        "test_transformers.py::test_its_configuration_is_the_one_computed"
        "[scale_attn_by_inverse_layer_idx]",
    ),
    Mutant(
        "the usual scale in decoding", ATTENTION,
        "kernels.decode_attention(q, k, v, lengths, softmax_scale=scale)",
        "kernels.decode_attention(q, k, v, lengths)",
        f"{SPANS}[decode-False]",
    ),
    Mutant(
        "no dropout", ATTENTION,
        "softmax_scale=scale, dropout_p=dropout)", "softmax_scale=scale)",
        "test_transformers.py::test_dropout_is_attention_s_own[left]",
    ),
    Mutant(
        "decoding without its gradient", ATTENTION,
        "dropout == 0.0 and not needs_gradient", "dropout == 0.0",
        f"{SPANS}[decode-True]",
    ),
    Mutant(
        "every attention causal", ATTENTION,
        "    if not causal:\n", "    if False:\n",
        "test_transformers_masks.py::test_cross_attention_is_left_to_sdpa",
    ),
    Mutant(
        "no mask, aligned as SDPA does", ATTENTION,
        "attention_mask = _aligned(query, key)", "pass",
        "test_transformers_masks.py::test_other_models_are_right[grouped]",
    ),
    Mutant(
        "one mask for all not read", ATTENTION,
        "if mask.shape != shape and mask.dim() == 4:", "if False:",
        "test_transformers_masks.py::test_a_causal_mask_of_four_dimensions_is_the_kernels_own"
        "[one-for-all-causal]",
    ),
    Mutant(
        "a silent fallback", ATTENTION,
        "        _say_once(reason)\n", "",
        f"{OTHER_MASKS}[gpt2_kernels-hole]",
    ),
    Mutant(
        "the fallback without its mask", ATTENTION,
        "        if attention_mask is None and causal:\n", "        if causal:\n",
        f"{OTHER_MASKS}[gpt2_kernels-hole]",
    ),
    Mutant(
        "no probabilities, and no word", ATTENTION,
        'if "attentions" in (', 'if "attention" in (',
        "test_transformers_swap.py::test_what_the_kernels_never_hold_is_refused",
    ),
    Mutant(
        "a head_mask ignored", ATTENTION,
        'if kwargs.get("head_mask") is not None:', "if False:",
        "test_transformers_swap.py::test_what_the_kernels_never_hold_is_refused",
    ),
    Mutant(
        "a mask looked at while it is traced", ATTENTION,
        '        return None, "a mask that torch.compile cannot look at"\n', "        pass\n",
        "test_transformers_swap.py::test_compiled[left]",
    ),
    # the model
    Mutant(
        "GELU not swapped", MODEL,
        ', ("mlp.act", block.mlp.act)', "",
        "test_transformers.py::test_all_of_it_is_computed_by_kernels",
    ),
    Mutant(
        "the last norm not swapped", MODEL,
        '    yield "transformer.ln_f", model.transformer.ln_f\n', "",
        "test_transformers.py::test_all_of_it_is_computed_by_kernels",
    ),
    Mutant(
        "the usual epsilon", MODEL,
        "self.weight, self.bias, self.eps)", "self.weight, self.bias)",
        "test_transformers.py::test_its_configuration_is_the_one_computed[layer_norm_epsilon]",
    ),
    Mutant(
        "labels not shifted", MODEL,
        "value=ignore_index)[..., 1:]", "value=ignore_index)[..., :-1]",
        f"{EQUALS}[accelerated-none]",
    ),
    Mutant(
        "shifted labels shifted again", MODEL,
        "    if shift_labels is None:\n", "    if labels is not None:\n",
        "test_transformers.py::test_loss[some-True-mean]",
    ),
    Mutant(
        "the number of items ignored", MODEL,
        "    if num_items_in_batch is None:\n", "    if True:\n",
        "test_transformers.py::test_the_number_of_items_reaches_the_loss",
    ),
    Mutant(
        "a sum that is a mean", AUTOGRAD,
        'if reduction == "sum":', 'if reduction == "total":',
        "test_cross_entropy.py::test_reductions_and_smoothing"
        "[cpu-avx2-cross_entropy-V17-fp32-sum-0.0]",
    ),
    Mutant(
        "another activation taken for GELU", MODEL,
        "(NewGELUActivation, GELUTanh)\n", "(NewGELUActivation, GELUTanh, nn.GELU)\n",
        f"{REFUSED}[activation]",
    ),
    Mutant(
        "a loss of one's own lost", MODEL,
        "if loss not in (None,", "if False and loss not in (None,",
        f"{REFUSED}[loss]",
    ),
    Mutant(
        "checked as it is changed", MODEL,
        "    _check(model)\n    transformers_attention.register()\n",
        "    model.gpt2_kernels_before = Before('eager', None)\n    _check(model)\n",
        f"{REFUSED}[norm]",
    ),
    Mutant(
        "the second time forgets the first", MODEL,
        "    if not hasattr(model, _BEFORE):\n", "    if True:\n",
        BACK,
    ),
    Mutant(
        "norms stay swapped", MODEL,
        "module.__class__ = _PLAIN.get(type(module), type(module))", "pass",
        BACK,
    ),
    Mutant(
        "a trace is left behind", MODEL,
        "    delattr(model, _BEFORE)\n", "",
        BACK,
    ),
    Mutant(
        "what was chosen since is lost", MODEL,
        "    if model.config._attn_implementation == transformers_attention.NAME:\n",
        "    if True:\n",
        "test_transformers_swap.py::test_what_was_chosen_before_comes_back",
    ),
    Mutant(
        "a pickle without its attention", MODEL,
        "        transformers_attention.register()\n        super()", "        super()",
        "test_transformers_swap.py::test_a_pickle_is_read_where_nothing_was_registered",
    ),
    Mutant(
        "a new parameter for the old", MODEL,
        "        module.__class__ = _FAST.get(type(module), type(module))\n",
        "        module.__class__ = _FAST.get(type(module), type(module))\n"
        "        if isinstance(module, nn.LayerNorm):\n"
        "            module.weight = nn.Parameter(module.weight.detach().clone())\n",
        BACK,
    ),
    Mutant(
        "transformers of any age", INTEROP,
        'if "q_offset" not in', 'if "kv_length" in',
        "test_transformers_swap.py::test_without_transformers_one_line_says_how_to_get_it[register]",
    ),
]  # fmt: skip
