"""The command line: gpt2 train, sample, eval, convert, prepare, tokenizer.

What the user got wrong is one line on stderr and exit code 2. A bug keeps its traceback. PyTorch
is imported by the commands that need it, so that --help answers at once.
"""

import argparse
import json
import math
import os
import signal
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

from .errors import InputError, NonFiniteError
from .train_config import TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; its exit code: 0, 1 (not finite), 2 (wrong input), 128 + signal."""
    # OpenMP's threads spin while they wait for each other. Where another program wants the cores,
    # that made training 20 times slower (two EPYC cores); it is read when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sample may hold what the terminal cannot
    try:
        options = _parser().parse_args(arguments)
        return options.command(options) or 0
    except InputError as e:
        return _fail(str(e), 2)
    except NonFiniteError as e:
        return _fail(str(e), 1)
    except BrokenPipeError:  # gpt2 sample … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as e:
        return _fail(f"{e.filename or 'file'}: {e.strerror or e}", 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _fail(message: str, code: int) -> int:
    print(f"gpt2: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage, and flags are written in full."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpt2", description="Train GPT-2 and sample from it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, add_flags, help in (
        (_train, _add_train_flags, "train a model"),
        (_sample, _add_sample_flags, "write text with a trained model"),
        (_eval, _add_eval_flags, "how well a model predicts text, and answers questions"),
        (_convert, _add_convert_flags, "turn a model into another format"),
        (_prepare, _add_prepare_flags, "turn text into token shards"),
        (_tokenizer, _add_tokenizer_flags, "learn a BPE from text"),
    ):
        name = command.__name__.strip("_")
        subparser = commands.add_parser(name, help=help, description=command.__doc__)
        subparser.set_defaults(command=command)
        add_flags(subparser)
    return parser


def _train(flags: argparse.Namespace) -> int:
    """Train a model. With no flags: a small one, on Python's own language reference, which two CPU
    cores finish in minutes. The run's folder gets config.json, metrics.jsonl, loss.png,
    tokenizer.json and checkpoint.safetensors. Ctrl-C saves before it stops."""
    chosen = {k: v for k, v in vars(flags).items() if k not in ("command", "resume")}
    if flags.resume is None:
        if chosen.get("init") is None:
            options = TrainConfig(**chosen)
        else:
            from . import finetune

            options = finetune.options(**chosen)
        from .train import train

        return train(options)
    from .train import resume

    return resume(flags.resume, **chosen)


def _add_train_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of TrainConfig; only those given appear in the namespace."""
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder, with its options and any others given here",
    )
    hints, groups = get_type_hints(TrainConfig), {}
    for f in fields(TrainConfig):
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind, *_ = get_args(hints[f.name]) or (hints[f.name],)
        help = f.metadata["help"]
        if "[default" not in help:
            help += f" [default: {_DEFAULTS.get(str(f.default), f.default)}]"
        form = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"type": kind, "metavar": f.metadata.get("metavar", _METAVARS[kind])}
        )
        groups[group].add_argument(
            "--" + f.name.replace("_", "-"), help=help, default=argparse.SUPPRESS, **form
        )


_METAVARS = {int: "N", float: "X", str: "NAME"}
_DEFAULTS = {"None": "none", "False": "no"}


def _sample(flags: argparse.Namespace) -> None:
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
    from . import sampling

    prompts = [flags.prompt] if flags.prompts is None else sampling.read_prompts(flags.prompts)
    prompts = [prompt for prompt in prompts for _ in range(flags.num_samples)]
    model, tokenizer = _load_model(flags)
    speed = sampling.Speed()
    parts = sampling.complete(
        model,
        tokenizer,
        prompts,
        flags.max_new_tokens,
        sampling.Sampling(flags.temperature, flags.top_k, flags.top_p),
        seed=flags.seed,
        stop=flags.stop,
        batch_size=flags.batch_size,
        speed=speed,
    )
    for piece in sampling.as_json(parts) if flags.jsonl else sampling.as_text(prompts, parts):
        print(piece, end="", flush=True)
    if speed.steps:
        print(f"gpt2: {speed}{_of_the_limit(model, speed)}", file=sys.stderr)


def _of_the_limit(model, speed) -> str:
    """How much of the memory's bandwidth a cached step used."""
    if not model.fast:
        return ""
    from .machine import read_bandwidth

    rate, limit = speed.bytes / speed.seconds, read_bandwidth(model.lm_head.weight.device)
    return (
        f"; {rate / 1e9:.3g} GB/s, {rate / limit:.0%} of the {limit / 1e9:.3g} GB/s of its memory"
    )


def _add_sample_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model_flags(parser)
    add("--prompt", default="", metavar="TEXT", help="what to continue [default: nothing]")
    add(
        "--prompts",
        metavar="FILE",
        help='several: a line each, or {"prompt": TEXT} a line in FILE.jsonl; - reads stdin',
    )
    add("--max-new-tokens", type=int, default=500, metavar="N", help="[default: 500]")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times [default: nothing]",
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
        help="write an object a line: prompt, text, tokens, and finish: length, end or stop",
    )


def _load_model(flags: argparse.Namespace):
    """The model that the flags of _add_model_flags describe, and its tokenizer."""
    _check(flags, "quantize", flags.quantize in (None, "int8"), "int8")
    from . import sampling
    from .machine import pick_device, pick_dtype

    device = pick_device(flags.device)
    model, tokenizer = sampling.load(
        flags.model,
        device,
        dtype=pick_dtype(flags.dtype, device),
        tokenizer=flags.tokenizer,
        tokenizer_dir=flags.tokenizer_dir,
    )
    model.fast = flags.fast
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
        help="byte, gpt2, or a file [default: a run's own; else gpt2]",
    )
    add("--tokenizer-dir", metavar="PATH", help="folder with GPT-2's vocab.bpe and encoder.json")


