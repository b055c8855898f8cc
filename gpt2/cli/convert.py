"""gpt2 convert: converts a model to another format."""

import argparse
import sys
from pathlib import Path


def run(flags: argparse.Namespace) -> None:
    """Convert a model to another format. Weights keep their bits unless --dtype is given. MODEL is
    a Hugging Face folder; a published name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2);
    the folder of a run; nanoGPT's ckpt.pt; or llm.c's model.bin. The optimizer's state is
    dropped."""
    from ..checkpoints.convert import convert
    from ..data.hf_tokenizer import is_in

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="model to convert; its format is detected")
    add("dest", metavar="DEST", help="new folder (hf, run) or new file (nanogpt, llmc)")
    add(
        "--to",
        required=True,
        metavar="FORMAT",
        help="hf: Hugging Face; run: this program's, for gpt2 sample and --init; nanogpt; llmc",
    )
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 [default: the model's]")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="keep only the first N tokens: 50257 removes nanoGPT's padding [default: all]",
    )
    add(
        "--tokenizer",
        metavar="NAME",
        help="tokenizer to store with a run or hf: byte, gpt2, or a file, such as another run's "
        "tokenizer.json [default: the model's own; else gpt2 for a run, and none for hf]",
    )
    add("--max-shard-size", metavar="SIZE", help="largest hf file, such as 5GB [default: 50GB]")
