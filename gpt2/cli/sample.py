"""gpt2 sample: text from a trained model. PyTorch is imported when the command runs."""

import argparse
import math
import os
import re
import sys

from ..errors import InputError, NonFiniteError
from .model_flags import add_model_flags, check_flag, load_model

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", "\\\\": "\\"}


def run(flags: argparse.Namespace) -> None:
    """Continue a prompt with sampled text, printed as it is sampled. The speed, and the share of
    the memory bandwidth that it used, go to stderr."""
    check_flag(flags, "max_new_tokens", flags.max_new_tokens >= 0, "at least 0")
    check_flag(flags, "num_samples", flags.num_samples >= 1, "at least 1")
    check_flag(flags, "batch_size", flags.batch_size >= 1, "at least 1")
    check_flag(flags, "temperature", 0 <= flags.temperature < math.inf, "finite and at least 0")
    check_flag(flags, "top_k", flags.top_k is None or flags.top_k >= 1, "at least 1")
    check_flag(flags, "top_p", flags.top_p is None or 0 < flags.top_p <= 1, "above 0 and at most 1")
    check_flag(
        flags, "seed", flags.seed is None or 0 <= flags.seed < 2**63, "at least 0 and below 2**63"
    )
    # A step of decoding is a hundred parallel loops. Without spinning between them it is half as
    # fast (two EPYC cores). With this count it is two thirds as fast when another program uses a
    # core.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    import torch

    from .. import memory
    from ..generate import completion

    stop = [_unescaped(text) for text in flags.stop]
    found = [flags.prompt or ""]
    if flags.prompts is not None:
        found = completion.read_prompts(flags.prompts, strict=not flags.jsonl)
    texts = len(found) * flags.num_samples
    memory.check_fits(
        f"num_samples must be smaller, got {flags.num_samples}",
        100 * texts,
        torch.device("cpu"),
        f"keeping {texts:,} prompts",
    )
    model, tokenizer = load_model(flags)
    if flags.prompts is not None:
        found = completion.check_prompts(flags.prompts, found, tokenizer, strict=not flags.jsonl)
    found = [prompt for prompt in found for _ in range(flags.num_samples)]
    prompts = [prompt for prompt in found if isinstance(prompt, str)]
    speed = completion.Speed()
    parts = completion.complete(
        model,
        tokenizer,
        prompts,
        flags.max_new_tokens,
        completion.Sampling(flags.temperature, flags.top_k, flags.top_p),
        seed=flags.seed,
        stop=stop,
        batch_size=flags.batch_size,
        speed=speed,
    )
    written = (
        completion.as_json(found, parts) if flags.jsonl else completion.as_text(prompts, parts)
    )
    try:
        for piece in written:
            print(piece, end="", flush=True)
    except NonFiniteError:
        if not flags.jsonl:
            print(flush=True)  # ends the line of the text so far
        raise
    if len(prompts) < len(found):
        refused = len(found) - len(prompts)
        print(f"gpt2: {refused:,} of {len(found):,} texts have an error", file=sys.stderr)
    if speed.steps:
        print(f"gpt2: {speed}{_of_the_limit(model, speed)}", file=sys.stderr)


def _unescaped(text: str) -> str:
    """text with its escapes replaced. Raises InputError, naming stop, for an unknown escape."""

    def character(found: re.Match) -> str:
        escape = found[0]
        if escape in _ESCAPES:
            return _ESCAPES[escape]
        code = int(escape[2:], 16) if escape[1:2] in ("x", "u") and len(escape) > 2 else None
        if code is None or 0xD800 <= code < 0xE000:
            raise InputError(
                f"stop must have no escapes but \\n, \\r, \\t, \\\\, \\xNN and \\uNNNN, "
                f"got {escape} in {text}"
            )
        return chr(code)

    return re.sub(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.?)", character, text, flags=re.DOTALL)


def _of_the_limit(model, speed) -> str:
    """The share of the memory bandwidth that cached steps used, as text."""
    if not model.fast:
        return ""
    from .. import bars
    from ..device import read_bandwidth

    rate = bars.per_second(speed.bytes, speed.seconds)
    limit = rate and read_bandwidth(model.lm_head.weight.device)
    if not limit:  # the clock stands still
        return ""
    return (
        f"; {rate / 1e9:.3g} GB/s, {rate / limit:.0%} of the {limit / 1e9:.3g} GB/s of its memory"
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_flags(parser)
    one_or_several = parser.add_mutually_exclusive_group().add_argument
    one_or_several("--prompt", metavar="TEXT", help="text to continue [default: nothing]")
    one_or_several(
        "--prompts",
        metavar="FILE",
        help='several prompts: one per line, or {"prompt": TEXT} per line of FILE.jsonl; '
        "- reads standard input (for a named pipe: - < PIPE)",
    )
    add("--max-new-tokens", type=int, default=500, metavar="N", help="[default: 500]")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; the escapes \\n, \\r, \\t, \\xNN, \\uNNNN and \\\\ stand for "
        "characters; may be given several times [default: nothing]",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="below 1: likelier tokens; 0: always the likeliest [default: 1]",
    )
    add("--top-k", type=int, metavar="N", help="only the N likeliest tokens [default: all]")
    add(
        "--top-p",
        type=float,
        metavar="X",
        help="only the likeliest tokens, up to a total probability of X [default: 1]",
    )
    add("--seed", type=int, metavar="N", help="same seed, same text [default: a new one]")
    add("--num-samples", type=int, default=1, metavar="N", help="texts per prompt [default: 1]")
    add("--batch-size", type=int, default=8, metavar="N", help="texts at a time [default: 8]")
    add(
        "--jsonl",
        action="store_true",
        help="print one JSON object per line: prompt, text, tokens, and finish (length, end or "
        "stop); or prompt and error",
    )
