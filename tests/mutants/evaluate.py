"""Bugs to plant in evaluation."""

from . import Mutant

EVALUATE = "gpt2/evaluate.py"
CHOICES = "gpt2/choices.py"
CLI = "gpt2/cli_model.py"
DATA = "gpt2/data.py"
HARNESS = "gpt2/harness.py"

EVALUATE_MUTANTS = [
    # windows
    Mutant(
        "the last token of a window left to the next", EVALUATE,
        "start + context + 1, len(ids)", "start + context, len(ids)",
        "test_evaluate.py::test_windows_by_hand", quick=True,
    ),
    Mutant(
        "tokens scored twice", EVALUATE,
        "yield Window(ids[start:end], end - done)", "yield Window(ids[start:end], end - start - 1)",
        "test_evaluate.py::test_every_token_once_with_the_context_that_is_promised[53-5]",
    ),
    Mutant(
        "less context than is promised", EVALUATE,
        "itertools.count(0, stride)", "itertools.count(0, context)",
        "test_evaluate.py::test_equals_each_token_by_itself[53-16-5]",
    ),
    Mutant(
        "a window more at the end", EVALUATE,
        "        if done >= len(ids):\n", "        if start >= len(ids):\n",
        "test_evaluate.py::test_every_token_once_with_the_context_that_is_promised[34-8]",
    ),
    Mutant(
        "the stride rounded down", EVALUATE,
        "(context + 1) // 2", "context // 2",
        "test_evaluate.py::test_half_of_the_context_is_the_default",
    ),
    Mutant(
        "a window from text to text", EVALUATE,
        "(w for ids in texts for w in windows(ids, context, stride))",
        "(w for w in windows(np.concatenate(texts), context, stride))",
        "test_evaluate.py::test_no_window_crosses_from_one_text_to_another",
    ),
    Mutant(
        "positions that the model does not have", EVALUATE,
        "if not 1 <= context <= block_size:", "if not 1 <= context:",
        "test_evaluate.py::test_what_does_not_fit_is_named[arguments0-context must be 1 to "
        "block_size 16, got 17]",
    ),
    Mutant(
        "tokens that no window has", EVALUATE,
        "if not 1 <= stride <= context:", "if not 1 <= stride:",
        "test_evaluate.py::test_what_does_not_fit_is_named[arguments2-stride must be 1 to "
        "context 8, got 9]",
    ),
    Mutant(
        "nothing to score, and no word of it", EVALUATE,
        "any(len(ids) > 1 for ids in texts)", "any(len(ids) for ids in texts)",
        "test_evaluate.py::test_without_a_second_token_there_is_nothing_to_score[texts2]",
    ),
    # scores
    Mutant(
        "the row after", EVALUATE,
        "np.arange(b * T + n - 1 - window.scored, b * T + n - 1)",
        "np.arange(b * T + n - window.scored, b * T + n)",
        "test_evaluate.py::test_by_hand",
    ),
    Mutant(
        "padding on the left", EVALUATE,
        "        ids[b, :n] = window.ids\n", "        ids[b, T + 1 - n :] = window.ids\n",
        "test_evaluate.py::test_scores_in_any_batch_and_order",
    ),
    Mutant(
        "the longest first, and left so", EVALUATE,
        "return [results[i] for i in range(len(windows))]", "return [results[i] for i in order]",
        "test_evaluate.py::test_scores_in_any_batch_and_order",
    ),
    Mutant(
        "logits of all tokens at a time", EVALUATE,
        "zip(h.split(ROWS), targets.split(ROWS), strict=True)", "[(h, targets)]",
        "test_evaluate.py::test_logits_never_exist_for_all_tokens",
    ),
    Mutant(
        "a softmax in bfloat16", EVALUATE,
        "    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)\n", "",
        "test_evaluate.py::test_bfloat16_is_summed_in_float32",
    ),
    Mutant(
        "sums in float32", EVALUATE,
        "losses.double().split(counts)", "losses.float().split(counts)",
        "test_evaluate.py::test_sums_are_float64",
    ),
    Mutant(
        "the unlikeliest token is greedy", EVALUATE,
        "logits.argmax(dim=1) == targets", "logits.argmin(dim=1) == targets",
        "test_evaluate.py::test_greedy_is_the_likeliest_token",
    ),
    Mutant(
        "dropout while it evaluates", EVALUATE,
        "    model.eval()\n", "    pass\n",
        "test_evaluate.py::test_dropout_is_off_meanwhile_and_back_afterwards",
    ),
    Mutant(
        "eval mode for good", EVALUATE,
        "        model.train(was_training)\n", "        pass\n",
        "test_evaluate.py::test_dropout_is_off_meanwhile_and_back_afterwards",
    ),
    Mutant(
        "a NaN is a result", EVALUATE,
        "if not math.isfinite(nats):", "if False:",
        "test_evaluate.py::test_a_loss_that_is_not_finite_is_said",
    ),
    Mutant(
        "windows that the model cannot read", EVALUATE,
        "not 2 <= n <= block_size + 1 or", "not 2 <= n or",
        "test_evaluate.py::test_a_window_that_does_not_fit_is_named[ids1-1]",
    ),
    # figures
    Mutant(
        "the bytes of <|endoftext|>", EVALUATE,
        "        sizes[tokenizer.eot] = 0\n", "        pass\n",
        "test_evaluate.py::test_eot_has_no_bytes_but_its_loss_counts",
    ),
    Mutant(
        "the bytes of the first token", EVALUATE,
        "sizes[window.ids[-window.scored :]].sum()", "sizes[window.ids].sum()",
        "test_evaluate.py::test_by_hand",
    ),
    Mutant(
        "nats for bits", EVALUATE,
        "self.nats / math.log(2) / self.bytes", "self.nats / self.bytes",
        "test_evaluate.py::test_by_hand",
    ),
    Mutant(
        "JSON that is none", EVALUATE,
        "self.perplexity if math.isfinite(self.perplexity) else None", "self.perplexity",
        "test_eval_command.py::test_what_is_infinite_is_null_in_json",
    ),
    # multiple choice
    Mutant(
        "no space before an ending", CHOICES,
        'f" {ending}"', "ending",
        "test_choices.py::test_what_is_scored_is_the_space_and_the_ending",
    ),
    Mutant(
        "the sum for the mean", CHOICES,
        "(1, np.array(question.characters), tokens)", "(1, 1, tokens)",
        "test_choices.py::test_choices_by_hand", quick=True,
    ),
    Mutant(
        "tokens for characters", CHOICES,
        "(1, np.array(question.characters), tokens)", "(1, tokens, tokens)",
        "test_choices.py::test_choices_by_hand",
    ),
    Mutant(
        "bytes for characters", CHOICES,
        "[len(ending) for ending in endings]", "[len(ending.encode()) for ending in endings]",
        "test_choices.py::test_a_byte_and_a_character_are_not_the_same",
    ),
    Mutant(
        "the unlikeliest ending", CHOICES,
        "[-next(scores)", "[next(scores)",
        "test_choices.py::test_choices_equal_each_token_by_itself[3-0]",
    ),
    Mutant(
        "cut on the right", CHOICES,
        "(prompt + ids)[-block_size - 1 :]", "(prompt + ids)[: block_size + 1]",
        "test_choices.py::test_a_context_is_cut_on_the_left",
    ),
    Mutant(
        "cut one token early", CHOICES,
        "(prompt + ids)[-block_size - 1 :]", "(prompt + ids)[-block_size:]",
        "test_choices.py::test_a_context_is_cut_on_the_left",
    ),
    Mutant(
        "cut, and no word of it", CHOICES,
        "cut |= len(prompt) + len(ids) > block_size + 1", "cut |= False",
        "test_choices.py::test_a_context_is_cut_on_the_left",
    ),
    Mutant(
        "the label of a test split", CHOICES,
        "not 0 <= label < endings", "not -1 <= label < endings",
        'test_choices.py::test_a_bad_line_is_named[{"ctx": "a", "endings": ["a", "b"], '
        '"label": -1}]',
    ),
    Mutant(
        "True is 1", CHOICES,
        "type(label) is not int", "not isinstance(label, int)",
        'test_choices.py::test_a_bad_line_is_named[{"ctx": "a", "endings": ["a", "b"], '
        '"label": true}]',
    ),
    Mutant(
        "a standard error over n", CHOICES,
        "(accuracy * (1 - accuracy) / (n - 1))", "(accuracy * (1 - accuracy) / n)",
        "test_choices.py::test_choices_by_hand",
    ),
    Mutant(
        "lines counted without the empty ones", CHOICES,
        "enumerate(lines, 1)", "enumerate(lines, 2)",
        "test_choices.py::test_a_bad_line_is_named[[1]]",
    ),
    # the command
    Mutant(
        "a stride that is not heard", CLI,
        "                stride=stride,\n", "",
        "test_eval_command.py::test_the_command_prints_what_the_functions_return",
    ),
    Mutant(
        "something computed before the questions are read", CLI,
        "    texts = questions = ()\n    if flags.data is not None:\n",
        "    texts = questions = ()\n    evaluate.score(model, (), 1)\n"
        "    if flags.data is not None:\n",
        "test_eval_command.py::test_what_is_wrong_is_one_line_before_anything_is_computed"
        "[eval run --choices bad.jsonl]",
    ),
    Mutant(
        "one shard of several", DATA,
        "for path in paths]\n        if not sure", "for path in paths[:1]]\n        if not sure",
        "test_eval_command.py::test_shards_are_evaluated_each_by_itself",
    ),
]  # fmt: skip

