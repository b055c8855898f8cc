"""gpt2 prepare: turns text into token shards."""

import argparse

TEXT_HELP = "text file, folder, pattern, or - for standard input, as in: - < <(COMMAND)"
_TOKENIZER_HELP = "gpt2, char, byte, or a file that `gpt2 tokenizer` wrote [default: gpt2]"


def run(flags: argparse.Namespace) -> None:
    """Turn text into token shards in llm.c's format. Training maps them into memory, so they may be
    larger than memory."""
    from ..data.prepare import prepare

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="PATH", help=TEXT_HELP)
    add("--out", required=True, metavar="PATH", help="new folder for the shards")
    add("--tokenizer", default="gpt2", metavar="NAME", help=_TOKENIZER_HELP)
    add("--tokenizer-dir", metavar="PATH", help="folder with GPT-2's vocab.bpe and encoder.json")
    add(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="fraction of the tokens, at the end, for validation [default: 0.1]",
    )
    add(
        "--shard-tokens",
        type=int,
        default=2**27,
        metavar="N",
        help="most tokens in a file [default: 134217728]",
    )
