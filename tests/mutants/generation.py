"""Bugs to plant in what chooses the next tokens, its cache and its int8 weights; those of the C++
that decodes are in csrc_gemv.py.

Not in the list: what only a GPU runs, the CUDA graph of a step.
"""

from . import Mutant

GENERATION = "gpt2/generation.py"
PICKING = "gpt2/picking.py"
CACHE = "gpt2/cache.py"
QUANTIZE = "gpt2/quantize.py"
MODULES = "gpt2/layers.py"
LINEAR = "kernels/linear.py"
LAYERS = "kernels/decode_layers.py"

GREEDY = "test_generation.py::test_greedy_equals_the_cacheless_reference[reference]"
LOGITS = "test_generation.py::test_logits_equal_the_full_forward_s[reference-{}]"
COUNTED = "test_generation.py::test_past_tokens_are_computed_once"
ROWS = "test_generation.py::test_rows_that_have_ended_grow_no_more"
CUTS = "test_generation.py::test_sampling_cuts"
BLOCKS = "test_generation.py::test_all_blocks_as_one_call_have_the_bits_of_the_blocks[cpu-avx2-{}]"
NAMED = "test_generation.py::test_bad_sampling_arguments_are_named[kwargs{}]"
SPEED = "test_sampling.py::test_speed_counts_steps_between_the_first_and_the_last"
OTHERS = "test_few_rows.py::test_what_else_is_not_the_kernel_s[cpu-avx2]"

