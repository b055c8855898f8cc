"""gpt2 tokenizer: learns a byte-pair encoding from text."""

import argparse

from .prepare import TEXT_HELP


def run(flags: argparse.Namespace) -> None:
    """Learn a byte-pair encoding from text; `--tokenizer FILE` uses it."""
    from .. import files
    from ..data import documents, tokenizers

    files.check_new("out", flags.out)
    texts = documents.documents(flags.source)
    blocks = (block for text in texts for block in text.blocks())
    learned = tokenizers.train_bpe(blocks, flags.vocab_size)
    tokenizers.save(learned, flags.out)
    print(f"{flags.out}: {learned.vocab_size:,} ids; use them: gpt2 train --tokenizer {flags.out}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="TEXT", help=TEXT_HELP)
    add(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="most ids: 256 bytes, merges, and <|endoftext|>; 257 to 1048576",
    )
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="new file: JSON if its name ends in .json, else tiktoken's format",
    )
