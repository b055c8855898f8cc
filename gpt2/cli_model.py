"""The commands that use a trained model: gpt2 sample, gpt2 eval.

PyTorch is imported by them, not with them.
"""

import argparse
import json
import math
import os
import re
import sys

from .errors import InputError, NonFiniteError


def sample(flags: argparse.Namespace) -> None:
    """Write what follows a prompt, as the model samples it. The speed, and the part of the memory's
    bandwidth that it used, go to stderr."""
    _check(flags, "max_new_tokens", flags.max_new_tokens >= 0, "at least 0")
    _check(flags, "num_samples", flags.num_samples >= 1, "at least 1")
    _check(flags, "batch_size", flags.batch_size >= 1, "at least 1")
    _check(flags, "temperature", 0 <= flags.temperature < math.inf, "finite and at least 0")
    _check(flags, "top_k", flags.top_k is None or flags.top_k >= 1, "at least 1")
    _check(flags, "top_p", flags.top_p is None or 0 < flags.top_p <= 1, "above 0 and at most 1")
    _check(flags, "seed", flags.seed is None or 0 <= flags.seed < 2**63, "at least 0, below 2**63")
    # A step of decoding is a hundred loops that threads share. Not to spin between them at all made
    # it half as fast (two EPYC cores); so long, it is two thirds as fast where others want a core.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    import torch

    from . import memory, sampling

    stop = [_unescaped(text) for text in flags.stop]
    found = [flags.prompt or ""]
    if flags.prompts is not None:
        found = sampling.read_prompts(flags.prompts, strict=not flags.jsonl)
    texts = len(found) * flags.num_samples
    memory.check_fits(
        f"num_samples must be smaller, got {flags.num_samples}",
        100 * texts,
        torch.device("cpu"),
        f"keeping {texts:,} prompts",
    )
    model, tokenizer = _load_model(flags)
    if flags.prompts is not None:
        found = sampling.check_prompts(flags.prompts, found, tokenizer, strict=not flags.jsonl)
    found = [prompt for prompt in found for _ in range(flags.num_samples)]
    prompts = [prompt for prompt in found if isinstance(prompt, str)]
    speed = sampling.Speed()
    parts = sampling.complete(
        model,
        tokenizer,
        prompts,
        flags.max_new_tokens,
        sampling.Sampling(flags.temperature, flags.top_k, flags.top_p),
        seed=flags.seed,
        stop=stop,
        batch_size=flags.batch_size,
        speed=speed,
    )
    written = sampling.as_json(found, parts) if flags.jsonl else sampling.as_text(prompts, parts)
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
    """text with its escapes read. Raises InputError, naming stop, for one that is not known."""

    def character(found: re.Match) -> str:
        escape = found[0]
        if escape in _ESCAPES:
            return _ESCAPES[escape]
        code = int(escape[2:], 16) if escape[1:2] in ("x", "u") and len(escape) > 2 else None
        if code is None or 0xD800 <= code < 0xE000:
            raise InputError(
                f"stop must have the escapes \\n, \\r, \\t, \\\\, \\xNN and \\uNNNN alone, "
                f"got {escape} in {text}"
            )
        return chr(code)

    return re.sub(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.?)", character, text, flags=re.DOTALL)


_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", "\\\\": "\\"}


def _of_the_limit(model, speed) -> str:
    """How much of the memory's bandwidth a cached step used."""
    if not model.fast:
        return ""
    from . import bars
    from .machine import read_bandwidth

    rate = bars.per_second(speed.bytes, speed.seconds)
    limit = rate and read_bandwidth(model.lm_head.weight.device)
    if not limit:  # the clock stands still
        return ""
    return (
        f"; {rate / 1e9:.3g} GB/s, {rate / limit:.0%} of the {limit / 1e9:.3g} GB/s of its memory"
    )


def add_sample_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model_flags(parser)
    one_or_several = parser.add_mutually_exclusive_group().add_argument
    one_or_several("--prompt", metavar="TEXT", help="what to continue [default: nothing]")
    one_or_several(
        "--prompts",
        metavar="FILE",
        help='several: a line each, or {"prompt": TEXT} a line in FILE.jsonl; '
        "- reads stdin, also of a pipe: - < PIPE",
    )
    add("--max-new-tokens", type=int, default=500, metavar="N", help="[default: 500]")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text, in which \\n, \\r, \\t, \\xNN and \\uNNNN are characters and "
        "\\\\ is a backslash; may be given several times [default: nothing]",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="below 1: more likely tokens, 0: always the likeliest [default: 1]",
    )
    add("--top-k", type=int, metavar="N", help="only the N likeliest tokens [default: all]")
    add(
        "--top-p",
        type=float,
        metavar="X",
        help="only the likeliest, up to a total of X [default: 1]",
    )
    add("--seed", type=int, metavar="N", help="the same seed, the same text [default: a new one]")
    add("--num-samples", type=int, default=1, metavar="N", help="of each prompt [default: 1]")
    add("--batch-size", type=int, default=8, metavar="N", help="texts at a time [default: 8]")
    add(
        "--jsonl",
        action="store_true",
        help="write an object a line: prompt, text, tokens, and finish: length, end or stop; or "
        "prompt and error",
    )


