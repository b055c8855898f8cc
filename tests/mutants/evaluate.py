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
    # scores
    Mutant(
        "a softmax in bfloat16", EVALUATE,
        "    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)\n", "",
        "test_evaluate.py::test_bfloat16_is_summed_in_float32",
    ),
    Mutant(
        "dropout while it evaluates", EVALUATE,
        "    model.eval()\n", "    pass\n",
        "test_evaluate.py::test_dropout_is_off_meanwhile_and_back_afterwards",
    ),
    Mutant(
        "a NaN is a result", EVALUATE,
        "if not math.isfinite(nats):", "if False:",
        "test_evaluate.py::test_a_loss_that_is_not_finite_is_said",
    ),
    # multiple choice
    Mutant(
        "the sum for the mean", CHOICES,
        "(1, np.array(question.characters), tokens)", "(1, 1, tokens)",
        "test_choices.py::test_choices_by_hand", quick=True,
    ),
    Mutant(
        "True is 1", CHOICES,
        "type(label) is not int", "not isinstance(label, int)",
        'test_choices.py::test_a_bad_line_is_named[{"ctx": "a", "endings": ["a", "b"], '
        '"label": true}]',
    ),
    # the command
    Mutant(
        "a stride that is not heard", CLI,
        "                stride=stride,\n", "",
        "test_eval_command.py::test_the_command_prints_what_the_functions_return",
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
        "<|endoftext|> is thirteen characters", HARNESS,
        "special=True", "special=False",
        "test_harness.py::test_loglikelihood_equals_that_of_their_adapter",
    ),
]  # fmt: skip
