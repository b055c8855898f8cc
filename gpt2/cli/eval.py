"""gpt2 eval: measures perplexity and multiple choice. PyTorch is imported when it runs."""

import argparse
import json

from ..errors import InputError
from .model_flags import add_model_flags, check_flag, load_model


def run(flags: argparse.Namespace) -> None:
    """Measure how well a model predicts text: its perplexity (--data), and how often the right one
    of several endings is the likeliest (--choices)."""
    if flags.data is None and flags.choices is None:
        raise InputError("data or choices must be given, got neither")
    for name in ("context", "stride"):
        value = getattr(flags, name)
        check_flag(flags, name, value is None or flags.data is not None, "absent without data")
    from .. import bars
    from ..data import batches
    from ..evaluate import multiple_choice, scoring

    model, tokenizer = load_model(flags)
    context, stride = scoring.check_windows(model, flags.context, flags.stride, flags.batch_size)
    texts = questions = ()
    if flags.data is not None:
        named = flags.tokenizer is not None
        texts = batches.whole(flags.data, tokenizer, flags.tokenizer_dir, named=named).parts
    if flags.choices is not None:
        questions = multiple_choice.read(flags.choices, tokenizer, model.config.block_size)
    results = {}
    if flags.data is not None:
        total = sum(len(ids) - 1 for ids in texts)
        with bars.bar(total=total, unit="token", desc="scoring", unit_scale=True, delay=1) as bar:
            results["data"] = scoring.perplexity(
                model,
                *texts,
                context=context,
                stride=stride,
                batch_size=flags.batch_size,
                tokenizer=tokenizer,
                progress=bar.update,
            )
    if questions:
        total = sum(len(question.windows) for question in questions)
        with bars.bar(total=total, unit="ending", desc="choosing", delay=1) as bar:
            results["choices"] = multiple_choice.evaluate(
                model, questions, flags.batch_size, bar.update
            )
    if flags.json:
        print(json.dumps({name: result.figures() for name, result in results.items()}))
    else:
        for name, result in results.items():
            print(f"{name} {getattr(flags, name)!r}: {result}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_flags(parser)
    add(
        "--data",
        metavar="PATH",
        help="measure perplexity on this text (file, folder, pattern, or - for standard input) or "
        "on token shards",
    )
    add("--context", type=int, metavar="N", help="window length in tokens [default: the model's]")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the starts of two windows; each token is scored given more than "
        "context - N tokens before it [default: half of the context]",
    )
    add(
        "--choices",
        metavar="FILE",
        help="answer multiple-choice questions: one JSON object per line with ctx, endings and "
        "label, as in HellaSwag's hellaswag_val.jsonl",
    )
    add("--batch-size", type=int, default=8, metavar="N", help="windows at a time [default: 8]")
    add("--json", action="store_true", help="print one JSON object")