def _load_model(flags: argparse.Namespace):
    """The model that the flags of _add_model_flags describe, and its tokenizer."""
    _check(flags, "quantize", flags.quantize in (None, "int8"), "int8 or absent")
    given = flags.quantize or flags.quantize_data is None
    _check(flags, "quantize_data", given, "absent without quantize")
    from . import loading
    from .machine import pick_device, pick_dtype

    device = pick_device(flags.device)
    model, tokenizer = loading.load(
        flags.model,
        fast=flags.fast,
        device=device,
        dtype=pick_dtype(flags.dtype, device),
        tokenizer=flags.tokenizer,
        tokenizer_dir=flags.tokenizer_dir,
    )
    if flags.quantize:
        _quantize(model, tokenizer, flags.quantize_data)
    return model, tokenizer


def _quantize(model, tokenizer, source: str | None) -> None:
    """The model's linear weights as int8; what that costs goes to stderr."""
    from . import quantize, sources

    ids = sources.excerpt(source, tokenizer, _MEASURED)
    what = "Python's language reference" if source is None else repr(source)
    if len(ids) < 2:
        raise InputError(
            f"quantize_data must be text for the tokenizer, got {len(ids)} tokens of {what}"
        )
    before, after = quantize.measured(model, ids)
    print(
        f"gpt2: int8 changes perplexity by {after.perplexity / before.perplexity - 1:+.2%}, from "
        f"{before.perplexity:.4g} to {after.perplexity:.4g} on {len(ids):,} tokens of {what}",
        file=sys.stderr,
    )


_MEASURED = 1024  # tokens: seconds of a CPU's time for GPT-2 124M


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="folder of a run or of Hugging Face's, a published name, ckpt.pt or model.bin",
    )
    add("--device", default="auto", metavar="NAME", help="[default: cuda where there is one]")
    add(
        "--dtype",
        default="auto",
        metavar="NAME",
        help="float32 or bfloat16 [default: bfloat16 on GPUs that multiply it]",
    )
    add(
        "--quantize",
        metavar="int8",
        help="keep linear weights as int8, and say what that costs [default: as they are]",
    )
    add(
        "--quantize-data",
        metavar="PATH",
        help="text on which that is measured [default: Python's language reference]",
    )
    add(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the kernels, and keep keys and values [default: yes]",
    )
    add(
        "--tokenizer",
        metavar="NAME",
        help="byte, gpt2, a file or folder that holds one, or nanoGPT's meta.pkl [default: the "
        "own of a run or of Hugging Face's folder; else gpt2]",
    )
    add("--tokenizer-dir", metavar="PATH", help="folder with GPT-2's vocab.bpe and encoder.json")


def eval_(flags: argparse.Namespace) -> None:
    """How well a model predicts text: its perplexity (--data), and how often it finds the right one
    of several endings the likeliest (--choices)."""
    if flags.data is None and flags.choices is None:
        raise InputError("data or choices must be given, got neither")
    for name in ("context", "stride"):
        value = getattr(flags, name)
        _check(flags, name, value is None or flags.data is not None, "absent without data")
    from . import bars, choices, data, evaluate

    model, tokenizer = _load_model(flags)
    context, stride = evaluate.check_windows(model, flags.context, flags.stride, flags.batch_size)
    texts = questions = ()
    if flags.data is not None:
        named = flags.tokenizer is not None
        texts = data.whole(flags.data, tokenizer, flags.tokenizer_dir, named=named).parts
    if flags.choices is not None:
        questions = choices.read(flags.choices, tokenizer, model.config.block_size)
    results = {}
    if flags.data is not None:
        total = sum(len(ids) - 1 for ids in texts)
        with bars.bar(total=total, unit="token", desc="scoring", unit_scale=True, delay=1) as bar:
            results["data"] = evaluate.perplexity(
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
            results["choices"] = choices.evaluate(model, questions, flags.batch_size, bar.update)
    if flags.json:
        print(json.dumps({name: result.figures() for name, result in results.items()}))
    else:
        for name, result in results.items():
            print(f"{name} {getattr(flags, name)!r}: {result}")


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model_flags(parser)
    add(
        "--data",
        metavar="PATH",
        help="perplexity of this text: a file, folder, pattern, or - for standard input; or of "
        "token shards",
    )
    add("--context", type=int, metavar="N", help="tokens read at most [default: the model's]")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens that a window is ahead of the last: each is scored after at least context - N "
        "[default: half of the context]",
    )
    add(
        "--choices",
        metavar="FILE",
        help="multiple choice: a question a line, in JSON with ctx, endings and label, as "
        "HellaSwag's hellaswag_val.jsonl",
    )
    add("--batch-size", type=int, default=8, metavar="N", help="windows at a time [default: 8]")
    add("--json", action="store_true", help="print one JSON object")


def _check(flags: argparse.Namespace, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {expected}, got {getattr(flags, name)}")