GENERATION_MUTANTS = [
    # what is chosen
    Mutant(
        "a temperature that multiplies", PICKING,
        "largest) / max(self.temperature, _COLDEST)", "largest) * max(self.temperature, _COLDEST)",
        CUTS,
    ),
    Mutant(
        "more of the likeliest than there are", PICKING,
        "if self.top_k is not None and self.top_k < logits.shape[-1]:",
        "if self.top_k is not None:",
        CUTS,
    ),
    Mutant(
        "all of the likeliest in another order", PICKING,
        "self.top_k < logits.shape[-1]", "self.top_k <= logits.shape[-1]",
        CUTS,
    ),
    Mutant(
        "the token that brings the sum to p left out", PICKING,
        "total - probs >= self.top_p", "total >= self.top_p",
        CUTS, quick=True,
    ),
    Mutant(
        "a token more than p asks for", PICKING,
        "total - probs >= self.top_p", "total - probs > self.top_p",
        CUTS,
    ),
    Mutant(
        "a place for an id", PICKING,
        "choice if ids is None else ids.gather(1, choice)", "choice",
        CUTS,
    ),
    Mutant(
        "the maximum is not subtracted", PICKING,
        "(logits.double() - largest) /", "logits.double() /",
        "test_picking.py::test_the_coldest_temperatures_are_greedy[5e-324-torch.float32]",
    ),
    Mutant(
        "NaN is the likeliest", PICKING,
        "return token.masked_fill_(largest - largest != 0, NO_TOKEN)\n", "return token\n",
        "test_picking.py::test_logits_that_are_not_finite_choose_no_token[greedy-torch.float32]",
    ),
    Mutant(
        "NaN has a probability", PICKING,
        "return token.masked_fill_(largest - largest != 0, NO_TOKEN)[:, 0]", "return token[:, 0]",
        "test_picking.py::test_logits_that_are_not_finite_choose_no_token[top-p-torch.float32]",
    ),
    Mutant(
        "a step nobody looks at", GENERATION,
        "            watch.see(token, step)\n", "",
        "test_picking.py::test_generation_stops_at_the_step_that_is_not_finite[greedy-True]",
    ),
    Mutant(
        "a token of probability 0", PICKING,
        "right=True", "right=False",
        "test_generation.py::test_the_ends_of_the_unit_interval",
    ),
    # seeds
    Mutant(
        "one number for two steps", PICKING,
        "self.drawn[:, self.used - 1]", "self.drawn[:, self.used // 2]",
        "test_generation.py::test_each_row_has_numbers_of_its_own",
    ),
    Mutant(
        "the same numbers again", PICKING,
        "torch.rand(self.DRAWN, generator=g) for g",
        "torch.rand(self.DRAWN, generator=g.manual_seed(g.initial_seed())) for g",
        "test_generation.py::test_each_row_has_numbers_of_its_own",
    ),
    Mutant(
        "one generator for all rows", PICKING,
        "torch.Generator().manual_seed(seed) for seed",
        "torch.Generator().manual_seed(seeds[0]) for seed",
        "test_generation.py::test_each_row_has_numbers_of_its_own",
    ),
    Mutant(
        "a seed by the place in the batch", PICKING,
        "(seed + before[prompt]) % 2**63", "(seed + len(seeds)) % 2**63",
        "test_generation.py::test_each_row_has_numbers_of_its_own",
    ),
    Mutant(
        "the seed after the last", PICKING,
        "(seed + before[prompt]) % 2**63", "seed + before[prompt]",
        "test_generation.py::test_each_row_has_numbers_of_its_own",
    ),
    Mutant(
        "no seed is seed 0", PICKING,
        "int(torch.randint(2**62, ()))", "0",
        "test_generation.py::test_a_text_depends_on_its_prompt_and_seed_alone",
    ),
    # rows of different lengths
    Mutant(
        "padding on the left", GENERATION,
        "row[: len(prompt)] = torch", "row[-len(prompt) :] = torch",
        GREEDY,
    ),
    Mutant(
        "room for new tokens on the left", GENERATION,
        "torch.cat([self.ids, torch.zeros_like(self.ids)], dim=1)",
        "torch.cat([torch.zeros_like(self.ids), self.ids], dim=1)",
        ROWS,
    ),
    Mutant(
        "rows that have ended grow", GENERATION,
        "self.lengths + (1 if all(growing) else self.lengths.new_tensor(growing))",
        "self.lengths + 1",
        ROWS,
    ),
    Mutant(
        "the token before the last", GENERATION,
        "self.ids.gather(1, self.lengths[:, None] - 1)",
        "self.ids.gather(1, self.lengths[:, None] - 2)",
        ROWS,
    ),
    Mutant(
        "the first tokens for the last", GENERATION,
        " + (self.lengths - lengths)[:, None]\n", "\n",
        ROWS,
    ),
    Mutant(
        "logits after the padding", GENERATION,
        "h[torch.arange(len(h), device=h.device), lengths - 1]", "h[:, -1]",
        GREEDY,
    ),
    Mutant(
        "a window one token short", GENERATION,
        "rows.window(model.config.block_size)", "rows.window(model.config.block_size - 1)",
        COUNTED,
    ),
    # the cache
    Mutant(
        "no cache", GENERATION,
        "if model.fast and rows.longest <= room:", "if False:",
        COUNTED,
    ),
    Mutant(
        "a cache that is full too early", GENERATION,
        "if cached is not None and rows.longest <= room:",
        "if cached is not None and rows.longest < room:",
        COUNTED,
    ),
    Mutant(
        "a token beyond the room", GENERATION,
        "if cached is not None and rows.longest <= room:",
        "if cached is not None and rows.longest <= room + 1:",
        COUNTED,
    ),
    Mutant(
        "a cache of the weights' dtype under autocast", GENERATION,
        "if autocast else weight.dtype", "if False else weight.dtype",
        "test_generation.py::test_under_autocast_the_cache_is_of_its_dtype",
    ),
    Mutant(
        "a chunk of each sequence", GENERATION,
        "max(1, CHUNK // B)", "max(1, CHUNK)",
        "test_generation.py::test_a_prefill_has_no_more_than_chunk_tokens_at_a_time",
    ),
    Mutant(
        "every chunk at the beginning", GENERATION,
        "Prefill(self.cache, start, chunk", "Prefill(self.cache, 0, chunk",
        LOGITS.format(2),
    ),
    Mutant(
        "a sequence that has ended with a chunk", GENERATION,
        "(lengths > start)[:, None]", "(lengths >= start)[:, None]",
        LOGITS.format(1),
    ),
    Mutant(
        "the last chunk for all", GENERATION,
        "torch.where(here, last_of(h, ends), last)", "last_of(h, ends)",
        LOGITS.format(2),
    ),
    Mutant(
        "a token at the place after its own", GENERATION,
        "self.rows.last(), self.rows.lengths - 1", "self.rows.last(), self.rows.lengths",
        LOGITS.format(5),
    ),
    Mutant(
        "values for keys", CACHE,
        "kv[:, self.start :, 1] = k, v", "kv[:, self.start :, 1] = v, k",
        LOGITS.format(100),
    ),
    Mutant(
        "positions from 0 in each chunk", CACHE,
        "torch.arange(start, self.end,", "torch.arange(0, T,",
        LOGITS.format(2),
    ),
    Mutant(
        "a token does not see itself", CACHE,
        "self.seen = lengths + 1", "self.seen = lengths",
        LOGITS.format(100),
    ),
    Mutant(
        "a token sees the next place", CACHE,
        "self.seen = lengths + 1", "self.seen = lengths + 2",
        "test_generation.py::test_a_cache_reads_nothing_beyond_a_sequence[reference]",
    ),
    Mutant(
        "one layer's keys for all", CACHE,
        "kv = self.cache.kv[layer]\n", "kv = self.cache.kv[0]\n",
        LOGITS.format(100),
    ),
    Mutant(
        "one sequence's keys for all", CACHE,
        "torch.arange(len(lengths), device=lengths.device)", "torch.zeros_like(lengths)",
        LOGITS.format(100),
    ),
    # the stream
    Mutant(
        "dropout while it samples", GENERATION,
        "    model.eval()\n", "    pass\n",
        "test_generation.py::test_generate_does_not_look_at_dropout",
    ),
    Mutant(
        "eval mode for good", GENERATION,
        "        model.train(was_training)\n", "        pass\n",
        "test_generation.py::test_generate[reference]",
    ),
    Mutant(
        "a row that has ended goes on", GENERATION,
        "[g and not m for g, m", "[not m for g, m",
        "test_generation.py::test_stop_ends_a_row_and_then_the_stream",
    ),
    Mutant(
        "the stream ends with the first row", GENERATION,
        "if not any(growing):", "if not all(growing):",
        "test_generation.py::test_stop_ends_a_row_and_then_the_stream",
    ),
    Mutant(
        "steps after the last text has ended", GENERATION,
        "[g and not e for g, e", "[g for g, e",
        "test_sampling.py::test_no_step_after_the_last_text_has_ended",
    ),
    Mutant(
        "ids below 0", GENERATION,
        "for token in (min(prompt), max(prompt)):", "for token in (max(prompt),):",
        NAMED.format("12-prompts must hold ids from 0 to 64, got -1"),
    ),
    Mutant(
        "ids beyond the vocabulary", GENERATION,
        "for token in (min(prompt), max(prompt)):", "for token in (min(prompt),):",
        NAMED.format("11-prompts must hold ids from 0 to 64, got 65"),
    ),
    Mutant(
        "keys and values counted once", GENERATION,
        "cached * 2 * c.n_layer", "cached * c.n_layer",
        SPEED,
    ),
    Mutant(
        "int8 weights that are not read", GENERATION,
        "(*part.parameters(), *part.buffers())", "part.parameters()",
        SPEED,
    ),
    # int8 weights
    Mutant(
        "scales turned to bfloat16", MODULES,
        "        self.scale = self.scale.float()\n", "",
        "test_generation.py::test_int8_model_is_near_and_keeps_its_scales",
    ),
    Mutant(
        "biases lost", MODULES,
        "self.bias = linear.bias",
        "self.bias = None if linear.bias is None else 0 * linear.bias",
        "test_generation.py::test_int8_model_is_near_and_keeps_its_scales",
    ),
    Mutant(
        "a projection left whole", QUANTIZE,
        '(block.mlp, "c_fc"), (block.mlp, "c_proj")', '(block.mlp, "c_fc")',
        SPEED,
    ),
    Mutant(
        "the cost measured on int8 alone", QUANTIZE,
        "    before = evaluate.perplexity(model, ids)\n    quantize_int8(model)\n",
        "    quantize_int8(model)\n    before = evaluate.perplexity(model, ids)\n",
        "test_sampling.py::test_cost_of_int8_is_that_of_the_model_itself",
    ),
    Mutant(
        "words of another order", LINEAR,
        "numbers.view(N, -1, 2, 32)", "numbers.view(N, -1, 32, 2)",
        "test_few_rows.py::test_the_packing_is_as_documented",
    ),
    Mutant(
        "rounded towards zero", LINEAR,
        "(weight / scale[:, None]).round()", "(weight / scale[:, None])",
        "test_few_rows.py::test_each_weight_is_the_nearest_multiple_of_its_scale",
    ),
    Mutant(
        "one scale for all rows", LINEAR,
        "weight.abs().amax(dim=1) if K", "weight.abs().amax().expand(N) if K",
        "test_few_rows.py::test_each_weight_is_the_nearest_multiple_of_its_scale",
    ),
    Mutant(
        "the largest is 128", LINEAR,
        "largest / 127, 1.0", "largest / 128, 1.0",
        "test_few_rows.py::test_each_weight_is_the_nearest_multiple_of_its_scale",
    ),
    # who serves a few rows
    Mutant(
        "fewer than a few", LINEAR,
        "math.prod(x.shape[:-1]) <= most", "math.prod(x.shape[:-1]) < most",
        OTHERS,
    ),
    Mutant(
        "one more than a few", LINEAR,
        "most: int = FEW)", "most: int = FEW + 1)",
        OTHERS,
    ),
    Mutant(
        "int8 spelled out for more than a few", LINEAR,
        "_few(x, packed, bias, FEW_INT8)", "_few(x, packed, bias)",
        "test_few_rows.py::test_more_rows_of_int8_go_through_the_kernel_too[cpu-avx2]",
    ),
    Mutant(
        "x's dtype under autocast", LINEAR,
        'x.device.type != "cpu" or torch.is_autocast_enabled("cpu")', 'x.device.type != "cpu"',
        OTHERS,
    ),
    Mutant(
        "no gradient of the bias", LINEAR,
        "t is not None and t.requires_grad for t in (x, weight, bias)",
        "t.requires_grad for t in (x, weight)",
        "test_few_rows.py::test_who_wants_a_gradient_has_pytorch_s_product[cpu-avx2]",
    ),
    Mutant(
        "the kernel within torch.compile", LINEAR,
        "if torch.compiler.is_compiling():", "if False:",
        "test_few_rows.py::test_compiled_it_is_pytorch_s_product[cpu-avx2]",
    ),
    Mutant(
        "nine sequences by the kernels of a few", LAYERS,
        "if B > FEW or", "if B > FEW + 1 or",
        "test_generation.py::test_what_is_not_a_gpt_2_is_named",
    ),
    Mutant(
        "the kernels of a few under autocast", LAYERS,
        "if B > FEW or torch.is_autocast_enabled(x.device.type):", "if B > FEW:",
        "test_generation.py::test_under_autocast_the_cache_is_of_its_dtype",
    ),
    Mutant(
        "a cache that is a view", LAYERS,
        "if not kv.is_contiguous():", "if False:",
        "test_decode_layers_arguments.py::test_what_does_not_fit_is_named[kv must be contiguous]",
    ),
    Mutant(
        "norms of any length", LAYERS,
        'self._check_tensor(f"{name}.{field}", row, (self.C,), row.dtype)', "pass",
        "test_decode_layers_arguments.py::test_what_does_not_fit_is_named"
        "[norm.bias must have shape (16,)]",
    ),
    Mutant(
        "some layers int8 and others not", LAYERS,
        "if len(self.scales) not in (0, 4 * len(layers)):", "if False:",
        "test_generation.py::test_what_is_not_a_gpt_2_is_named",
    ),
    Mutant(
        "the first norm twice", GENERATION,
        "norm(block.ln_2), linear(block.mlp.c_fc)", "norm(block.ln_1), linear(block.mlp.c_fc)",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "another eps", GENERATION,
        "eps=ln_f.eps)", "eps=2 * ln_f.eps)",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "the position after a token's own", GENERATION,
        "wte(token[:, 0]) + wpe(lengths)", "wte(token[:, 0]) + wpe(lengths + 1)",
        BLOCKS.format("fp32-whole"),
    ),
]  # fmt: skip
