"""Bugs to plant in what turns prompts into text."""

from . import Mutant

SAMPLING = "gpt2/sampling.py"
LOADING = "gpt2/loading.py"

STOPS = "test_sampling.py::test_a_text_ends_before_a_stop_string[{}]"
SPEED = "test_sampling.py::test_speed_counts_steps_between_the_first_and_the_last"
CLOCK = "test_sampling.py::test_speed_leaves_out_texts_that_have_ended_and_the_time_of_others"
BATCHES = "test_sampling.py::test_a_text_is_the_same_in_every_batch[False]"

SAMPLING_MUTANTS = [
    # texts
    Mutant(
        "the rest of a character lost", SAMPLING,
        "        self._give(self.decode())\n        if self.finish",
        "        if self.finish",
        "test_sampling.py::test_text_streams_in_whole_characters",
    ),
    Mutant(
        "a stop string in what ends a text", SAMPLING,
        "        if self.finish is None:\n            self.text, self.finish",
        "        if True:\n            self.text, self.finish",
        "test_sampling.py::test_text_streams_in_whole_characters",
    ),
    Mutant(
        "the token that ends a document not counted", SAMPLING,
        "        self.tokens += 1\n        if token == self.eot:\n",
        "        self.tokens += token != self.eot\n        if token == self.eot:\n",
        "test_sampling.py::test_text_ends_with_its_document",
    ),
    Mutant(
        "an empty prompt is a line where documents end", SAMPLING,
        "        return [tokenizer.eot]\n", "        pass\n",
        "test_sampling.py::test_text_ends_with_its_document",
    ),
    Mutant(
        "one character is not held back", SAMPLING,
        "range(longest, 0, -1)", "range(longest, 1, -1)",
        STOPS.format("over tokens"), quick=True,
    ),
    Mutant(
        "the shortest beginning held back", SAMPLING,
        "range(longest, 0, -1)", "range(1, longest + 1)",
        STOPS.format("a beginning in itself"),
    ),
    Mutant(
        "what is held back lost at the end", SAMPLING,
        "self.text + self.held, finish", "self.text, finish",
        STOPS.format("held to the end"),
    ),
    Mutant(
        "the stop string that begins last", SAMPLING,
        "self.held[: min(found)]", "self.held[: max(found)]",
        STOPS.format("the one that begins first"),
    ),
    Mutant(
        "the stop string stays", SAMPLING,
        "self.text + self.held[: min(found)]", "self.text + self.held",
        STOPS.format("at once"),
    ),
    Mutant(
        "a text that ends before those in front of it", SAMPLING,
        "            if texts[front].finish is None:\n                return\n",
        "            if all(text.finish is None for text in texts):\n                return\n",
        "test_sampling.py::test_texts_come_in_the_order_of_their_prompts",
    ),
    Mutant(
        "every batch's seeds the first's", SAMPLING,
        "sampling, seeds[part], speed", "sampling, seeds[: len(texts)], speed",
        BATCHES,
    ),
    Mutant(
        "equal prompts counted in each batch", SAMPLING,
        "sampling, seeds[part], speed",
        "sampling, generation.seeds_of(ids[part], seed), speed",
        BATCHES,
    ),
    # speed
    Mutant(
        "the step that reads the prompts", SAMPLING,
        "if speed is not None and n:", "if speed is not None:",
        SPEED,
    ),
    Mutant(
        "a cache of the prompts alone", SAMPLING,
        "[length + n for length, t", "[length for length, t",
        SPEED,
    ),
    Mutant(
        "tokens of texts that have ended", SAMPLING,
        "strict=True) if not t.finish]", "strict=True)]",
        CLOCK,
    ),
    Mutant(
        "the time in which others write", SAMPLING,
        "        yield step\n        start = time.perf_counter()\n", "        yield step\n",
        CLOCK,
    ),
    # prompts and models
    Mutant(
        "a prompt that is a number", SAMPLING,
        "if not isinstance(prompt, str):", "if prompt is None:",
        'test_sampling.py::test_a_broken_line_is_named[{"prompt": 1}]',
    ),
    Mutant(
        "lines counted from 0", SAMPLING,
        'lines_of("prompts", path), 1)', 'lines_of("prompts", path))',
        "test_sampling.py::test_a_broken_line_is_named[x]",
    ),
    Mutant(
        "ids of padding", LOADING,
        "weights.crop(found.config, found.state(), vocab_size=reads.vocab_size)",
        "(found.config, found.state())",
        "test_loading.py::test_ids_beyond_the_tokenizer_are_never_sampled",
    ),
    Mutant(
        "ids that the model does not have", LOADING,
        "return tokenizers.first(reads, size)", "return reads",
        "test_loading.py::test_a_smaller_vocabulary_refuses_text_that_it_lacks",
    ),
    Mutant(
        "GPT-2's tokenizer for any size", LOADING,
        "_NEAR = 0.75", "_NEAR = 0.0",
        "test_loading.py::test_gpt2_s_tokenizer_is_not_assumed_for_another_size",
    ),
    Mutant(
        "a dtype that is not heard", LOADING,
        "fast=fast, dtype=dtype)", "fast=fast, dtype=torch.float32)",
        "test_loading.py::test_every_format_gives_a_model_and_its_tokenizer",
    ),
    Mutant(
        "GPT-2's tokenizer for a run", "gpt2/convert.py",
        'if model.format == "run":\n        return', 'if False:\n        return',
        "test_loading.py::test_every_format_gives_a_model_and_its_tokenizer",
    ),
    Mutant(
        "shards of any tokenizer", "gpt2/data.py",
        "_LEAST_BPE = 1024", "_LEAST_BPE = 65536",
        "test_nanogpt_data.py::test_ids_far_below_a_vocabulary_that_nobody_named",
    ),
    Mutant(
        "an alphabet in another order", "gpt2/nanogpt_meta.py",
        "    return alphabet\n", "    return sorted(alphabet)\n",
        "test_nanogpt_data.py::test_the_alphabet_of_meta_pkl_reads_the_shards",
    ),
    Mutant(
        "an end of text that is no id", "gpt2/sources.py",
        "if eot is None else", "if not eot else",
        "test_hf_tokenizer.py::test_blocks_and_documents_of_theirs",
    ),
]  # fmt: skip
