"""The command line: gpt2 train, sample, eval, convert, prepare, tokenizer.

What the user got wrong is one line on stderr and exit code 2. A bug keeps its traceback. PyTorch
is imported by the commands that need it, so that --help answers at once.
"""

import argparse
import errno
import os
import signal
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from . import cli_model, streams
from .errors import InputError, NonFiniteError, WriteError, brief
from .train_config import TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; its exit code: 0, 1 (not finite, full disk or memory), 2 (wrong input),
    128 + signal."""
    with streams.checked():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    # OpenMP's threads spin while they wait for each other. Where another program wants the cores,
    # that made training 20 times slower (two EPYC cores); it is read when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not stream.closed:
            stream.reconfigure(errors="replace")  # a sample may hold what the terminal cannot
    shown, warnings.showwarning = warnings.showwarning, _warn
    try:
        parser = _parser()
        try:
            options = parser.parse_args(arguments)
        except SystemExit:  # after --version
            sys.stdout.flush()
            raise
        if options.command is None:
            parser.print_help()
            return 0
        code = options.command(options) or 0
        sys.stdout.flush()  # here, where an error is told
        return code
    except InputError as e:
        return _fail(str(e), 2)
    except (NonFiniteError, WriteError) as e:
        return _fail(str(e), 1)
    except (MemoryError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        reason = f" ({brief(e)})" if str(e) else ""
        return _fail(f"memory has no room for this{reason}; less data or smaller sizes may fit", 1)
    except BrokenPipeError:  # gpt2 sample … | head
        streams.drop(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.filename is None and e.errno in _FULL:  # files are written as WriteError says
            streams.drop(sys.stdout)
            return _fail(f"standard output cannot be written: {e.strerror}", 1)
        return _fail(f"{brief(e.filename or 'file')}: {e.strerror or e}", 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        warnings.showwarning = shown


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has an error of its own for a GPU, and none for a CPU."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or of_torch


def _warn(message: Warning | str, *where) -> None:
    """A warning as one line, without the place in the code that it came from."""
    print(f"gpt2: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int) -> int:
    print(f"gpt2: error: {' '.join(message.split())}", file=sys.stderr)
    return code


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage, and flags are written in full."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(brief(message))


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from . import __version__

        print(f"gpt2-kernels {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpt2", description="Train GPT-2 and sample from it.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print it"
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    for command, add_flags, help in (
        (_train, _add_train_flags, "train a model"),
        (cli_model.sample, cli_model.add_sample_flags, "write text with a trained model"),
        (cli_model.eval_, cli_model.add_eval_flags, "perplexity, and multiple choice"),
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


_TEXT_HELP = "text file, folder, pattern, or - for standard input, also of a pipe: - < <(COMMAND)"
_METAVARS = {int: "N", float: "X", str: "NAME"}
_DEFAULTS = {"None": "none", "False": "no"}


def _convert(flags: argparse.Namespace) -> None:
    """Turn a model into another format, to the bit. MODEL is a folder of Hugging Face's, or a name
    (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2); the folder of a run; nanoGPT's ckpt.pt; or
    llm.c's model.bin. The optimizer's state is left behind."""
    from .convert import convert
    from .hf_tokenizer import is_in

    model = convert(
        flags.model,
        flags.dest,
        flags.to,
        dtype=flags.dtype,
        vocab_size=flags.vocab_size,
        tokenizer=flags.tokenizer,
        max_shard_size=flags.max_shard_size,
    )
    if flags.to == "hf" and not is_in(Path(flags.dest)):
        print("gpt2: no tokenizer is written; --tokenizer names one", file=sys.stderr)
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
        help="of a run or of hf: byte, gpt2, or a file, such as another run's tokenizer.json "
        "[default: the model's own; else gpt2 for a run, and none for hf]",
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
    add("source", metavar="PATH", help=_TEXT_HELP)
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


_TOKENIZER_HELP = "gpt2, char, byte, or a file, as `gpt2 tokenizer` writes [default: gpt2]"


def _tokenizer(flags: argparse.Namespace) -> None:
    """Learn a byte-pair encoding from text; `--tokenizer FILE` uses it."""
    from . import files, sources, tokenizer

    files.check_new("out", flags.out)
    texts = sources.documents(flags.source)
    blocks = (block for text in texts for block in text.blocks())
    learned = tokenizer.train_bpe(blocks, flags.vocab_size)
    tokenizer.save(learned, flags.out)
    print(f"{flags.out}: {learned.vocab_size:,} ids; use them: gpt2 train --tokenizer {flags.out}")


def _add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="TEXT", help=_TEXT_HELP)
    add(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="ids: 256 bytes, the merges, and <|endoftext|>; 257 to 1048576",
    )
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="new file: JSON, if it ends so, or tiktoken's format",
    )