# Where lm-evaluation-harness is installed.
HARNESS_MUTANTS = [
    Mutant(
        "a context that is cut on the right", HARNESS,
        "[*context, *continuation][-self.max_length - 1 :]",
        "[*context, *continuation][: self.max_length + 1]",
        "test_harness.py::test_loglikelihood_equals_that_of_their_adapter",
    ),
    Mutant(
        "<|endoftext|> is thirteen characters", HARNESS,
        "special=True", "special=False",
        "test_harness.py::test_loglikelihood_equals_that_of_their_adapter",
    ),
    Mutant(
        "one likeliest token is enough", HARNESS,
        "bool(s.greedy.all())", "bool(s.greedy.any())",
        "test_harness.py::test_greedy_continuations_are_known_as_such",
    ),
    Mutant(
        "disjoint windows to the end", HARNESS,
        "Window([*inputs, scored[-1]], len(scored))",
        "Window([*inputs[-len(scored) :], scored[-1]], len(scored))",
        "test_harness.py::test_rolling_equals_that_of_their_adapter",
    ),
    Mutant(
        "the stop string stays", HARNESS,
        "postprocess_generated_text(self.tok_decode(row), until, None)", "self.tok_decode(row)",
        "test_harness.py::test_what_is_written_equals_that_of_their_adapter",
    ),
    Mutant(
        "no room for what is written", HARNESS,
        "prompt[-(self.max_length - n) :]", "prompt[-self.max_length :]",
        "test_harness.py::test_what_is_written_equals_that_of_their_adapter",
    ),
    Mutant(
        "texts in the order of their lengths", HARNESS,
        "results[i] = text", "results[batch[0]] = text",
        "test_harness.py::test_what_is_written_equals_that_of_their_adapter",
    ),
    Mutant(
        "always the likeliest", HARNESS,
        "    if not sample:\n", "    if True:\n",
        "test_harness.py::test_sampling_is_what_a_request_asks_for",
    ),
    Mutant(
        "<|endoftext|> does not end a text", HARNESS,
        "stop=stop, ended=ended", "ended=ended",
        "test_harness.py::test_documents_end_what_is_written",
    ),
    Mutant(
        "a GPU that is not there", HARNESS,
        'if device == "cuda:0" and', "if False and",
        "test_harness.py::test_the_harness_s_default_device_may_be_absent[cuda:0]",
    ),
    Mutant(
        "a result under another name", HARNESS,
        'add_partial("loglikelihood_rolling", request.args',
        'add_partial("loglikelihood", request.args',
        "test_harness.py::test_cached_results_are_added",
    ),
]  # fmt: skip
