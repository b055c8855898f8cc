"""Bugs to plant in evaluation."""

from . import Mutant

EVALUATE = "gpt2/evaluate/scoring.py"
CHOICES = "gpt2/evaluate/multiple_choice.py"
CLI = "gpt2/cli/eval.py"
DATA = "gpt2/data/batches.py"
HARNESS = "gpt2/interop/lm_eval.py"

EVALUATE_MUTANTS = [
    # windows
    Mutant(
        "the last token of a window left to the next", EVALUATE,
        "start + context + 1, len(ids)", "start + context, len(ids)",
        "evaluate/test_scoring.py::test_windows_by_hand", quick=True,
    ),
    # scores
    Mutant(
        "a softmax in bfloat16", EVALUATE,
        "    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)\n", "",
        "evaluate/test_scoring.py::test_bfloat16_is_summed_in_float32",
    ),
    Mutant(
        "dropout while it evaluates", EVALUATE,
        "    model.eval()\n", "    pass\n",
        "evaluate/test_scoring.py::test_dropout_is_off_meanwhile_and_back_afterwards",
    ),
    Mutant(
        "a NaN is a result", EVALUATE,
        "if not math.isfinite(nats):", "if False:",
        "evaluate/test_scoring.py::test_a_loss_that_is_not_finite_is_said",
    ),
    # multiple choice
    Mutant(
        "the sum for the mean", CHOICES,
        "(1, np.array(question.characters), tokens)", "(1, 1, tokens)",
        "evaluate/test_multiple_choice.py::test_choices_by_hand", quick=True,
    ),
    Mutant(
        "True is 1", CHOICES,
        "type(label) is not int", "not isinstance(label, int)",
        'evaluate/test_multiple_choice.py::test_a_bad_line_is_named'
        '[{"ctx": "a", "endings": ["a", "b"], '
        '"label": true}]',
    ),
    # the command
    Mutant(
        "a stride that is not heard", CLI,
        "                stride=stride,\n", "",
        "cli/test_eval_command.py::test_the_command_prints_what_the_functions_return",
    ),
    Mutant(
        "one shard of several", DATA,
        "for path in paths]\n        if not sure", "for path in paths[:1]]\n        if not sure",
        "cli/test_eval_command.py::test_shards_are_evaluated_each_by_itself",
    ),
]  # fmt: skip

# Needs lm-evaluation-harness.
HARNESS_MUTANTS = [
    Mutant(
        "<|endoftext|> is thirteen characters", HARNESS,
        "special=True", "special=False",
        "interop/test_lm_eval.py::test_loglikelihood_equals_that_of_their_adapter",
    ),
]  # fmt: skip
