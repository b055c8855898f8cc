"""The flags of commands that use a trained model, and loading that model."""

import argparse
import sys

from ..errors import InputError

_MEASURED = 1024  # tokens; takes a CPU some seconds for GPT-2 124M


def load_model(flags: argparse.Namespace):
    """The model that these flags name, and its tokenizer."""
    check_flag(flags, "quantize", flags.quantize in (None, "int8"), "int8 or absent")
    given = flags.quantize or flags.quantize_data is None
    check_flag(flags, "quantize_data", given, "absent without quantize")
    from .. import loading
    from ..device import pick_device, pick_dtype

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
    """Quantizes the linear weights to int8, and reports the change in perplexity on stderr."""
    from ..data import documents
    from ..generate import quantize

    ids = documents.excerpt(source, tokenizer, _MEASURED)
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


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="folder of a run, Hugging Face folder, published name, ckpt.pt or model.bin",
    )
    add("--device", default="auto", metavar="NAME", help="[default: cuda if available]")
    add(
        "--dtype",
        default="auto",
        metavar="NAME",
        help="float32 or bfloat16 [default: bfloat16 on GPUs that support it]",
    )
    add(
        "--quantize",
        metavar="int8",
        help="quantize linear weights to int8, and print the change in perplexity "
        "[default: do not quantize]",
    )
    add(
        "--quantize-data",
        metavar="PATH",
        help="text for measuring that change [default: Python's language reference]",
    )
    add(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the kernels, and cache keys and values [default: yes]",
    )
    add(
        "--tokenizer",
        metavar="NAME",
        help="byte, gpt2, a file or folder with a tokenizer, or nanoGPT's meta.pkl [default: the "
        "one in a run's or Hugging Face folder; else gpt2]",
    )
    add("--tokenizer-dir", metavar="PATH", help="folder with GPT-2's vocab.bpe and encoder.json")


def check_flag(flags: argparse.Namespace, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {expected}, got {getattr(flags, name)}")
