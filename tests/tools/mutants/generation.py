"""Bugs to plant in generation: choosing tokens, the cache, int8 weights, and turning prompts into
text. Bugs in the C++ of decoding are in csrc_linear.py.

Not in the list: the CUDA graph of a step, which only runs on a GPU.
"""

from . import Mutant

GENERATION = "gpt2/generate/decoding.py"
PICKING = "gpt2/generate/sampling.py"
CACHE = "gpt2/generate/kv_cache.py"
QUANTIZE = "gpt2/generate/quantize.py"
MODULES = "gpt2/layers.py"
SAMPLING = "gpt2/generate/completion.py"
LOADING = "gpt2/loading.py"
LINEAR = "kernels/linear.py"
LAYERS = "gpt2/generate/decode_layers.py"

LOGITS = "generate/test_decoding.py::test_logits_equal_the_full_forward_s[reference-{}]"
COUNTED = "generate/test_decoding.py::test_past_tokens_are_computed_once"
ROWS = "generate/test_decoding.py::test_rows_that_have_ended_grow_no_more"
CUTS = "generate/test_stops_and_seeds.py::test_sampling_cuts"
BLOCKS = (
    "generate/test_decoding.py::"
    "test_all_blocks_as_one_call_have_the_bits_of_the_blocks[cpu-avx2-{}]"
)
STOPS = "generate/test_completion.py::test_a_text_ends_before_a_stop_string[{}]"
BATCHES = "generate/test_completion.py::test_a_text_is_the_same_in_every_batch[False]"
NAMED = "generate/test_stops_and_seeds.py::test_bad_sampling_arguments_are_named[kwargs{}]"

GENERATION_MUTANTS = [
    # what is chosen
    Mutant(
        "the token that brings the sum to p left out", PICKING,
        "total - probs >= self.top_p", "total >= self.top_p",
        CUTS, quick=True,
    ),
    Mutant(
        "NaN has a probability", PICKING,
        "return token.masked_fill_(largest - largest != 0, NO_TOKEN)[:, 0]", "return token[:, 0]",
        "generate/test_sampling.py::test_logits_that_are_not_finite_choose_no_token[top-p-torch.float32]",
    ),
    # seeds
    Mutant(
        "the same numbers again", PICKING,
        "torch.rand(self.DRAWN, generator=g) for g",
        "torch.rand(self.DRAWN, generator=g.manual_seed(g.initial_seed())) for g",
        "generate/test_stops_and_seeds.py::test_each_row_has_numbers_of_its_own",
    ),
    # rows of different lengths
    Mutant(
        "rows that have ended grow", GENERATION,
        "self.lengths + (1 if all(growing) else self.lengths.new_tensor(growing))",
        "self.lengths + 1",
        ROWS,
    ),
    # the cache
    Mutant(
        "a token beyond the room", GENERATION,
        "if cached is not None and rows.longest <= room:",
        "if cached is not None and rows.longest <= room + 1:",
        COUNTED,
    ),
    Mutant(
        "values for keys", CACHE,
        "kv[:, self.start :, 1] = k, v", "kv[:, self.start :, 1] = v, k",
        LOGITS.format(100),
    ),
    # the stream
    Mutant(
        "ids beyond the vocabulary", GENERATION,
        "for token in (min(prompt), max(prompt)):", "for token in (min(prompt),):",
        NAMED.format("11-prompts must hold ids from 0 to 64, got 65"),
    ),
    # int8 weights
    Mutant(
        "scales turned to bfloat16", MODULES,
        "        self.scale = self.scale.float()\n", "",
        "generate/test_decoding.py::test_int8_model_is_near_and_keeps_its_scales",
    ),
    Mutant(
        "the cost measured on int8 alone", QUANTIZE,
        "    before = scoring.perplexity(model, ids)\n    quantize_int8(model)\n",
        "    quantize_int8(model)\n    before = scoring.perplexity(model, ids)\n",
        "generate/test_quantize.py::test_cost_of_int8_is_that_of_the_model_itself",
    ),
    Mutant(
        "rounded towards zero", LINEAR,
        "(weight / scale[:, None]).round()", "(weight / scale[:, None])",
        "kernels/test_linear_few_rows.py::test_each_weight_is_the_nearest_multiple_of_its_scale",
    ),
    # who serves a few rows
    Mutant(
        "some layers int8 and others not", LAYERS,
        "if len(self.scales) not in (0, 4 * len(layers)):", "if False:",
        "generate/test_decoding.py::test_what_is_not_a_gpt_2_is_named",
    ),
    Mutant(
        "another eps", LAYERS,
        "eps=ln_f.eps)", "eps=2 * ln_f.eps)",
        BLOCKS.format("fp32-whole"),
    ),
    # texts
    Mutant(
        "one character is not held back", SAMPLING,
        "range(longest, 0, -1)", "range(longest, 1, -1)",
        STOPS.format("over tokens"), quick=True,
    ),
    Mutant(
        "every batch's seeds the first's", SAMPLING,
        "sampling, seeds[part], speed", "sampling, seeds[: len(texts)], speed",
        BATCHES,
    ),
    # prompts and models
    Mutant(
        "ids of padding", LOADING,
        "weights.crop(found.config, found.state(), vocab_size=reads.vocab_size)",
        "(found.config, found.state())",
        "model/test_loading.py::test_ids_beyond_the_tokenizer_are_never_sampled",
    ),
    Mutant(
        "an alphabet in another order", "gpt2/data/nanogpt_meta.py",
        "    return alphabet\n", "    return sorted(alphabet)\n",
        "data/test_nanogpt_data.py::test_the_alphabet_of_meta_pkl_reads_the_shards",
    ),
]  # fmt: skip