def _eval(flags: argparse.Namespace) -> None:
    """How well a model predicts text: its perplexity (--data), and how often it finds the right one
    of several endings the likeliest (--choices)."""
    if flags.data is None and flags.choices is None:
        raise InputError("data or choices must be given, got neither")
    for name in ("context", "stride"):
        value = getattr(flags, name)
        _check(flags, name, value is None or flags.data is not None, "absent without data")
    from tqdm import tqdm

    from . import choices, data, evaluate

    model, tokenizer = _load_model(flags)
    context, stride = evaluate.check_windows(model, flags.context, flags.stride, flags.batch_size)
    texts = questions = ()
    if flags.data is not None:
        texts = data.whole(flags.data, tokenizer, flags.tokenizer_dir).parts
    if flags.choices is not None:
        questions = choices.read(flags.choices, tokenizer, model.config.block_size)
    results = {}
    if flags.data is not None:
        total = sum(len(ids) - 1 for ids in texts)
        with tqdm(total=total, unit="token", desc="scoring", unit_scale=True, delay=1) as bar:
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
        with tqdm(total=total, unit="ending", desc="choosing", delay=1) as bar:
            results["choices"] = choices.evaluate(model, questions, flags.batch_size, bar.update)
    if flags.json:
        print(json.dumps({name: result.figures() for name, result in results.items()}))
    else:
        for name, result in results.items():
            print(f"{name} {getattr(flags, name)!r}: {result}")


def _add_eval_flags(parser: argparse.ArgumentParser) -> None:
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


def _convert(flags: argparse.Namespace) -> None:
    """Turn a model into another format, to the bit. MODEL is a folder of Hugging Face's, or a name
    (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2); the folder of a run; nanoGPT's ckpt.pt; or
    llm.c's model.bin. The optimizer's state is left behind."""
    from .convert import convert

    model = convert(
        flags.model,
        flags.dest,
        flags.to,
        dtype=flags.dtype,
        vocab_size=flags.vocab_size,
        tokenizer=flags.tokenizer,
        max_shard_size=flags.max_shard_size,
    )
    if "nanogpt" in (model.format, flags.to) and model.format != flags.to:
        print(
            "gpt2: nanoGPT computes GELU by erf, not tanh: logits differ a little", file=sys.stderr
        )
    print(f"{flags.dest}: {model.config}")


def _add_convert_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="what to convert; its format is seen")
    add("dest", metavar="DEST", help="new folder (hf, run) or new file (nanogpt, llmc)")
    add(
        "--to",
        required=True,
        metavar="FORMAT",
        help="hf: Hugging Face's; run: ours, for gpt2 sample and --init; nanogpt; llmc",
    )
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 [default: the model's]")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="the first N tokens alone: 50257 takes off nanoGPT's padding [default: all]",
    )
    add(
        "--tokenizer",
        metavar="NAME",
        help="of a run: byte, gpt2, or a file, such as another run's tokenizer.json "
        "[default: the model's own, or gpt2]",
    )
    add("--max-shard-size", metavar="SIZE", help="of a file of hf's, such as 5GB [default: 50GB]")


def _prepare(flags: argparse.Namespace) -> None:
    """Turn text into token shards in llm.c's format, which training maps instead of loading."""
    from .prepare import prepare

    counts = prepare(
        flags.source,
        flags.out,
        tokenizer=flags.tokenizer,
        tokenizer_dir=flags.tokenizer_dir,
        val_fraction=flags.val_fraction,
        shard_tokens=flags.shard_tokens,
    )
    total = ", ".join(f"{n:,} {part} tokens" for part, n in counts.items())
    print(f"{flags.out}: {total}; train on them: gpt2 train --data {flags.out}")


def _add_prepare_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="PATH", help="text file, folder, pattern, or - for standard input")
    add("--out", required=True, metavar="PATH", help="new folder for the shards")
    add("--tokenizer", default="gpt2", metavar="NAME", help=_TOKENIZER_HELP)
    add("--tokenizer-dir", metavar="PATH", help="folder with GPT-2's vocab.bpe and encoder.json")
    add(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="part of the tokens, at the end, to validate on [default: 0.1]",
    )
    add(
        "--shard-tokens",
        type=int,
        default=2**27,
        metavar="N",
        help="most tokens in a file [default: 134217728]",
    )


_TOKENIZER_HELP = "gpt2, char, byte, or a file that `gpt2 tokenizer` wrote [default: gpt2]"


def _tokenizer(flags: argparse.Namespace) -> None:
    """Learn a byte-pair encoding from text; `--tokenizer FILE` uses it."""
    from . import files, sources, tokenizer

    files.check_new("out", flags.out)
    texts = sources.documents(flags.source)
    blocks = (block for text in texts for block in text.blocks())
    learned = tokenizer.train_bpe(blocks, flags.vocab_size)
    files.write_atomic(flags.out, tokenizer.to_tiktoken(learned))
    print(f"{flags.out}: {learned.vocab_size:,} ids; use them: gpt2 train --tokenizer {flags.out}")


def _add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="TEXT", help="text file, folder, pattern, or - for standard input")
    add(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="ids: 256 bytes, the merges, and <|endoftext|>; at least 257",
    )
    add("--out", required=True, metavar="FILE", help="new file, in tiktoken's format")


def _check(flags: argparse.Namespace, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {expected}, got {getattr(flags, name)}")
